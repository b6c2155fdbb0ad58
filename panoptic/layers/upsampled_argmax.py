"""The best class of each pixel, from logits that are upsampled a few classes at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from panoptic.layers.resize import mixed_cells

CHUNK = 16
"""Classes upsampled at once: bounds the memory of 133 classes at 2 megapixels."""

BLOCK = 1 << 18
"""Interpolated values held at once."""


def best_classes(logits: Tensor, upsample: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The highest logit of each pixel after `upsample`, and its class, the first of equally high ones.

    Args:
        logits: float [C, h, w], at least one class.
        upsample: of [1, some classes, h, w] to [1, some classes, H, W], each class by itself.

    Returns:
        float [H, W] and int64 [H, W].
    """
    best, classes = upsample(logits[None, :CHUNK])[0].max(0)
    for start in range(CHUNK, len(logits), CHUNK):
        value, index = upsample(logits[None, start : start + CHUNK])[0].max(0)
        classes = torch.where(value > best, index + start, classes)
        best = torch.maximum(value, best)
    return best, classes


def highest(
    masks: Tensor,
    canvas: tuple[int, int],
    size: tuple[int, int],
    where: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """The plane that is highest in each pixel when all are resized to the canvas, the first of equals, int32 [H, W].

    A bilinear value is a convex combination of the four corners of a cell, with the same factors for all planes. So
    the plane that is highest at all four is highest everywhere within, and only the cells in which the corners
    disagree are interpolated: few beside the whole map.

    Args:
        masks: [K, h, w], K at least 1.
        canvas: height and width that the masks cover.
        size: H and W, of the image inside of it.
        where: bool [H, W], the pixels that matter; the answer elsewhere may be that of a pixel nearby.
        align_corners: of the resize.
    """
    best = masks.argmax(0).int()
    if tuple(masks.shape[-2:]) == tuple(canvas):
        return best[: size[0], : size[1]].contiguous()
    # the two cells of each axis that a pixel mixes
    height, width = best.shape
    (top, bottom, down), (left, right, across) = (
        mixed_cells(*sides, align_corners, masks.device) for sides in zip((height, width), canvas, size, strict=True)
    )
    # cells whose four corners disagree
    below, beside = (torch.arange(side, device=masks.device).add(1).clamp(max=side - 1) for side in (height, width))
    level = best == best[:, beside]
    disputed = ~(level & level[below] & (best == best[below]))
    # every pixel takes the answer of its upper left corner; those of disputed cells are interpolated
    owners = best.index_select(1, left).index_select(0, top)
    disputed = disputed.index_select(1, left).index_select(0, top)
    if where is not None:
        disputed &= where
    pixels = torch.nonzero(disputed.view(-1))[:, 0]
    table = masks.flatten(1).t().contiguous()  # the values of all planes at one place lie side by side
    for part in pixels.split(max(1, BLOCK // len(masks))):
        y, x = part // size[1], part % size[1]
        upper, lower, before, after = top[y] * width, bottom[y] * width, left[x], right[x]
        corners = [table.index_select(0, line + side) for line in (upper, lower) for side in (before, after)]
        first, second = (torch.lerp(corners[k], corners[k + 1], across[x, None]) for k in (0, 2))
        owners.view(-1)[part] = torch.lerp(first, second, down[y, None]).argmax(1).int()
    return owners
