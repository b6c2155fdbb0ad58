"""Merge rules: from dense predictions to panoptic maps, vectorised over instances.

Centre grouping is Panoptic-DeepLab's post-processing (Cheng et al., arXiv 1911.10194; "Panoptic-DeepLab
in PyTorch", section 2.3), with the tie rules of the two published implementations: the first of equally
near centres, the smallest of equally frequent classes. Maps come in cropped to the image: nothing here
knows about batch padding.

Shapes: H x W pixels, C classes, K centres, P pixels of things.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional

from panoptic.layers.resize import mixed_cells
from panoptic.rle import encode_segments
from panoptic.segmentation import Categories, Instances, Segmentation

Score = Literal["semantic", "instance", "both"]
"""What ranks an instance: its mean class probability, the heatmap at its centroid, or their product."""


CELL = 16
"""Side in pixels of the cells for which `group_pixels` looks for the only centre that can be nearest."""


BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Numbers handled at once: what fits a core's cache, or what keeps a GPU busy within bounded memory."""


def merge_centres(
    semantic: Tensor,
    heatmap: Tensor,
    offset: Tensor,
    categories: Categories,
    *,
    threshold: float = 0.1,
    kernel: int = 7,
    top_k: int | None = 200,
    stuff_area: int = 2048,
    foreground: Tensor | None = None,
) -> Segmentation:
    """Panoptic-DeepLab's merge of one image.

    Every instance takes the class that most of its thing pixels have, the smallest of equally frequent ones.

    Args:
        semantic: int [H, W], contiguous classes; values outside 0..C-1 are void.
        heatmap: float [H, W].
        offset: float [2, H, W], (dy, dx) in pixels of this map.
        categories: tell things from stuff.
        threshold: of `find_centres`.
        kernel: of `find_centres`.
        top_k: of `find_centres`.
        stuff_area: stuff of fewer pixels becomes void.
        foreground: bool [H, W], where instances may be; None means wherever the class is a thing. Stuff
            inside of it and things outside become void, as in bowenc0221.

    Returns:
        instances in the order of their centres, then stuff in the order of classes; `scores` is None.
    """
    is_thing = torch.tensor([False, *categories.is_thing], device=semantic.device)  # entry 0 is void
    classes = semantic.int().add_(1) if semantic.dtype != torch.int32 else semantic + 1
    classes.masked_fill_((classes < 0) | (classes > len(categories)), 0)
    thing = is_thing.index_select(0, classes.view(-1)).view_as(classes) if foreground is None else foreground
    centres = find_centres(heatmap, threshold, kernel, top_k)
    segments = group_pixels(centres, offset, thing)

    wide = len(is_thing)
    votes = torch.zeros((len(centres) + 1) * wide, dtype=torch.int64, device=semantic.device)
    for lines in _blocks(segments.shape, segments.device):
        segments[lines] *= wide
        segments[lines] += classes[lines]  # now (instance, class) in one number
        votes += torch.bincount(segments[lines].view(-1), minlength=len(votes))
    table, labels = _election(votes.view(-1, wide), is_thing, stuff_area)
    for lines in _blocks(segments.shape, segments.device):
        segments[lines] = table.index_select(0, segments[lines].view(-1)).view(-1, segments.shape[1])
    return Segmentation(segments.cpu().numpy(), labels.cpu().numpy())


