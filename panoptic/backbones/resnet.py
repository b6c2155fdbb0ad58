"""One ResNet for every reference (He et al. 2016), with torchvision's key names.

Switches cover where a bottleneck strides (3x3 of torchvision, 1x1 of Caffe's and detectron2's MSRA
weights), the three-convolution DeepLab stem, the output stride with both dilation rules,
DeepLabV3's multigrid, a second 3x3 in each bottleneck ("Image Panoptic Segmentation Challenges using COCO
Dataset", table 7), and deformable 3x3 (Dai et al. 2017; Zhu et al. 2019). All other weights keep their names, so
an ordinary checkpoint fills them.

Shapes: B images, H x W canvas, h x w a feature map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STAGES, Deformable
from panoptic.layers.config import Norm
from panoptic.layers.deformable import deformable_conv
from panoptic.layers.norm import norm_layer


@dataclass(frozen=True)
class Depth:
    """The shape of one member of the family."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    double: bool = False
    """A second 3x3 in each bottleneck. The report that proposes it says no more of it: here it follows the first, at
    stride 1, with the same dilation and its own norm and ReLU."""


DEPTHS = {
    "resnet14": Depth(True, (1, 1, 1, 1)),
    "resnet14_double3x3": Depth(True, (1, 1, 1, 1), double=True),
    "resnet18": Depth(False, (2, 2, 2, 2)),
    "resnet34": Depth(False, (3, 4, 6, 3)),
    "resnet50": Depth(True, (3, 4, 6, 3)),
    "resnet101": Depth(True, (3, 4, 23, 3)),
    "resnet50_double3x3": Depth(True, (3, 4, 6, 3), double=True),
    "resnet101_double3x3": Depth(True, (3, 4, 23, 3), double=True),
}


