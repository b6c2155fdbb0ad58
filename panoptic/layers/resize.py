"""Bilinear resizing, the size of a map, and the coarse cells that it mixes in each fine pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mixed_cells(
    cells: int, pixels: int, count: int | None = None, align_corners: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells that a bilinear resize along one axis mixes in each pixel, and the share of the second one.

    Args:
        cells: number before the resize.
        pixels: number after it.
        count: number of pixels in the result, the first ones; all by default.
        align_corners: as of `resize`.
        device: of the result.

    Returns:
        the first cells int64 [count], the second ones int64 [count], their share float32 [count].
    """
    positions = torch.arange(pixels if count is None else count, dtype=torch.float32, device=device)
    if align_corners:
        positions = positions * ((cells - 1) / max(pixels - 1, 1))
    else:
        positions = ((positions + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
    before = positions.long().clamp(max=cells - 1)
    return before, (before + 1).clamp(max=cells - 1), positions - before


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Resize [..., h, w] bilinearly to `size`; the tensor itself where it has that size already.

    Args:
        align_corners: the centres of the corner cells stay where they are; else the corners of the map do.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of maps [..., h, w]."""
    return x.shape[-2], x.shape[-1]
