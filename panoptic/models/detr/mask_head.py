"""DETR's mask head: from the attention maps of a query on the coarse map to its mask at stride 4.

Carion et al., arXiv 2005.12872, section 4.4; facebookresearch/detr (MaskHeadSmallConv). The first convolution
of the reference sees the projected backbone, repeated for each query, beside the query's attention maps. A
convolution is linear, so the backbone's part is computed once an image here, like the levels that are added.

Shapes: n queries of one image, D width, M heads, h x w the coarse map, H x W the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class MaskHead(nn.Module):
    """Five 3x3 convolutions with group norm and ReLU, three finer levels added on the way; one to a logit.

    Args:
        width: D.
        heads: M.
        channels: after the first convolution this is halved at each of the four others.
        fine: channels of res4, res3 and res2.
    """

    def __init__(self, width: int, heads: int, channels: int, fine: Sequence[int]) -> None:
        super().__init__()
        self.width = width
        first = width + heads
        widths = [first, first, *(channels // 2**k for k in range(1, 5))]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(count), count) for count in widths[1:])
        self.adapters = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(fine, widths[2:5], strict=True))
        self.predictor = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def levels(self, source: Tensor, fine: Sequence[Tensor]) -> list[Tensor]:
        """The inputs that do not depend on the query: the backbone's share of the first convolution, then finer levels.

        Args:
            source: [B, D, h, w], the projected backbone.
            fine: res4, res3 and res2, [B, C, ...].

        Returns:
            four maps, from coarse to fine.
        """
        first = cast(nn.Conv2d, self.convs[0])
        base = F.conv2d(source, first.weight[:, : self.width], first.bias, padding=1)
        return [base, *(adapter(x) for adapter, x in zip(self.adapters, fine, strict=True))]

    def forward(self, attention: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """Attention maps [n, M, h, w] of queries of an image and its `levels` [1, ...] to logits [n, H / 4, W / 4]."""
        first = cast(nn.Conv2d, self.convs[0])
        x = F.conv2d(attention, first.weight[:, self.width :], padding=1) + levels[0]
        x = F.relu(self.norms[0](x))
        for i in range(1, 5):
            x = F.relu(self.norms[i](self.convs[i](x)))
            if i < 4:
                x = levels[i] + F.interpolate(x, size=levels[i].shape[-2:], mode="nearest")
        return self.predictor(x)[:, 0]


def _groups(channels: int) -> int:
    """The groups of a norm: eight, or the most below that divide a narrower layer."""
    return math.gcd(8, channels)