def _election(votes: Tensor, is_thing: Tensor, stuff_area: int) -> tuple[Tensor, Tensor]:
    """What becomes of each pair (instance or none, class or void), given how many pixels have it.

    Args:
        votes: int64 [K + 1, C + 1]; row 0 is no instance, column 0 is void.
        is_thing: bool [C + 1].
        stuff_area: as in `merge_centres`.

    Returns:
        int32 [(K + 1) * (C + 1)], the segment of each pair, and the labels, int64 [N].
    """
    ballots = votes[1:] * is_thing
    alive = ballots.sum(1) > 0
    classes = ballots.argmax(1)[alive]
    stuff = torch.nonzero((votes[0] >= max(1, stuff_area)) & ~is_thing)[:, 0]
    stuff = stuff[stuff > 0]
    table = torch.zeros_like(votes, dtype=torch.int32)
    table[1:] = (alive.cumsum(0) * alive)[:, None] * is_thing
    table[0, stuff] = torch.arange(1, len(stuff) + 1, dtype=torch.int32, device=votes.device) + len(classes)
    return table.view(-1), torch.cat([classes, stuff]) - 1


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
    for reach in sorted({min(1, kernel // 2), kernel // 2}):  # few survive their nearest neighbours
        if len(peaks) * (2 * reach + 1) ** 2 <= SPARSE * heatmap.numel():
            peaks = _highest_in_window(heatmap, peaks, reach)
        else:
            peaks = peaks[(_pooled(heatmap, reach) == heatmap).view(-1)[peaks]]
    if top_k is not None and len(peaks) >= top_k:
        values = heatmap.view(-1)[peaks]
        peaks = peaks[values > values.topk(top_k).values[-1]]
    return torch.stack([peaks // heatmap.shape[1], peaks % heatmap.shape[1]], 1)


SPARSE = 2
"""Up to this many look-ups a pixel, windows are read around the candidates only instead of pooling the map."""


def _highest_in_window(heatmap: Tensor, pixels: Tensor, reach: int) -> Tensor:
    """Those of `pixels` (int64 [P], flat) that no pixel within `reach` rows and columns exceeds."""
    height, width = heatmap.shape
    window = torch.arange(-reach, reach + 1, device=pixels.device)
    kept = [pixels[:0]]
    for part in pixels.split(max(1, _budget(pixels.device) // len(window) ** 2)):
        # clamped to the map: a border pixel is in the window anyway
        rows = (part[:, None] // width + window).clamp_(0, height - 1) * width
        columns = (part[:, None] % width + window).clamp_(0, width - 1)
        index = rows[:, :, None] + columns[:, None, :]
        highest = heatmap.view(-1).index_select(0, index.view(-1)).view(index.shape).amax((1, 2))
        kept.append(part[heatmap.view(-1)[part] == highest])
    return torch.cat(kept)


def _pooled(heatmap: Tensor, reach: int) -> Tensor:
    """[H, W], the maximum of each pixel's window."""
    side = 2 * reach + 1
    down = functional.max_pool2d(heatmap[None, None], (side, 1), 1, (reach, 0))
    return functional.max_pool2d(down, (1, side), 1, (0, reach))[0, 0]


def group_pixels(centres: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """The nearest centre of where each pixel points to, Euclidean; the first of equally near ones.

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
    cells = _only_candidates(centres, mask.shape)
    columns = torch.arange(mask.shape[1], device=mask.device)
    for lines in _blocks(mask.shape, mask.device):
        pixels = torch.nonzero(mask[lines].reshape(-1))[:, 0]
        rows = torch.arange(mask.shape[0], device=mask.device)[lines, None]
        y = (offset[0, lines] + rows).reshape(-1).index_select(0, pixels)
        x = (offset[1, lines] + columns).reshape(-1).index_select(0, pixels)
        instances[lines].view(-1).scatter_(0, pixels, _nearest(centres, cells, y, x))
    return instances


def _nearest(centres: Tensor, cells: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """int32 [P], 1 + the index of the centre nearest to each location; compared only where it is open."""
    cell_rows, cell_columns = (
        (position / CELL + 1).int().clamp_(0, size - 1) for position, size in zip((y, x), cells.shape, strict=True)
    )
    nearest = cells.view(-1).index_select(0, cell_rows.mul_(cells.shape[1]).add_(cell_columns))
    open_ones = torch.nonzero(nearest == 0)[:, 0]
    centre_rows, centre_columns = centres.to(y.dtype).unbind(1)
    for part in open_ones.split(max(1, _budget(y.device) // len(centres))):
        distances = (centre_rows - y[part, None]).square_().add_((centre_columns - x[part, None]).square_())
        nearest[part] = distances.argmin(1).int() + 1
    return nearest


def _only_candidates(centres: Tensor, size: Sequence[int]) -> Tensor:
    """Which centre is the nearest from everywhere within each cell of the map.

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
    across = (middles[1][:, None] - columns).square_()
    step = max(1, _budget(centres.device) // across.numel())
    for first in range(0, len(middles[0]), step):
        down = (middles[0][first : first + step, None] - rows).square_()
        distances = down[:, None] + across
        lowest, nearest = distances.min(2, keepdim=True)
        gained = (rows - rows[nearest]).abs_().add_((columns - columns[nearest]).abs_()).mul_(CELL + 2)
        rivals = (distances.sub_(lowest) <= gained).sum(2)  # the nearest is its own, 0 <= 0
        cells[1:-1, 1:-1][first : first + step] = torch.where(rivals == 1, nearest[:, :, 0] + 1, 0)
    return cells


def _blocks(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Runs of lines of an [H, W] map that are handled at once."""
    step = max(1, _budget(device) // max(1, shape[1]))
    return (slice(first, first + step) for first in range(0, shape[0], step))


def _budget(device: torch.device) -> int:
    return BLOCK["cpu" if device.type == "cpu" else "cuda"]


def scored_instances(
    segmentation: Segmentation,
    logits: Tensor,
    heatmap: Tensor,
    categories: Categories,
    score: Score = "both",
    *,
    upsampled: tuple[int, int] | None = None,
    align_corners: bool = False,
) -> Instances:
    """The things of a merged map as scored instances, in the order of its segments.

    Args:
        segmentation: from `merge_centres`.
        logits: float [C, h, w], the semantic logits; they are upsampled where there are things and nowhere else.
        heatmap: float [H, W].
        categories: tell things from stuff.
        score: what ranks an instance.
        upsampled: the size to which the logits are to be upsampled bilinearly; the map is its upper left part. None
            where they have the size of the map.
        align_corners: of the upsampling.
    """
    things = np.flatnonzero(np.array(categories.is_thing, bool)[segmentation.labels])
    labels = segmentation.labels[things]
    number = np.zeros(len(segmentation.labels) + 1, np.int32)
    number[things + 1] = np.arange(1, len(things) + 1)
    instances = torch.from_numpy(number[segmentation.segments]).to(logits.device)
    certainty = _Certainty(logits, upsampled or segmentation.size, align_corners) if score != "instance" else None
    at_centroid, certain = _instance_scores(instances, torch.from_numpy(labels).to(logits.device), certainty, heatmap)
    ranks = {"instance": at_centroid, "semantic": certain, "both": at_centroid * certain}[score]
    masks = encode_segments(segmentation.segments, things + 1)
    boxes = np.zeros((0, 4))
    if masks:
        boxes = rle.toBbox(masks)  # pyright: ignore[reportArgumentType]  (its stub knows one mask only)
        boxes[:, 2:] += boxes[:, :2]
    return Instances(masks, labels, ranks.cpu().numpy().astype(np.float32), boxes.astype(np.float32))


class _Certainty:
    """The probability of a class at some pixels of the upsampled logits, which are never made as a whole."""

    def __init__(self, logits: Tensor, size: tuple[int, int], align_corners: bool) -> None:
        self._table = logits.flatten(1).t().contiguous()  # the classes of a place lie side by side
        self._width = logits.shape[2]
        self._axes = [
            mixed_cells(cells, pixels, None, align_corners, logits.device)
            for cells, pixels in zip(logits.shape[1:], size, strict=True)
        ]
        self.most = max(1, 4 * _budget(logits.device) // len(logits))
        """Pixels at once that bound the memory."""

    def __call__(self, rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        """float [P] of int64 [P] each."""
        (top, bottom, down), (left, right, across) = self._axes
        lines = [(line[rows] * self._width, share) for line, share in ((top, 1 - down[rows]), (bottom, down[rows]))]
        sides = [(side[columns], share) for side, share in ((left, 1 - across[columns]), (right, across[columns]))]
        corners = torch.stack([line + side for line, _ in lines for side, _ in sides], 1)
        shares = torch.stack([a * b for _, a in lines for _, b in sides], 1)
        # gathers and mixes in one pass over the memory
        mixed = functional.embedding_bag(corners, self._table, per_sample_weights=shares, mode="sum")
        return mixed.softmax(1).gather(1, labels[:, None])[:, 0]


def _instance_scores(instances: Tensor, labels: Tensor, certainty: _Certainty | None, heatmap: Tensor) -> Tensor:
    """float64 [2, K], the heatmap at the centroid and the mean certainty (0 where it is None).

    `instances` is int32 [H, W], 0 or 1..K, `labels` int64 [K].
    """
    width = instances.shape[1]
    sums = torch.zeros(4, len(labels) + 1, dtype=torch.float64, device=heatmap.device)  # pixels, rows, columns, p
    pixels = torch.nonzero(instances.view(-1))[:, 0]
    for part in pixels.split(_budget(heatmap.device) if certainty is None else certainty.most):
        owners = instances.view(-1)[part].long()
        rows, columns = torch.div(part, width, rounding_mode="floor"), part % width
        values = [torch.ones_like(part), rows, columns]
        if certainty is not None:
            values.append(certainty(rows, columns, labels[owners - 1]))
        for total, value in zip(sums, values, strict=False):
            total.index_add_(0, owners, value.double())
    areas, rows, columns, probability = sums[:, 1:]
    areas = areas.clamp(min=1)  # a truth may list things without a pixel
    at_centroid = heatmap[(rows / areas).long(), (columns / areas).long()].double()
    return torch.stack([at_centroid, probability / areas])
