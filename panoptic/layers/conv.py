"""Blocks that several architectures share: input normalisation, norms, conv-norm-act, ASPP.

Shapes: B images, C channels, H x W canvas, h x w a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.segmentation import Frame

Norm = Literal["batch", "sync", "group", "frozen"]
"""batch: over the worker's batch; sync: over all workers (GPU only when training); group: 32 groups;
frozen: fixed statistics and affine."""

NORM_EPS = 1e-5


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine are constants; its keys are those of `nn.BatchNorm2d`.

    A checkpoint of either loads into the other, so stages can be frozen or thawed by config alone. Not
    a subclass of batch norm, so that SyncBN conversion passes it by. Unloaded it is the exact identity:
    the running variance starts at 1 - eps, as in detectron2.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - NORM_EPS)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to the same, by one fused kernel that also takes half-precision inputs."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, NORM_EPS)


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A normalisation of `channels` channels, eps 1e-5. Group norm takes the most groups up to 32 that fit."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels, eps=NORM_EPS)
        case "sync":
            return nn.SyncBatchNorm(channels, eps=NORM_EPS)
        case "group":
            return nn.GroupNorm(math.gcd(32, channels), channels, eps=NORM_EPS)
        case "frozen":
            return FrozenBatchNorm(channels)
    raise ValueError(f"norm: {norm!r} is not one of batch, sync, group, frozen")


def freeze(module: nn.Module) -> nn.Module:
    """Stop all learning in `module`: no gradients, and every batch norm inside becomes a frozen one.

    Returns the module itself, or its frozen replacement where it is a batch norm.
    """
    module.requires_grad_(False)
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm(module.num_features).to(module.running_mean.device)  # type: ignore[union-attr]
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        replacement = freeze(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def freeze_parts(module: nn.Module, names: Iterable[str]) -> None:
    """`freeze` the submodules of these names in place."""
    for name in names:
        part = module.get_submodule(name)
        replacement = freeze(part)
        if replacement is not part:
            module.set_submodule(name, replacement)


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """The weight of the newest batch in every running statistic of `module`."""
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            child.momentum = momentum


class Pixels(nn.Module):
    """uint8 RGB to normalised floats; batch padding becomes 0 after normalisation, as the references pad.

    Mean and deviation are on the 0..255 scale and in the order of the output channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, H, W]; what lies outside `frame.sizes` is 0."""
        if self.bgr:
            images = images.flip(1)
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        # without a branch on the sizes, which would break a compiled graph
        return x if frame is None else x * frame.valid(x.device)[:, None]


class ConvNormAct(nn.Module):
    """Convolution without bias, normalisation, ReLU. Padding keeps the size where the stride is 1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        norm: Norm,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = norm_layer(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, outputs, h / stride, w / stride]."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class SeparableConv(nn.Module):
    """Depthwise convolution then pointwise, each with normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm, *, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(inputs, inputs, kernel, norm, dilation=dilation, groups=inputs)
        self.pointwise = ConvNormAct(inputs, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, outputs, h, w]."""
        return self.pointwise(self.depthwise(x))


class ImagePool(nn.Module):
    """The image-level branch of ASPP: average pool, 1x1 convolution without norm, ReLU, back to size.

    With a window the pool slides at stride 1, so that a network trained on crops sees the same extent
    on whole images (DeepLabV3, detectron2's form); without one it is global.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, window: tuple[int, int] | None, align: bool) -> None:
        super().__init__()
        self.window, self.align = window, align
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, outputs, h, w].

        Raises:
            ValueError: h or w is no multiple of the window, so the trained extent does not fit.
        """
        height, width = x.shape[-2:]
        if self.window is None:
            pooled = x.mean((2, 3), keepdim=True)
        else:
            if height % self.window[0] or width % self.window[1]:
                raise ValueError(
                    f"image_pool: a feature map of {height}x{width} is no multiple of the pooling window "
                    f"{self.window[0]}x{self.window[1]}; pad the canvas (divisor) or set image_pool to None"
                )
            pooled = F.avg_pool2d(x, self.window, stride=1)
        return resize(F.relu(self.conv(pooled)), (height, width), self.align)


