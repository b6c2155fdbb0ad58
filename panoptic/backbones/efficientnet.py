"""EfficientNet as EfficientPS changes it: no squeeze-excite, leaky ReLU, and the last convolution kept.

Tan and Le, "EfficientNet", arXiv 1905.11946; Mohan and Valada, "EfficientPS", arXiv 2004.02307, section 3.1, as its
authors' code has it. Modules have timm's names, so that the weights of timm's `tf_efficientnet_b*` fit once their
squeeze-excite parts are dropped. Convolutions with a stride pad as TensorFlow does ("SAME"): on an even size one row
and column more at the end than at the beginning.

Shapes: B images, H x W canvas, h x w a feature map, C channels.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer

SCALES = {
    "efficientps_b0": (1.0, 1.0),
    "efficientps_b1": (1.0, 1.1),
    "efficientps_b2": (1.1, 1.2),
    "efficientps_b3": (1.2, 1.4),
    "efficientps_b4": (1.4, 1.8),
    "efficientps_b5": (1.6, 2.2),
    "efficientps_b6": (1.8, 2.6),
    "efficientps_b7": (2.0, 3.1),
}
"""Factors of width and of depth (EfficientNet's code; B5 is EfficientPS's)."""

BLOCKS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride, expansion, channels and repeats of the seven groups of blocks, of B0 (arXiv 1905.11946, table 1)."""

STEM, HEAD = 32, 1280
"""Channels of the first and of the last convolution, of B0."""

SLOPE = 0.01
"""Slope of the leaky ReLU below 0."""

EPS = 1e-3
"""Added to the variance, as TensorFlow's models have it."""

GROUPS = {"stem": (0,), "res2": (1,), "res3": (2,), "res4": (3, 4), "res5": (5, 6)}
"""Groups of blocks behind each feature map."""


class EfficientNet(nn.Module):
    """The features "stem" (stride 2) to "res5" (stride 32, after the last 1x1 convolution).

    Args:
        name: a key of `SCALES`.
        norm: after every convolution; "absolute" is EfficientPS's.
    """

    def __init__(self, name: str, norm: Norm = "absolute") -> None:
        from timm.layers.create_conv2d import create_conv2d  # timm takes seconds, and most models need nothing of it
        from timm.layers.helpers import make_divisible

        super().__init__()
        width, depth = SCALES[name]
        channels = make_divisible(STEM * width)
        self.conv_stem = create_conv2d(3, channels, 3, stride=2, padding="same")
        self.bn1 = norm_layer(norm, channels, EPS)
        blocks, widths = [], []
        for kernel, stride, expansion, outputs, repeats in BLOCKS:
            outputs = make_divisible(outputs * width)
            group = []
            for k in range(math.ceil(repeats * depth)):
                kind = DepthwiseSeparable if expansion == 1 else InvertedResidual
                group.append(kind(channels, outputs, kernel, stride if k == 0 else 1, norm))
                channels = outputs
            blocks.append(nn.Sequential(*group))
            widths.append(channels)
        self.blocks = nn.Sequential(*blocks)
        last = make_divisible(HEAD * width)
        self.conv_head = create_conv2d(channels, last, 1)
        self.bn2 = norm_layer(norm, last, EPS)
        self.channels = {stage: widths[groups[-1]] for stage, groups in GROUPS.items()} | {"res5": last}
        self.strides = {stage: 2 ** (k + 1) for k, stage in enumerate(STEM_AND_STAGES)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the feature maps [B, C, h, w]."""
        x = activate(self.bn1(self.conv_stem(x)))
        features = {}
        for stage, groups in GROUPS.items():
            for group in groups:
                x = self.blocks[group](x)
            features[stage] = x
        features["res5"] = activate(self.bn2(self.conv_head(x)))
        return features

    def stage_names(self) -> list[list[str]]:
        """The names of the modules of the stem and of the four stages, for freezing."""
        stages = [[f"blocks.{group}" for group in groups] for groups in GROUPS.values()]
        return [["conv_stem", "bn1", *stages[0]], *stages[1:-1], [*stages[-1], "conv_head", "bn2"]]


class DepthwiseSeparable(nn.Module):
    """A depthwise and a 1x1 convolution, both activated, and their input added where it has the same shape.

    The published code activates the 1x1 convolution too, unlike EfficientNet.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> None:
        from timm.layers.create_conv2d import create_conv2d

        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.conv_dw = create_conv2d(inputs, inputs, kernel, stride=stride, padding="same", depthwise=True)
        self.bn1 = norm_layer(norm, inputs, EPS)
        self.conv_pw = create_conv2d(inputs, outputs, 1)
        self.bn2 = norm_layer(norm, outputs, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h / stride, w / stride]."""
        inner = activate(self.bn1(self.conv_dw(x)))
        inner = activate(self.bn2(self.conv_pw(inner)))
        return inner + x if self.residual else inner


class InvertedResidual(nn.Module):
    """A 1x1 convolution to six times the channels, a depthwise one, a 1x1 one without activation, and the input added
    where it has the same shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> None:
        from timm.layers.create_conv2d import create_conv2d
        from timm.layers.helpers import make_divisible

        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        wide = make_divisible(inputs * 6)
        self.conv_pw = create_conv2d(inputs, wide, 1)
        self.bn1 = norm_layer(norm, wide, EPS)
        self.conv_dw = create_conv2d(wide, wide, kernel, stride=stride, padding="same", depthwise=True)
        self.bn2 = norm_layer(norm, wide, EPS)
        self.conv_pwl = create_conv2d(wide, outputs, 1)
        self.bn3 = norm_layer(norm, outputs, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h / stride, w / stride]."""
        inner = activate(self.bn1(self.conv_pw(x)))
        inner = activate(self.bn2(self.conv_dw(inner)))
        inner = self.bn3(self.conv_pwl(inner))
        return inner + x if self.residual else inner


def activate(x: Tensor) -> Tensor:
    """The leaky ReLU of EfficientPS, in place."""
    return F.leaky_relu(x, SLOPE, inplace=True)
