"""Dense targets from the segment map, on the device of the map.

Everything that depends on a pixel only through its segment is a table of N + 1 entries looked up by
the map; everything that depends on a pixel's segment and its row (or column) is a table of rows (or
columns) by segments. So no mask of a segment is ever made, and there is no loop over segments.

Targets of Panoptic-DeepLab: Cheng et al., "Panoptic-DeepLab", arXiv 1911.10194; the details follow
the two published implementations (bowenc0221/panoptic-deeplab and detectron2's project), which differ
in how they round a centre.

Shapes: B images, H x W pixels of the canvas, N segments (padded), C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from panoptic.segmentation import IGNORE, Categories, Targets

Rounding = Literal["truncate", "half_even"]
"""How a float centroid becomes the pixel of its heatmap peak."""


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
    """What Panoptic-DeepLab is trained against."""

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
        targets: the batch, on the device where the result is wanted.
        categories: tell things from stuff.
        sigma: of the Gaussians, in pixels; the window is (6 sigma + 3)^2.
        rounding: "truncate" (bowenc0221) or "half_even" (detectron2).
        small_area: things with strictly fewer pixels are small.
        small_weight: the semantic weight of small things (crowds too).
        ignore_crowd: crowds are `IGNORE` in the semantic map instead of their class.
        stuff_offsets: stuff pixels count in the offset loss too, with target 0.
    """
    moments = centroids(targets)
    return CentreTargets(
        semantic=semantic_map(targets, ignore_crowd=ignore_crowd),
        semantic_weights=semantic_weights(targets, categories, moments.areas, small_area, small_weight),
        foreground=thing_mask(targets, categories),
        centre=centre_heatmap(targets, categories, moments, sigma, rounding),
        centre_weights=centre_weights(targets),
        offset=centre_offsets(targets, categories, moments),
        offset_weights=offset_weights(targets, categories, stuff_offsets),
    )


def semantic_map(targets: Targets, ignore_crowd: bool = False) -> Tensor:
    """int64 [B, H, W], the class of each pixel; `IGNORE` where void or padding (and on crowds if asked)."""
    labels = targets.labels.masked_fill(targets.crowd, IGNORE) if ignore_crowd else targets.labels
    return _look_up(targets.segments, labels, IGNORE)


def is_thing(targets: Targets, categories: Categories) -> Tensor:
    """bool [B, N], the segments of thing classes, crowds included."""
    table = torch.tensor([*categories.is_thing, False], device=targets.labels.device)
    return table[targets.labels]  # IGNORE, -1, reads the last entry


def thing_mask(targets: Targets, categories: Categories) -> Tensor:
    """bool [B, H, W], pixels of things, crowds included."""
    return _look_up(targets.segments, is_thing(targets, categories), False)


def semantic_weights(
    targets: Targets, categories: Categories, areas: Tensor, small_area: int = 4096, small_weight: float = 3.0
) -> Tensor:
    """float32 [B, H, W]: `small_weight` on things (crowds too) of fewer than `small_area` pixels, else 1."""
    small = is_thing(targets, categories) & (areas < small_area)
    return _look_up(targets.segments, torch.where(small, small_weight, 1.0), 1.0)


def centre_weights(targets: Targets) -> Tensor:
    """float32 [B, 1, H, W]: 1 on things and stuff that are no crowd, 0 on crowd, void and padding."""
    counted = (targets.labels != IGNORE) & ~targets.crowd
    return _look_up(targets.segments, counted.float(), 0.0)[:, None]


def offset_weights(targets: Targets, categories: Categories, stuff_offsets: bool = False) -> Tensor:
    """float32 [B, 1, H, W]: 1 on things that are no crowd (and on stuff if asked), 0 elsewhere."""
    counted = (targets.labels != IGNORE) if stuff_offsets else is_thing(targets, categories)
    return _look_up(targets.segments, (counted & ~targets.crowd).float(), 0.0)[:, None]


def centroids(targets: Targets) -> SegmentMoments:
    """Areas and centroids of all segments, exact: integer sums, one division in float64."""
    count = targets.labels.shape[1] + 1
    segments = targets.segments
    by_row = _histogram(_row_index(segments, count), (*segments.shape[:2], count))
    by_column = _histogram(_column_index(segments, count), (segments.shape[0], count, segments.shape[2]))
    rows = torch.arange(segments.shape[1], device=segments.device)
    columns = torch.arange(segments.shape[2], device=segments.device)
    areas = by_row.sum(1)
    row_sums = (by_row * rows[:, None]).sum(1)
    column_sums = (by_column * columns).sum(2)
    return SegmentMoments(
        areas[:, 1:], (row_sums.double() / areas)[:, 1:], (column_sums.double() / areas)[:, 1:]
    )