class ResNet(nn.Module):
    """Features after the stem ("stem", stride 4) and after each stage ("res2" to "res5").

    Args:
        name: a key of `DEPTHS`.
        norm: of every convolution.
        deeplab_stem: three 3x3 convolutions, 128 channels out, in place of the 7x7.
        output_stride: 32, 16 or 8; later stages trade their stride for dilation.
        dilate_first: the first block of a dilated stage has the stage's dilation (detectron2) instead
            of the previous stage's (torchvision).
        multigrid: factors of the dilations of the last stage's blocks.
        stride_in_1x1: bottlenecks stride in their first 1x1 convolution.
        deformable: the (first) 3x3 of the bottlenecks of `deformable_stages`.

    Raises:
        ValueError: deformable convolutions are asked of a ResNet without bottlenecks, or of no stage of it.
    """

    def __init__(
        self,
        name: str,
        norm: Norm = "batch",
        *,
        deeplab_stem: bool = False,
        output_stride: int = 32,
        dilate_first: bool = False,
        multigrid: Sequence[int] = (1, 1, 1),
        stride_in_1x1: bool = False,
        deformable: Deformable = "none",
        deformable_stages: Sequence[str] = STAGES[1:],
    ) -> None:
        super().__init__()
        depth = DEPTHS[name]
        self.stride_in_1x1 = stride_in_1x1
        self.deeplab_stem = deeplab_stem
        if deformable != "none" and not depth.bottleneck:
            raise ValueError(f"backbone.deformable: {name} has no bottlenecks; take resnet50 or resnet101")
        if deformable != "none" and (not deformable_stages or not set(deformable_stages) <= set(STAGES)):
            raise ValueError(f"backbone.deformable_stages: {tuple(deformable_stages)} must be some of {STAGES}")
        if deeplab_stem:
            self.conv1, self.bn1 = _conv3x3(3, 64, 2), norm_layer(norm, 64)
            self.conv2, self.bn2 = _conv3x3(64, 64), norm_layer(norm, 64)
            self.conv3, self.bn3 = _conv3x3(64, 128), norm_layer(norm, 128)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = norm_layer(norm, 64)
        channels = 128 if deeplab_stem else 64
        self.channels: dict[str, int] = {"stem": channels}
        self.strides: dict[str, int] = {"stem": 4}
        reached, dilation = 4, 1
        for index, (stage, blocks) in enumerate(zip(STAGES, depth.blocks, strict=True)):
            stride, previous = (1 if index == 0 else 2), dilation
            if reached * stride > output_stride:
                stride, dilation = 1, dilation * 2
            reached *= stride
            dilations = [previous if i == 0 and not dilate_first else dilation for i in range(blocks)]
            if stage == "res5":
                dilations = [d * multigrid[i % len(multigrid)] for i, d in enumerate(dilations)]
            width = 64 * 2**index
            layers: list[nn.Module] = []
            kind = deformable if stage in deformable_stages else "none"
            for i, block_dilation in enumerate(dilations):
                shape = (channels, width, stride if i == 0 else 1, block_dilation, norm)
                layers.append(
                    Bottleneck(*shape, stride_in_1x1, depth.double, kind) if depth.bottleneck else BasicBlock(*shape)
                )
                channels = width * (Bottleneck if depth.bottleneck else BasicBlock).expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*layers))
            self.channels[stage], self.strides[stage] = channels, reached
        self.apply(_initialise)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the five feature maps, from stride 4 to the output stride."""
        features = {"stem": self.stem(x)}
        x = features["stem"]
        for index, stage in enumerate(STAGES):
            x = features[stage] = self.get_submodule(f"layer{index + 1}")(x)
        return features

    def stem(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, 64 or 128, H / 4, W / 4]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.deeplab_stem:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
            x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.max_pool2d(x, 3, 2, 1)

    def stage_names(self) -> list[list[str]]:
        """The modules of the five freezable stages: the stem, then the four residual stages."""
        stem = [name for name, _ in self.named_children() if not name.startswith("layer")]
        return [stem, *([f"layer{k}"] for k in (1, 2, 3, 4))]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, width, stride, dilation), norm_layer(norm, width)
        self.conv2, self.bn2 = _conv3x3(width, width, 1, dilation), norm_layer(norm, width)
        self.downsample = _shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, width, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around an identity (ResNet-50 and deeper); the 3x3 may be deformable, or doubled."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        norm: Norm,
        stride_in_1x1: bool = False,
        double: bool = False,
        deformable: Deformable = "none",
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        outputs = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, first, bias=False), norm_layer(norm, width)
        self.conv2_offset: nn.Conv2d | None = None
        if deformable != "none":
            self.conv2_offset = Offsets(width, 27 if deformable == "v2" else 18, second, dilation)
        conv3x3 = _conv3x3 if deformable == "none" else DeformableConv3x3
        self.conv2: nn.Module = conv3x3(width, width, second, dilation)
        self.bn2 = norm_layer(norm, width)
        self.conv2b = _conv3x3(width, width, 1, dilation) if double else None
        self.bn2b = norm_layer(norm, width) if double else None
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), norm_layer(norm, outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, 4 width, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.conv2(x) if self.conv2_offset is None else self.conv2(x, self.conv2_offset(x))
        x = F.relu(self.bn2(x), inplace=True)
        if self.conv2b is not None and self.bn2b is not None:
            x = F.relu(self.bn2b(self.conv2b(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class Offsets(nn.Conv2d):
    """The convolution that gives the offsets of a deformable 3x3, and in v2 the weights of its samples.

    Its output has 18 channels, dy and dx of each tap, and in v2 9 more, the logits of the weights. All are zero at
    first, so that v1 begins as the plain convolution and v2 as half of it.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__(inputs, outputs, 3, stride, dilation, dilation)


class DeformableConv3x3(nn.Module):
    """A 3x3 whose taps sample bilinearly at an offset from their places; its weight is that of a plain convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """[B, C, h, w] and the output of `Offsets` at the output's size to [B, outputs, h / stride, w / stride]."""
        factors = offsets[:, 18:].float().sigmoid() if offsets.shape[1] > 18 else None
        return deformable_conv(
            x, offsets[:, :18], self.weight, stride=self.stride, dilation=self.dilation, factors=factors
        )


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    """A projection where the size or the channels change, else None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(norm, outputs))


def _initialise(module: nn.Module) -> None:
    """He et al.'s initialisation, by fan-out as in both references; offsets start at zero."""
    if isinstance(module, Offsets):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
