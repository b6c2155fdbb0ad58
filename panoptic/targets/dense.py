"""Dense targets from the segment map, on the device of the map.

Everything that depends on a pixel only through its segment is a table of N + 1 entries looked up by
the map; everything that depends on a pixel's segment and its row (or column) is a table of rows (or
columns) by segments. So no mask of a segment is ever made, and there is no loop over segments.
On the GPU nothing waits for the host.

Targets of Panoptic-DeepLab: Cheng et al., "Panoptic-DeepLab", arXiv 1911.10194; the details follow
the two published implementations (bowenc0221/panoptic-deeplab and detectron2's project), which differ
in how they round a centre.

Shapes: B images, H x W pixels of the canvas, N segments (padded), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from panoptic.segmentation import IGNORE, Categories, Targets

Rounding = Literal["truncate", "half_even"]
"""The rule by which a float centroid becomes the pixel of its heatmap peak."""

CACHED = 1 << 17
"""Pixels handled at once on the CPU, so that intermediate values stay in the cache."""


@dataclass(frozen=True)
class SegmentMoments:
    """Area and centroid of every segment."""

    areas: Tensor
    """int64 [B, N], 0 where a segment has no pixel."""
    rows: Tensor
    """float64 [B, N], mean row; NaN where the area is 0."""
    columns: Tensor
    """float64 [B, N], mean column; NaN where the area is 0."""


@dataclass(frozen=True)
class CentreTargets:
    """Panoptic-DeepLab's targets, at canvas resolution, with a weight for each pixel of each loss."""

    semantic: Tensor
    """int64 [B, H, W], the class of each pixel, `IGNORE` where void or padding."""
    semantic_weights: Tensor
    """float32 [B, H, W], `small_weight` on small things, else 1."""
    foreground: Tensor
    """bool [B, H, W], pixels of things, crowds included."""
    centre: Tensor
    """float32 [B, 1, H, W], the Gaussians of all things, combined by maximum."""
    centre_weights: Tensor
    """float32 [B, 1, H, W], 1 on segments that are no crowd, 0 on crowd, void and padding."""
    offset: Tensor
    """float32 [B, 2, H, W], (dy, dx) in pixels from each thing pixel to its centroid, 0 elsewhere."""
    offset_weights: Tensor
    """float32 [B, 1, H, W], 1 on things that are no crowd."""


def centre_targets(
    targets: Targets,
    categories: Categories,
    *,
    sigma: int = 8,
    rounding: Rounding = "truncate",
    small_area: int = 4096,
    small_weight: float = 3.0,
    ignore_crowd: bool = False,
    stuff_offsets: bool = False,
) -> CentreTargets:
    """All targets of Panoptic-DeepLab at canvas resolution.

    Args:
        targets: the batch, on the device of the result.
        categories: tell things from stuff.
        sigma: standard deviation of the Gaussians in pixels; their windows have (6 sigma + 3)^2 pixels.
        rounding: "truncate" (bowenc0221) or "half_even" (detectron2).
        small_area: things with strictly fewer pixels are small.
        small_weight: the semantic weight of small things (crowds too).
        ignore_crowd: crowds are `IGNORE` in the semantic map instead of their class.
        stuff_offsets: stuff pixels count in the offset loss too, with target 0.
    """
    moments = segment_moments(targets)
    shape, device = targets.segments.shape, targets.segments.device
    kinds = (torch.int64, torch.float32, torch.bool, torch.float32, torch.float32)
    # one block for all planes: the C library would give several back to the kernel and page them in at every call
    *planes, heatmap, offset = _uninitialised(
        device,
        *((shape, kind) for kind in kinds),
        ((math.prod(shape) + 1,), torch.float32),
        ((2, *shape), torch.float32),
    )
    semantic, weights, foreground, centre_weights, offset_weights = _look_up(
        targets,
        _classes(targets, ignore_crowd),
        _small_thing_weights(targets, categories, moments.areas, small_area, small_weight),
        _with_void(is_thing(targets, categories), False),
        _counted(targets),
        _counted(targets) if stuff_offsets else _counted(targets) * _with_void(is_thing(targets, categories), 0),
        planes=planes,
    )
    return CentreTargets(
        semantic=semantic,
        semantic_weights=weights,
        foreground=foreground,
        centre=centre_heatmap(targets, categories, moments, sigma, rounding, heatmap),
        centre_weights=centre_weights[:, None],
        offset=centre_offsets(targets, categories, moments, offset),
        offset_weights=offset_weights[:, None],
    )


