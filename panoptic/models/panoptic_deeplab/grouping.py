"""Instances of Panoptic-DeepLab: centres by non-maximum suppression, and the centre to which each pixel belongs.

Cheng et al., arXiv 1911.10194, section 3.3; "Panoptic-DeepLab in PyTorch", sections 2.3.1 and 2.3.2.

Shapes: H x W pixels, K centres, P pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 16
"""Side in pixels of the cells for which `group_pixels` looks for the only centre that can be nearest."""

BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Numbers handled at once: what fits a core's cache, or what keeps a GPU busy within bounded memory."""

SPARSE = 2
"""Up to this many look-ups a pixel, windows are read around the candidates only instead of pooling the map."""


def find_centres(heatmap: Tensor, threshold: float = 0.1, kernel: int = 7, top_k: int | None = 200) -> Tensor:
    """Peaks of the heatmap: pixels above `threshold` that are the maximum of their window.

    With `top_k` peaks or more, those strictly above the top_k-th highest survive, so at most top_k - 1
    (as published; ties at the cutoff are dropped). Unlike detectron2's, maps of fewer than top_k pixels work.

    Args:
        heatmap: float [H, W].
        threshold: peaks are strictly higher (and higher than 0).
        kernel: odd side of the window.
        top_k: None keeps all.

    Returns:
        int64 [K, 2], row and column, in row-major order.
    """
    if kernel % 2 == 0:
        raise ValueError(f"find_centres: the window of {kernel} pixels has no middle; make kernel odd")
    heatmap = heatmap.contiguous()
    peaks = torch.nonzero(heatmap.view(-1) > max(threshold, 0.0))[:, 0]
    # first against the 3x3 neighbours, which few survive, then against the whole window
    for reach in sorted({min(1, kernel // 2), kernel // 2}):
        if len(peaks) * (2 * reach + 1) ** 2 <= SPARSE * heatmap.numel():
            peaks = _highest_in_window(heatmap, peaks, reach)
        else:
            peaks = peaks[(_pooled(heatmap, reach) == heatmap).view(-1)[peaks]]
    # peaks whose score equals that of the top_k-th do not survive, nor does the top_k-th itself
    if top_k is not None and len(peaks) >= top_k:
        values = heatmap.view(-1)[peaks]
        peaks = peaks[values > values.topk(top_k).values[-1]]
    return torch.stack([peaks // heatmap.shape[1], peaks % heatmap.shape[1]], 1)


def _highest_in_window(heatmap: Tensor, pixels: Tensor, reach: int) -> Tensor:
    """The pixels int64 [P] (flat) that no pixel within `reach` rows and columns exceeds."""
    height, width = heatmap.shape
    window = torch.arange(-reach, reach + 1, device=pixels.device)
    kept = [pixels[:0]]
    for part in pixels.split(max(1, budget(pixels.device) // len(window) ** 2)):
        # clamped to the map: a border pixel is in the window anyway
        rows = (part[:, None] // width + window).clamp_(0, height - 1) * width
        columns = (part[:, None] % width + window).clamp_(0, width - 1)
        index = rows[:, :, None] + columns[:, None, :]
        highest = heatmap.view(-1).index_select(0, index.view(-1)).view(index.shape).amax((1, 2))
        kept.append(part[heatmap.view(-1)[part] == highest])
    return torch.cat(kept)


def _pooled(heatmap: Tensor, reach: int) -> Tensor:
    """The maximum of each pixel's window, [H, W]; a square window is a column of rows."""
    side = 2 * reach + 1
    down = F.max_pool2d(heatmap[None, None], (side, 1), 1, (reach, 0))
    return F.max_pool2d(down, (1, side), 1, (0, reach))[0, 0]


def group_pixels(centres: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """The centre that is nearest (Euclidean) to the place to which each pixel's offset points, the first of equals.

    Args:
        centres: int64 [K, 2], row and column.
        offset: float [2, H, W], (dy, dx) from each pixel.
        mask: bool [H, W], the pixels to group.

    Returns:
        int32 [H, W], 1 + the index of the centre; 0 outside of `mask`, and everywhere if K is 0.
    """
    instances = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    if not len(centres):
        return instances
    # most pixels point to a cell in which only one centre can be nearest; only the others compare distances
    cells = _only_candidates(centres, mask.shape)
    columns = torch.arange(mask.shape[1], device=mask.device)
    for lines in blocks(mask.shape, mask.device):
        pixels = torch.nonzero(mask[lines].reshape(-1))[:, 0]
        rows = torch.arange(mask.shape[0], device=mask.device)[lines, None]
        y = (offset[0, lines] + rows).reshape(-1).index_select(0, pixels)
        x = (offset[1, lines] + columns).reshape(-1).index_select(0, pixels)
        instances[lines].view(-1).scatter_(0, pixels, _nearest(centres, cells, y, x))
    return instances


def _nearest(centres: Tensor, cells: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """int32 [P], 1 + the index of the centre nearest to each location.

    Args:
        centres: int64 [K, 2].
        cells: of `_only_candidates`.
        y, x: float [P], the locations.
    """
    # the cell of each location; those outside of the map fall into its border
    cell_rows, cell_columns = (
        (position / CELL + 1).int().clamp_(0, size - 1) for position, size in zip((y, x), cells.shape, strict=True)
    )
    nearest = cells.view(-1).index_select(0, cell_rows.mul_(cells.shape[1]).add_(cell_columns))
    undecided = torch.nonzero(nearest == 0)[:, 0]
    centre_rows, centre_columns = centres.to(y.dtype).unbind(1)
    for part in undecided.split(max(1, budget(y.device) // len(centres))):
        distances = (centre_rows - y[part, None]).square_().add_((centre_columns - x[part, None]).square_())
        nearest[part] = distances.argmin(1).int() + 1
    return nearest


def _only_candidates(centres: Tensor, size: Sequence[int]) -> Tensor:
    """The centre that is the nearest from everywhere within each cell of the map, where there is one.

    |p - c|^2 - |p - a|^2 is linear in p, so its least value over a cell of side s around m is
    |m - c|^2 - |m - a|^2 - s (|c_y - a_y| + |c_x - a_x|): where that is positive for every centre c but
    the nearest one a, no pixel of the cell needs a comparison. Cells are taken one pixel larger on every
    side, which no rounding reaches.

    Returns:
        int32 [rows of cells + 2, columns of cells + 2], 1 + the index of the centre, 0 where several
        could be nearest and in the border that stands for everything outside of the map.
    """
    rows, columns = centres.double().unbind(1)
    middles = [(torch.arange(-(-side // CELL), device=centres.device) + 0.5) * CELL for side in size]
    cells = torch.zeros(len(middles[0]) + 2, len(middles[1]) + 2, dtype=torch.int32, device=centres.device)
    # squared distances from the middles of a row of cells to all centres, some rows at a time
    across = (middles[1][:, None] - columns).square_()
    step = max(1, budget(centres.device) // across.numel())
    for first in range(0, len(middles[0]), step):
        down = (middles[0][first : first + step, None] - rows).square_()
        distances = down[:, None] + across
        lowest, nearest = distances.min(2, keepdim=True)
        # the most that each centre gains on the nearest one within the cell
        gained = (rows - rows[nearest]).abs_().add_((columns - columns[nearest]).abs_()).mul_(CELL + 2)
        rivals = (distances.sub_(lowest) <= gained).sum(2)  # the nearest is its own, 0 <= 0
        cells[1:-1, 1:-1][first : first + step] = torch.where(rivals == 1, nearest[:, :, 0] + 1, 0)
    return cells


def blocks(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Runs of lines of an [H, W] map that are handled at once."""
    step = max(1, budget(device) // max(1, shape[1]))
    return (slice(first, first + step) for first in range(0, shape[0], step))


def budget(device: torch.device) -> int:
    """Numbers that are handled at once."""
    return BLOCK["cpu" if device.type == "cpu" else "cuda"]
