"""Convolution, normalisation and leaky ReLU: the block that EfficientPS is made of.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer

SLOPE = 0.01
"""Slope of the leaky ReLU below 0, everywhere (arXiv 2004.02307, section 3.1)."""

Dilation = tuple[int, int]
"""Dilation of a convolution, down and across."""


class ConvNormLeaky(nn.Module):
    """Convolution without bias that keeps the size, normalisation, leaky ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, norm: Norm, dilation: Dilation = (1, 1), groups: int = 1
    ) -> None:
        super().__init__()
        padding = dilation[0] * (kernel // 2), dilation[1] * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, 1, padding, dilation, groups, bias=False)
        self.norm = norm_layer(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE, inplace=True)


class SeparableConv(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution, each with norm and leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, dilation: Dilation = (1, 1)) -> None:
        super().__init__()
        self.depthwise = ConvNormLeaky(inputs, inputs, 3, norm, dilation, inputs)
        self.pointwise = ConvNormLeaky(inputs, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        return self.pointwise(self.depthwise(x))
