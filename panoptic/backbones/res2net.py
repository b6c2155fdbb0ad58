"""Res2Net (Gao et al. 2019), 26 channels by 4 scales, with the key names of the published files.

The 3x3 convolution of a bottleneck becomes three narrow ones, each seeing the output of the one before, and
a fourth group that passes unchanged. v1 has a 7x7 stem and strided 1x1 shortcuts, v1b three 3x3 in the
stem and shortcuts that average before they project. The first block of a stage adds nothing across its groups and
averages the fourth over 3x3, at stride 1 (res2) too.

With `stride_in_1x1` it is what its detectron2 fork computes, whose published Panoptic FPN was trained so: the
stride lies in the first 1x1 and the fourth group is never averaged.

Shapes: B images, H x W canvas, h x w a feature map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STAGES
from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer

WIDTH, SCALE = 26, 4
"""Channels of a group in the first stage, and the number of groups."""


@dataclass(frozen=True)
class Kind:
    """The shape of one member of the family."""

    blocks: tuple[int, int, int, int]
    deep: bool
    """v1b: three convolutions in the stem and averaging shortcuts."""


RES2NETS = {
    "res2net14_26w_4s": Kind((1, 1, 1, 1), False),
    "res2net50_26w_4s": Kind((3, 4, 6, 3), False),
    "res2net101_26w_4s": Kind((3, 4, 23, 3), False),
    "res2net50_v1b_26w_4s": Kind((3, 4, 6, 3), True),
    "res2net101_v1b_26w_4s": Kind((3, 4, 23, 3), True),
}


class Res2Net(nn.Module):
    """Features after the stem ("stem", stride 4) and after each stage ("res2" to "res5").

    Args:
        name: a key of `RES2NETS`.
        norm: of every convolution.
        output_stride: 32, 16 or 8; later stages trade their stride for dilation.
        dilate_first: the first block of a dilated stage has the stage's dilation instead of the previous one's.
        stride_in_1x1: compute as the detectron2 fork (see the module).
    """

    def __init__(
        self,
        name: str,
        norm: Norm = "batch",
        *,
        output_stride: int = 32,
        dilate_first: bool = False,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        kind = RES2NETS[name]
        self.stride_in_1x1 = stride_in_1x1
        self.conv1 = _deep_stem(norm) if kind.deep else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(norm, 64)
        self.channels: dict[str, int] = {"stem": 64}
        self.strides: dict[str, int] = {"stem": 4}
        channels, reached, dilation = 64, 4, 1
        for index, (stage, blocks) in enumerate(zip(STAGES, kind.blocks, strict=True)):
            stride, previous = (1 if index == 0 else 2), dilation
            if reached * stride > output_stride:
                stride, dilation = 1, dilation * 2
            reached *= stride
            width, layers = 64 * 2**index, []
            for i in range(blocks):
                block = Block(
                    channels,
                    width,
                    norm,
                    first=i == 0,
                    stride=stride if i == 0 else 1,
                    dilation=previous if i == 0 and not dilate_first else dilation,
                    averaging_shortcut=kind.deep,
                    stride_in_1x1=stride_in_1x1,
                )
                layers.append(block)
                channels = 4 * width
            self.add_module(f"layer{index + 1}", nn.Sequential(*layers))
            self.channels[stage], self.strides[stage] = channels, reached
        self.apply(_initialise)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the five feature maps, from stride 4 to the output stride."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        features = {"stem": x}
        for index, stage in enumerate(STAGES):
            x = features[stage] = self.get_submodule(f"layer{index + 1}")(x)
        return features

    def stage_names(self) -> list[list[str]]:
        """The modules of the five freezable stages: the stem, then the four residual stages."""
        return [["conv1", "bn1"], *([f"layer{k}"] for k in (1, 2, 3, 4))]


class Block(nn.Module):
    """1x1, the hierarchy of 3x3 over channel groups, 1x1, around an identity."""

    def __init__(
        self,
        inputs: int,
        width: int,
        norm: Norm,
        *,
        first: bool,
        stride: int,
        dilation: int,
        averaging_shortcut: bool,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        group, outputs = width * WIDTH // 64, 4 * width
        self.first, self.group, self.averages = first, group, first and not stride_in_1x1
        self.stride = 1 if stride_in_1x1 else stride
        self.conv1 = nn.Conv2d(inputs, SCALE * group, 1, stride if stride_in_1x1 else 1, bias=False)
        self.bn1 = norm_layer(norm, SCALE * group)
        self.convs = nn.ModuleList(
            nn.Conv2d(group, group, 3, self.stride, dilation, dilation, bias=False) for _ in range(SCALE - 1)
        )
        self.bns = nn.ModuleList(norm_layer(norm, group) for _ in range(SCALE - 1))
        self.conv3 = nn.Conv2d(SCALE * group, outputs, 1, bias=False)
        self.bn3 = norm_layer(norm, outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm, averaging_shortcut) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, 4 width, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        groups = torch.split(F.relu(self.bn1(self.conv1(x)), inplace=True), self.group, 1)
        outputs: list[Tensor] = []
        for k, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=True)):
            y = groups[k] if k == 0 or self.first else outputs[-1] + groups[k]
            outputs.append(F.relu(norm(conv(y))))
        last = F.avg_pool2d(groups[-1], 3, self.stride, 1) if self.averages else groups[-1]
        return F.relu(self.bn3(self.conv3(torch.cat([*outputs, last], 1))) + shortcut, inplace=True)


def _deep_stem(norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        norm_layer(norm, 32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, 1, 1, bias=False),
        norm_layer(norm, 32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, 1, 1, bias=False),
    )


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm, averaging: bool) -> nn.Sequential:
    """The shortcut of the first block of a stage.

    The averaging form keeps its pool where the stride is 1, as the published keys show.
    """
    if not averaging:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(norm, outputs))
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), norm_layer(norm, outputs))


def _initialise(module: nn.Module) -> None:
    """He et al.'s initialisation by fan-out, as published."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
