"""Queries with drawn classes and masks, and the plain way to bring masks to the output's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.models.mask_transformer.mask_resampler import Extent

EXTENTS = [
    (Extent((64, 96), (64, 96), (64, 96)), (16, 24)),
    (Extent((64, 96), (61, 83), (130, 47)), (16, 24)),
    (Extent((65, 97), (65, 97), (40, 131)), (17, 25)),
    (Extent((33, 47), (20, 47), (20, 47)), (33, 47)),
    (Extent((8, 8), (8, 5), (7, 5)), (1, 2)),
]
"""Extents, and the cells of the masks that cover them."""


def scene(seed: int, extent: Extent, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class logits and blurred masks of 12 queries, some of them of one stuff class, some of no object."""
    draw = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(12, 7, generator=draw)
    masks = 20 * F.avg_pool2d(torch.randn(12, *cells, generator=draw), 5, 1, 2)
    return classes, masks


def full_size(masks: Tensor, extent: Extent) -> Tensor:
    """As the references resize."""
    x = F.interpolate(masks[None], size=extent.canvas, mode="bilinear", align_corners=False)
    x = x[:, :, : extent.size[0], : extent.size[1]]
    return F.interpolate(x, size=extent.output, mode="bilinear", align_corners=False)[0]
