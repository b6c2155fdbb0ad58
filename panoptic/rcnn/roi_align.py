"""Features of regions: RoIAlign on the pyramid level that fits a region's size.

Shapes: B images, R regions of the batch, C channels, S side of what is pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from panoptic.rcnn.config import CANONICAL_SIDE, CANONICAL_STRIDE


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """float [R, 5]: the image's number in front of the boxes [n, 4] of each image."""
    return torch.cat([torch.cat([part.new_full((part.shape[0], 1), b), part], 1) for b, part in enumerate(boxes)])


def assign_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """int64 [R], the index of the level for each box [R, 4]; `strides` are powers of two, ascending."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(math.log2(CANONICAL_STRIDE) + torch.log2(sides / CANONICAL_SIDE + 1e-8))
    lowest, highest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    return level.clamp(lowest, highest).long() - lowest


def level_order(levels: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """For each level the indices int64 of its boxes, given the level of each box, int64 [R], and their numbers."""
    return levels.argsort(stable=True).split(list(counts))


def pool(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Tensor],
    side: int,
    samples: int = 0,
    aligned: bool = True,
    order: Sequence[Tensor] | None = None,
) -> Tensor:
    """[R, C, S, S], each region from the level that fits it: aligned RoIAlign with adaptive sampling by default.

    Args:
        features: [B, C, h, w] of each level.
        strides: of the levels.
        boxes: for each image float [n, 4] in pixels of the canvas.
        side: S.
        samples: points along a side of each cell; 0 takes as many as the region's size asks for.
        aligned: pixel centres lie half a pixel behind the coordinate; False leaves that out (mmdetection 1).
        order: of `level_order`, where it is known already; else the device is read once.
    """
    from torchvision.ops import roi_align  # torchvision takes seconds, and most processes need nothing of it

    regions = with_image(boxes).to(features[0].dtype)
    if len(features) == 1:
        return roi_align(features[0], regions, side, 1 / strides[0], samples, aligned)
    if order is None:
        levels = assign_levels(regions[:, 1:], strides)
        every = torch.arange(len(strides), device=levels.device)
        order = level_order(levels, (levels == every[:, None]).sum(1).tolist())
    pooled = [
        roi_align(feature, regions[chosen], side, 1 / stride, samples, aligned)
        for feature, stride, chosen in zip(features, strides, order, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(list(order)).argsort()]
