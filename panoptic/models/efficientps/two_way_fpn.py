"""The two-way feature pyramid (arXiv 2004.02307, section 3.2): one sum runs down the levels, another one up.

Shapes: B images, C channels, h x w a level; "p2" to "p5" have strides 4 to 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.fpn import LEVELS
from panoptic.models.efficientps.blocks import ConvNormLeaky, SeparableConv


class TwoWayFPN(nn.Module):
    """Each backbone feature has two 1x1 convolutions, one for either direction; a 3x3 follows the sum of both.

    Levels are enlarged and reduced by the nearest neighbour, as the published code does.

    Args:
        channels: of the backbone's features.
        width: C of every level.
        norm: after each convolution.
        separable: the 3x3 is depthwise separable, as in the paper; the published code has a plain one.
    """

    def __init__(self, channels: Mapping[str, int], width: int, norm: Norm, separable: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.output = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, level in LEVELS.items():
            self.down[level] = ConvNormLeaky(channels[name], width, 1, norm)
            self.up[level] = ConvNormLeaky(channels[name], width, 1, norm)
            plain = ConvNormLeaky(width, width, 3, norm)
            self.output[level] = SeparableConv(width, width, norm) if separable else plain
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of the backbone to the levels, fine to coarse, each [B, C, h, w]."""
        names = {level: name for name, level in LEVELS.items()}
        down = _accumulate({level: self.down[level](features[names[level]]) for level in reversed(names)})
        up = _accumulate({level: self.up[level](features[names[level]]) for level in names})
        return {level: self.output[level](down[level] + up[level]) for level in names}


def _accumulate(levels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each level plus the sum that the one before it has, at its own size."""
    sums: dict[str, Tensor] = {}
    before: Tensor | None = None
    for level, here in levels.items():
        before = here if before is None else here + F.interpolate(before, size=here.shape[-2:], mode="nearest")
        sums[level] = before
    return sums
