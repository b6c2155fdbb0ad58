"""The semantic head (arXiv 2004.02307, section 3.3).

Two levels of little detail go through dense prediction cells, two of much detail through a large scale feature
extractor; mismatch correction modules join them from coarse to fine. All four, at stride 4, give the logits.

Shapes: B images, C channels, K classes, h x w a feature map; "p2" to "p5" have strides 4 to 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.conv import initialise_convs
from panoptic.layers.resize import resize, size_of
from panoptic.models.efficientps.blocks import ConvNormLeaky, SeparableConv

DILATIONS = ((1, 6), (1, 1), (6, 21), (18, 15), (6, 3))
"""Dilations of the five convolutions of a dense prediction cell, down and across."""

SOURCES = (-1, 0, 0, 0, 3)
"""The convolution whose output each of the five sees; -1 is the cell's input."""


class SemanticHead(nn.Module):
    """Levels of a pyramid to logits of stride 4.

    Args:
        inputs: channels of every level.
        width: of the four branches.
        classes: K.
        norm: after each convolution.
    """

    def __init__(self, inputs: int, width: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.small_scale = nn.ModuleDict({level: DensePredictionCell(inputs, width, norm) for level in ("p5", "p4")})
        self.large_scale = nn.ModuleDict({level: _pair(inputs, width, norm) for level in ("p3", "p2")})
        self.corrections = nn.ModuleDict({level: _pair(width, width, norm) for level in ("p4", "p3")})
        self.classifier = nn.Conv2d(4 * width, classes, 1)
        initialise_convs(self)

    def forward(self, levels: Mapping[str, Tensor]) -> Tensor:
        """[B, inputs, h, w] of "p2" to "p5" to logits [B, K, H / 4, W / 4]."""
        size = size_of(levels["p2"])
        p5, p4 = (self.small_scale[level](levels[level]) for level in ("p5", "p4"))
        # p4 meets p5 on the way to p3 only: the logits see it as its own cell made it
        corrected = self._correct("p4", p4 + resize(p5, size_of(p4), False))
        p3 = self.large_scale["p3"](levels["p3"])
        p3 = p3 + resize(corrected, size_of(p3), False)
        p2 = self.large_scale["p2"](levels["p2"]) + resize(self._correct("p3", p3), size, False)
        return self.classifier(torch.cat([p2, *(resize(branch, size, False) for branch in (p3, p4, p5))], 1))

    def _correct(self, level: str, x: Tensor) -> Tensor:
        """Two convolutions, and twice the size."""
        return F.interpolate(self.corrections[level](x), scale_factor=2, mode="bilinear", align_corners=False)


class DensePredictionCell(nn.Module):
    """Five dilated separable convolutions, some behind others, whose outputs a 1x1 convolution joins.

    Chen et al., "Searching for Efficient Multi-Scale Architectures for Dense Image Prediction", arXiv 1809.04184.
    """

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(SeparableConv(inputs, inputs, norm, dilation) for dilation in DILATIONS)
        self.join = ConvNormLeaky(len(DILATIONS) * inputs, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        found: list[Tensor] = []
        for conv, source in zip(self.convs, SOURCES, strict=True):
            found.append(conv(x if source < 0 else found[source]))
        return self.join(torch.cat(found, 1))


def _pair(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(SeparableConv(inputs, outputs, norm), SeparableConv(outputs, outputs, norm))