def semantic_map(targets: Targets, ignore_crowd: bool = False) -> Tensor:
    """The class of each pixel, int64 [B, H, W]; `IGNORE` where void or padding (and on crowds if asked)."""
    return _look_up(targets, _classes(targets, ignore_crowd))[0]


def class_logits(targets: Targets, categories: Categories, value: float) -> Tensor:
    """Logits [B, C, H, W] of the true class of each pixel: `value`, 0 for all others; void is the first class of stuff.

    Args:
        targets: the batch.
        categories: of the C classes; the first thing stands for void where there is no stuff.
        value: a logit.
    """
    semantic = semantic_map(targets)
    void = (categories.stuff or categories.things)[0]
    classes = torch.where(semantic == IGNORE, void, semantic)[:, None]
    logits = torch.zeros(len(classes), len(categories), *targets.frame.canvas, device=classes.device)
    return logits.scatter_(1, classes, value)


def thing_mask(targets: Targets, categories: Categories) -> Tensor:
    """The pixels of things, bool [B, H, W], crowds included."""
    return _look_up(targets, _with_void(is_thing(targets, categories), False))[0]


def is_thing(targets: Targets, categories: Categories) -> Tensor:
    """The segments of thing classes, bool [B, N], crowds included."""
    table = torch.tensor([*categories.is_thing, False]).to(targets.labels.device, non_blocking=True)
    return table[targets.labels]  # IGNORE, -1, reads the last entry


def _classes(targets: Targets, ignore_crowd: bool) -> Tensor:
    """The class that each segment has in the semantic map, int64 [B, N + 1]."""
    labels = targets.labels.masked_fill(targets.crowd, IGNORE) if ignore_crowd else targets.labels
    return _with_void(labels, IGNORE)


def _small_thing_weights(
    targets: Targets, categories: Categories, areas: Tensor, small_area: int, small_weight: float
) -> Tensor:
    """The semantic weight of each segment, float32 [B, N + 1]; crowds can be small things too."""
    small = is_thing(targets, categories) & (areas < small_area)
    return _with_void(torch.where(small, small_weight, 1.0), 1.0)


def _counted(targets: Targets) -> Tensor:
    """The weight of each segment, float32 [B, N + 1]: 1 where it is no crowd, 0 for crowds and void."""
    return _with_void(((targets.labels != IGNORE) & ~targets.crowd).float(), 0.0)


