"""Panoptic-DeepLab's context module (ASPP), decoders and heads.

Shapes: B images, C channels, H x W canvas, h x w a feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.conv import ConvNormAct
from panoptic.layers.resize import resize


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
    """Upsampling of pyramid-pooled features to a fine stride; projected low-level features are added on the way.

    Chen et al., "DeepLabV3+", arXiv 1802.02611.

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