def pool_window(crop: tuple[int, int] | None, stride: int) -> tuple[int, int] | None:
    """The extent of a training crop (height, width) on a feature map of that stride; None stays None.

    Raises:
        ValueError: the crop is no multiple of the stride.
    """
    if crop is None:
        return None
    if crop[0] % stride or crop[1] % stride:
        raise ValueError(f"image_pool: {crop[0]}x{crop[1]} is no multiple of the backbone's output stride {stride}")
    return crop[0] // stride, crop[1] // stride


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017): a 1x1, dilated 3x3 of each rate, image pooling.

    The branches are concatenated in that order, projected by a 1x1 and dropped out.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rates: Sequence[int],
        norm: Norm,
        *,
        separable: bool,
        pool_bias: bool,
        pool_window: tuple[int, int] | None,
        align_corners: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        dilated: Callable[..., nn.Module] = SeparableConv if separable else ConvNormAct
        self.branches = nn.ModuleList([ConvNormAct(inputs, outputs, 1, norm)])
        self.branches.extend(dilated(inputs, outputs, 3, norm, dilation=rate) for rate in rates)
        self.pool = ImagePool(inputs, outputs, pool_bias, pool_window, align_corners)
        self.project = ConvNormAct((len(rates) + 2) * outputs, outputs, 1, norm)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        branches = [branch(x) for branch in self.branches]
        return self.dropout(self.project(torch.cat([*branches, self.pool(x)], 1)))


class Decoder(nn.Module):
    """From pyramid-pooled features up to a fine stride, adding projected low-level features on the way (DeepLabV3+).

    Args:
        inputs: channels of the pyramid-pooled features.
        low: channels of the low-level features, coarse to fine.
        projections: to which each of them is projected.
        channels: after every fusion.
        separable: fuse by a depthwise-separable convolution of that `kernel`, else by two plain 3x3.
        low_first: low-level features come first in the concatenation.
        align_corners: of the upsampling.
    """

    def __init__(
        self,
        inputs: int,
        low: Sequence[int],
        projections: Sequence[int],
        channels: int,
        *,
        norm: Norm,
        separable: bool,
        kernel: int,
        low_first: bool,
        align_corners: bool,
    ) -> None:
        super().__init__()
        self.low_first, self.align_corners = low_first, align_corners
        self.projections, self.fuse = nn.ModuleList(), nn.ModuleList()
        for low_channels, projection in zip(low, projections, strict=True):
            self.projections.append(ConvNormAct(low_channels, projection, 1, norm))
            self.fuse.append(conv_block(projection + inputs, channels, channels, separable, norm, kernel))
            inputs = channels

    def forward(self, x: Tensor, low: Sequence[Tensor]) -> Tensor:
        """[B, inputs, ...] and the low-level features, coarse to fine, to [B, channels, h, w]."""
        for feature, projection, fuse in zip(low, self.projections, self.fuse, strict=True):
            feature = projection(feature)
            x = resize(x, (feature.shape[-2], feature.shape[-1]), self.align_corners)
            x = fuse(torch.cat([feature, x] if self.low_first else [x, feature], 1))
        return x


class Head(nn.Module):
    """One convolution block and a 1x1 predictor."""

    def __init__(self, inputs: int, channels: int, outputs: int, *, separable: bool, norm: Norm, kernel: int) -> None:
        super().__init__()
        self.block = conv_block(inputs, inputs, channels, separable, norm, kernel)
        self.predictor = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w], without activation."""
        return self.predictor(self.block(x))


def conv_block(inputs: int, middle: int, outputs: int, separable: bool, norm: Norm, kernel: int = 5) -> nn.Module:
    """A depthwise-separable convolution of that kernel, or two plain 3x3 through `middle` channels."""
    if separable:
        return SeparableConv(inputs, outputs, kernel, norm)
    return nn.Sequential(ConvNormAct(inputs, middle, 3, norm), ConvNormAct(middle, outputs, 3, norm))


def initialise_decoder(part: nn.Module, kaiming: bool) -> None:
    """DeepLab's decoders and heads: every convolution from N(0, 0.001).

    With `kaiming`, as detectron2 has it, only predictors keep that; plain convolutions are uniform by
    fan-in, depthwise-separable ones normal by fan-out, and all biases zero.
    """
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.001)
    if not kaiming:
        return
    for module in part.modules():
        if isinstance(module, (ConvNormAct, ImagePool)):
            nn.init.kaiming_uniform_(module.conv.weight, a=1)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in part.modules():
        if isinstance(module, SeparableConv):
            for conv in (module.depthwise.conv, module.pointwise.conv):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def mixed_cells(
    cells: int, pixels: int, count: int | None = None, align_corners: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a bilinear resize along one axis mixes: both cells of each pixel, and the share of the second one.

    Args:
        cells: before the resize.
        pixels: after it.
        count: of pixels wanted, the first ones; all by default.
        align_corners: as of `resize`.
        device: of the result.

    Returns:
        int64 [count], int64 [count], float32 [count].
    """
    positions = torch.arange(pixels if count is None else count, dtype=torch.float32, device=device)
    if align_corners:
        positions = positions * ((cells - 1) / max(pixels - 1, 1))
    else:
        positions = ((positions + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
    before = positions.long().clamp(max=cells - 1)
    return before, (before + 1).clamp(max=cells - 1), positions - before


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear to `size`; the tensor itself where it has that size already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