def centres(targets: Targets, categories: Categories) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids of the things, crowds included.

    Returns:
        rows and columns float64 [B, N], NaN where a segment is stuff or has no pixel, and areas int64
        [B, N] of all segments.
    """
    moments = segment_moments(targets)
    other = ~is_thing(targets, categories)
    return moments.rows.masked_fill(other, torch.nan), moments.columns.masked_fill(other, torch.nan), moments.areas


def segment_moments(targets: Targets) -> SegmentMoments:
    """Areas and centroids of all segments, exact: whole-number sums, one division in float64."""
    on_cpu = targets.segments.device.type == "cpu"
    sums = _sums_by_runs(targets) if on_cpu else _sums_by_histogram(targets)
    areas, rows, columns = sums[:, :, 1:]
    return SegmentMoments(areas, rows.double() / areas, columns.double() / areas)


def _sums_by_histogram(targets: Targets) -> Tensor:
    """Pixels, sum of rows and sum of columns of each segment, int64 [3, B, N + 1], without waiting for the host."""
    segments = targets.segments
    count = targets.labels.shape[1] + 1
    images, height, width = segments.shape
    image, rows, columns = (torch.arange(size, device=segments.device) for size in segments.shape)
    # pixels of each segment in each row, and in each column: spread so that threads rarely add to one counter
    by_row = _histogram(segments + ((image[:, None] * height + rows) * count)[:, :, None], (images, height, count))
    by_column = _histogram(segments + (image[:, None] * width + columns)[:, None] * count, (images, width, count))
    # weighted by the coordinate
    row_sums, column_sums = (by_row * rows[:, None]).sum(1), (by_column * columns[:, None]).sum(1)
    return torch.stack([by_row.sum(1), row_sums, column_sums])


def _sums_by_runs(targets: Targets) -> Tensor:
    """`_sums_by_histogram` on the CPU, from runs of equal pixels within a row: some 25 times fewer than pixels."""
    images, height, width = targets.segments.shape
    count = targets.labels.shape[1] + 1
    flat = targets.segments.numpy().reshape(-1)
    # a run begins where a pixel differs from the one before it, and at every row
    first = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=first[1:])
    first[::width] = True
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=flat.size)
    # row within the batch, column and image of the first pixel of each run
    lines = starts // width
    columns = starts - lines * width
    image = lines // height
    # a run of length n from column c adds n pixels, n times its row, and c + (c + 1) + ... of n terms
    entries = flat[starts] + image * count
    weights = (lengths, lengths * (lines - image * height), lengths * columns + lengths * (lengths - 1) // 2)
    sums = [np.bincount(entries, w, images * count) for w in weights]  # float64, exact below 2^53
    return torch.from_numpy(np.stack(sums)).long().view(3, images, count)


def centre_heatmap(
    targets: Targets,
    categories: Categories,
    moments: SegmentMoments,
    sigma: int = 8,
    rounding: Rounding = "truncate",
    heatmap: Tensor | None = None,
) -> Tensor:
    """The centre heatmap, float32 [B, 1, H, W]: a Gaussian window at every thing's centre, combined by maximum.

    The window is a fixed square of 6 sigma + 3 pixels a side, clipped to the image, not to the instance.

    Args:
        moments: of all segments.
        heatmap: memory for the result, float32 [B * H * W + 1].
    """
    images, height, width = targets.segments.shape
    device = targets.segments.device
    outside = images * height * width  # one spare entry takes what falls off the image
    present = (is_thing(targets, categories) & (moments.areas > 0))[:, :, None]
    sizes = targets.frame.sizes.to(device, non_blocking=True)[:, :, None, None]
    image = torch.arange(images, device=device)[:, None, None]
    window = torch.arange(-3 * sigma - 1, 3 * sigma + 2, device=device)

    # for each segment the flat index of its window's first pixel a row, and the columns; off the image: the spare entry
    rows = _pixel(moments.rows, rounding)[:, :, None] + window
    rows = torch.where(present & (rows >= 0) & (rows < sizes[:, 0]), (image * height + rows) * width, outside)
    columns = _pixel(moments.columns, rounding)[:, :, None] + window
    columns = torch.where((columns >= 0) & (columns < sizes[:, 1]), columns, outside)
    index = (rows[:, :, :, None] + columns[:, :, None, :]).clamp_(max=outside)

    # the Gaussian of one window, in float64 as published, written at all of them
    squared = (window[:, None] ** 2 + window**2).double()
    gaussian = torch.exp(squared / (-2 * sigma**2)).float().expand(index.shape)
    if heatmap is None:
        (heatmap,) = _uninitialised(device, ((outside + 1,), torch.float32))
    heatmap.zero_()
    heatmap.scatter_reduce_(0, index.view(-1), gaussian.reshape(-1), "amax")
    return heatmap[:outside].view(images, 1, height, width)


def _pixel(positions: Tensor, rounding: Rounding) -> Tensor:
    """int64, the pixel of a float position; 0 for NaN."""
    snapped = positions.round() if rounding == "half_even" else positions.trunc()
    return snapped.nan_to_num(0.0).long()


def centre_offsets(
    targets: Targets, categories: Categories, moments: SegmentMoments, offset: Tensor | None = None
) -> Tensor:
    """The centre offsets, float32 [B, 2, H, W]: (dy, dx) from each thing pixel to its float centroid; 0 elsewhere.

    Args:
        moments: of all segments.
        offset: memory for the result, float32 [2, B, H, W].
    """
    segments = targets.segments
    count = targets.labels.shape[1] + 1
    present = is_thing(targets, categories) & (moments.areas > 0)
    # dy depends on segment and row alone, dx on segment and column: two small tables
    by_row = _distances(moments.rows, present, segments.shape[1]).transpose(1, 2).contiguous()
    by_column = _distances(moments.columns, present, segments.shape[2])
    if offset is None:
        (offset,) = _uninitialised(segments.device, ((2, *segments.shape), torch.float32))
    images, height, width = segments.shape
    # looked up pixel by pixel, a few rows at a time on the CPU
    rows = torch.arange(0, height * count, count, dtype=torch.int32, device=segments.device)[:, None]
    columns = torch.arange(width, dtype=torch.int32, device=segments.device)
    step = max(1, CACHED // width) if segments.device.type == "cpu" else height
    for image in range(images):
        for first in range(0, height, step):
            lines = slice(first, first + step)
            part, (dy, dx) = segments[image, lines], offset[:, image, lines]
            index = (part + rows[lines]).view(-1)
            torch.index_select(by_row[image].view(-1), 0, index, out=dy.view(-1))
            index = torch.add(columns, part, alpha=width).view(-1)
            torch.index_select(by_column[image].view(-1), 0, index, out=dx.view(-1))
    return offset.transpose(0, 1)


def _distances(centre: Tensor, present: Tensor, size: int) -> Tensor:
    """Centre minus position along one axis, float32 [B, N + 1, size]; 0 for void and segments that are not present.

    The difference is taken in float64, as published.
    """
    positions = torch.arange(size, device=centre.device)
    return _with_void(torch.where(present[:, :, None], centre[:, :, None] - positions, 0.0).float(), 0.0)


def _with_void(table: Tensor, value: float) -> Tensor:
    """The table [B, N, ...] with the entry of segment 0 (void) in front: [B, N + 1, ...]."""
    return torch.cat([torch.full_like(table[:, :1], value), table], 1)


def _look_up(targets: Targets, *tables: Tensor, planes: Sequence[Tensor] = ()) -> list[Tensor]:
    """The entry of each table for the segment of each pixel, [B, H, W].

    Args:
        tables: [B, N + 1] each, entry 0 for void.
        planes: memory for the results, of the tables' types.
    """
    segments = targets.segments
    index = segments
    if len(segments) > 1:  # the tables of all images one after the other
        steps = torch.arange(len(segments), dtype=torch.int32, device=segments.device) * tables[0].shape[1]
        index = segments + steps[:, None, None]
    results = list(planes) or _uninitialised(segments.device, *((segments.shape, table.dtype) for table in tables))
    for table, plane in zip(tables, results, strict=True):
        torch.index_select(table.view(-1), 0, index.reshape(-1), out=plane.view(-1))
    return results


def _histogram(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The number of times that each value of `index` (int64, any shape) occurs, int64, as a tensor of `shape`."""
    ones = torch.ones((), dtype=torch.int64, device=index.device).expand(index.numel())
    zeros = torch.zeros(math.prod(shape), dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index.view(-1), ones).view(shape)


def _uninitialised(device: torch.device, *kinds: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """Tensors of these shapes and types, on the CPU all in one block of NumPy's memory.

    NumPy asks the kernel for huge pages from 4 MB on; torch's planes come in small ones, and touching
    60 MB of those for the first time took longer than all the arithmetic here.
    """
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    spans = [-(-size // 64) * 64 for size in sizes]  # every tensor begins at a cache line
    pieces = torch.from_numpy(np.empty(sum(spans), np.uint8)).split(spans)
    return [
        piece[:size].view(dtype).view(shape) for piece, size, (shape, dtype) in zip(pieces, sizes, kinds, strict=True)
    ]