def centres(targets: Targets, categories: Categories) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids of the things, crowds included.

    Returns:
        rows and columns float64 [B, N], NaN where a segment is stuff or has no pixel, and areas int64
        [B, N] of all segments.
    """
    moments = centroids(targets)
    other = ~is_thing(targets, categories)
    return moments.rows.masked_fill(other, torch.nan), moments.columns.masked_fill(other, torch.nan), moments.areas


def centre_heatmap(
    targets: Targets, categories: Categories, moments: SegmentMoments, sigma: int = 8, rounding: Rounding = "truncate"
) -> Tensor:
    """float32 [B, 1, H, W], one Gaussian window at every thing's centre, combined by maximum.

    The window is the fixed square of 6 sigma + 3 pixels, clipped to the canvas, not to the instance.
    """
    images, height, width = targets.segments.shape
    device = targets.segments.device
    present = is_thing(targets, categories) & (moments.areas > 0)
    snap = torch.round if rounding == "half_even" else torch.trunc
    rows, columns = (snap(x.nan_to_num(0.0)).long() for x in (moments.rows, moments.columns))
    reach = 3 * sigma + 1
    window = torch.arange(-reach, reach + 1, device=device)
    rows = rows[:, :, None, None] + window[:, None]
    columns = columns[:, :, None, None] + window
    inside = present[:, :, None, None] & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    image = torch.arange(images, device=device)[:, None, None, None]
    spare = images * height * width
    index = torch.where(inside, (image * height + rows) * width + columns, spare)
    squared = (window[:, None] ** 2 + window**2).double()
    gaussian = torch.exp(-squared / (2 * sigma**2)).float().expand(index.shape)
    heatmap = torch.zeros(spare + 1, device=device)
    heatmap.scatter_reduce_(0, index.reshape(-1), gaussian.reshape(-1), "amax")
    return heatmap[:spare].view(images, 1, height, width)


def centre_offsets(targets: Targets, categories: Categories, moments: SegmentMoments) -> Tensor:
    """float32 [B, 2, H, W], (dy, dx) from each thing pixel to its float centroid; 0 elsewhere."""
    segments = targets.segments
    images, height, width = segments.shape
    count = targets.labels.shape[1] + 1
    present = is_thing(targets, categories) & (moments.areas > 0)
    offset = torch.empty(2, images, height, width, device=segments.device)
    rows = torch.arange(height, device=segments.device)
    columns = torch.arange(width, device=segments.device)
    by_row = _with_void(_difference(moments.rows, present, rows), 0.0).transpose(1, 2)
    by_column = _with_void(_difference(moments.columns, present, columns), 0.0)
    for plane, table, index in (
        (offset[0], by_row, _row_index(segments, count)),
        (offset[1], by_column, _column_index(segments, count)),
    ):
        torch.index_select(table.reshape(-1), 0, index.view(-1), out=plane.view(-1))
    return offset.transpose(0, 1)


def _difference(centre: Tensor, present: Tensor, positions: Tensor) -> Tensor:
    """float32 [B, N, P]: centre minus position, subtracted in float64 as the references do; 0 where not present."""
    return torch.where(present[:, :, None], centre[:, :, None] - positions, 0.0).float()


def _with_void(table: Tensor, value: float) -> Tensor:
    """[B, N, ...] to [B, N + 1, ...] with the entry of segment 0 in front."""
    void = torch.full_like(table[:, :1], value)
    return torch.cat([void, table], 1)


def _look_up(segments: Tensor, table: Tensor, void: float) -> Tensor:
    """[B, H, W]: the entry of `table` [B, N] of each pixel's segment, `void` for segment 0."""
    table = _with_void(table, void)
    index = segments
    if len(segments) > 1:
        index = segments + _steps(segments, table.shape[1])
    return table.reshape(-1).index_select(0, index.reshape(-1)).view(segments.shape)


def _steps(segments: Tensor, step: int) -> Tensor:
    """int32 [B, 1, 1]: `step` times the image's number."""
    return (torch.arange(len(segments), dtype=torch.int32, device=segments.device) * step)[:, None, None]


def _row_index(segments: Tensor, count: int) -> Tensor:
    """int32 [B, H, W]: where (image, row, segment) stands in a [B, H, count] table."""
    images, height, _ = segments.shape
    rows = torch.arange(images * height, dtype=torch.int32, device=segments.device).view(images, height, 1)
    return segments + rows * count


def _column_index(segments: Tensor, count: int) -> Tensor:
    """int32 [B, H, W]: where (image, segment, column) stands in a [B, count, W] table."""
    width = segments.shape[2]
    columns = torch.arange(width, dtype=torch.int32, device=segments.device)
    return segments * width + (columns + _steps(segments, count * width))


def _histogram(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """int64 counts of `index` as a tensor of `shape`. On the GPU without waiting for the host."""
    size = torch.Size(shape).numel()
    if index.device.type == "cpu":
        return torch.bincount(index.view(-1), minlength=size).view(shape)
    index = index.view(-1).long()
    ones = torch.ones((), dtype=torch.int64, device=index.device).expand_as(index)
    return torch.zeros(size, dtype=torch.int64, device=index.device).scatter_add_(0, index, ones).view(shape)
