"""Targets of Panoptic FCN (Li et al., arXiv 2012.00720): where each kernel is made, and what it must draw.

Things are assigned to the levels of the pyramid by the size of their boxes, most of them to two levels. A level learns
a score map with one Gaussian a thing, and one map a region class; what a kernel draws is a mask at stride 4.
Masks come straight from the int map: a bilinear resize reads four pixels a cell, so they are four scatters
and no mask of image size is ever made. Nothing loops over instances.

Shapes: B images, H x W canvas, N segments, T thing classes, R region classes, M things that a level holds,
P pairs of a thing and its level, h x w a level, y x x the cells of stride 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.models.panoptic_fcn.config import LEVELS, Centre, Regions, StuffPositions
from panoptic.segmentation import IGNORE, Categories, Targets
from panoptic.targets.dense import semantic_map
from panoptic.targets.instances import boxes as segment_boxes
from panoptic.targets.instances import is_instance

STRIDE = 4
"""Stride of the masks."""

PRESENT = 0.5
"""A region covers a cell of a level when it has at least this share of it."""


@dataclass(frozen=True)
class LevelTargets:
    """The targets of one level, of all images."""

    things: Tensor
    """float32 [B, T, h, w], Gaussians combined by maximum."""
    regions: Tensor
    """float32 [B, R, h, w], share of each region class in a cell, 0 below `PRESENT`; or Gaussians, 1 at its centre."""
    image: Tensor
    """int64 [P], the image of each thing of this level, ascending."""
    thing: Tensor
    """int64 [P], the place of each thing among the M masks."""
    label: Tensor
    """int64 [P], the class of each thing among the T."""
    cell: Tensor
    """int64 [P], row * w + column of the centre of each thing."""


@dataclass(frozen=True)
class KernelTargets:
    """The targets of Panoptic FCN."""

    levels: list[LevelTargets]
    """Fine to coarse."""
    masks: Tensor
    """float32 [B, M, y, x], the things that any level holds; rows beyond an image's own are 0."""
    region_masks: Tensor
    """float32 [B, R, y, x], the share of each region class in each cell."""
    segments: Tensor
    """int64 [B, M], the segment (1..N) of each mask, 0 beyond an image's own."""
    regions: list[Tensor]
    """For each level int64 [P, 2], image and region class of the regions that it has, ascending."""
    thing_counts: list[int]
    """Things of each image, summed over the levels."""
    region_counts: list[int]
    """Regions of each image, summed over the levels."""


def region_classes(categories: Categories, regions: Regions) -> tuple[int, ...]:
    """The contiguous class of each region class; `IGNORE` for the one that stands for all things."""
    if regions == "all":
        return tuple(range(len(categories)))
    return (IGNORE, *categories.stuff) if regions == "with_things" else categories.stuff


def kernel_targets(
    targets: Targets,
    categories: Categories,
    *,
    cells: tuple[int, int],
    shapes: Sequence[tuple[int, int]],
    scales: Sequence[tuple[float, float]],
    regions: Regions = "with_things",
    stuff_positions: StuffPositions = "regions",
    centre: Centre = "mass",
    overlap: float = 0.7,
    most: int = 100,
) -> KernelTargets:
    """All targets of Panoptic FCN.

    Crowds are no things here, but belong to the regions. The device is read once.

    Args:
        targets: the batch, on the device of the result.
        categories: tell things from stuff.
        cells: y and x; at stride 4 they cover the canvas.
        shapes: h and w of each level.
        scales: smallest and largest square root of a box's area (pixels) of each level, both included.
        regions: the region classes.
        stuff_positions: where they are.
        centre: where peaks are. A thing that leaves no trace at stride 4 has its box's middle either way.
        overlap: least IoU that a box shifted by the Gaussian's radius keeps (CornerNet).
        most: things of an image on a level; where there are more, the largest boxes stay.
    """
    # the things of each level by size, and one list of all that any level holds
    region_masks = region_cells(targets, categories, regions, cells)
    boxes = segment_boxes(targets)  # [B, N, 4]
    sides = boxes[..., 2:] - boxes[..., :2]
    areas = sides.prod(-1).sqrt()
    instances = is_instance(targets, categories) & (areas > 0)
    held = torch.stack([_largest(instances & (areas >= low) & (areas <= high), areas, most) for low, high in scales])
    used = held.any(0)
    slots = used.cumsum(1) * used
    # the regions of each level: share of each cell
    coverings = []
    for shape in shapes:
        covered = F.interpolate(region_masks, shape, mode="bilinear", align_corners=False).clamp(max=1.0)
        coverings.append(covered.masked_fill(covered < PRESENT, 0.0))
    present = torch.stack([(covered > 0).flatten(2).any(2) for covered in coverings])  # [levels, B, R]
    # every number that a size below follows from, in one read of the device
    numbers = torch.cat([slots.amax()[None], *(part.sum(2).flatten() for part in (held, present))]).tolist()
    things_held, regions_held = _halves(numbers[1:], len(shapes))
    segments = _listed(slots, max(1, numbers[0]))
    regions_of = _places(present, regions_held)
    # their masks at stride 4, from which centres follow
    masks = segment_cells(targets, slots, segments.shape[1], cells)
    middles = mass_centres(masks, boxes.gather(1, _entries(segments, 4)), centre)
    classes = _thing_classes(targets, categories)
    levels = []
    for shape, covered, here, regions_here in zip(
        shapes, coverings, _places(held, things_held), regions_of, strict=True
    ):
        image, entry = here.unbind(1)
        thing = slots[image, entry] - 1
        label = classes[image, entry]
        row, column = _level_cells(middles[image, thing], cells, shape)
        radius = _radii(sides[image, entry], cells, shape, overlap)
        index = image * len(categories.things) + label
        # one plane a thing class of each image
        score = _gaussians(index, row, column, radius, (len(masks) * len(categories.things), *shape))
        if stuff_positions == "centres":
            covered = region_centres(covered, overlap, regions_here)
        score = score.view(len(masks), len(categories.things), *shape)
        levels.append(LevelTargets(score, covered, image, thing, label, row * shape[1] + column))
    counts = [[sum(image) for image in zip(*part, strict=True)] for part in (things_held, regions_held)]
    return KernelTargets(levels, masks, region_masks, segments, regions_of, *counts)


def _halves(numbers: list[int], levels: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two tables of a row a level and a column an image, which stand one behind the other."""
    images = len(numbers) // levels // 2
    rows = [numbers[first : first + images] for first in range(0, len(numbers), images)]
    return rows[:levels], rows[levels:]


def _places(chosen: Tensor, counts: list[list[int]]) -> list[Tensor]:
    """For each level int64 [P, 2], image and entry of each True in bool [levels, B, N]; `counts` has their numbers."""
    sizes = [sum(level) for level in counts]
    return list(torch.nonzero_static(chosen, size=sum(sizes))[:, 1:].split(sizes))


def true_outputs(
    targets: Targets,
    categories: Categories,
    regions: Regions,
    truth: KernelTargets,
    stuff_positions: StuffPositions = "regions",
) -> dict[str, Tensor]:
    """The outputs of Panoptic FCN that the truth can stand for, as `PanopticFCN.truth` describes them."""
    images, most = truth.segments.shape
    cells = torch.full((images, len(LEVELS), most), -1, device=truth.segments.device)
    classes = torch.zeros(images, most, dtype=torch.int64, device=truth.segments.device)
    for place, level in enumerate(truth.levels):
        cells[level.image, place, level.thing] = level.cell
        classes[level.image, level.thing] = level.label
    covered = {
        f"position.{name}": level.regions if stuff_positions == "regions" else at_centres(level.regions)
        for name, level in zip(LEVELS, truth.levels, strict=True)
    }
    numbers = kernel_numbers(targets, categories, regions, truth.segments)
    return {"position.things": cells, **covered, "class": classes, "mask": numbers}


def region_centres(covered: Tensor, overlap: float, present: Tensor | None = None) -> Tensor:
    """float32 [B, R, h, w], one Gaussian for each region that a level has, 1 at the covered cell nearest to the middle.

    The middle is the mean of the cells; of equally near ones the first counts. The radius is that of a thing whose box
    is a square of as many cells.

    Args:
        covered: float [B, R, h, w], above 0 in the cells of a region.
        overlap: of `kernel_targets`.
        present: int64 [P, 2], image and class of the regions that have a cell; else the device is asked for them.
    """
    images, regions, height, width = covered.shape
    inside = covered > 0
    # the middle of each region: the mean row and column of its cells
    count = inside.sum((2, 3))
    rows, columns = (torch.arange(side, device=covered.device) for side in (height, width))
    least = count.clamp(min=1)
    row = (inside.sum(3) * rows).sum(2) / least
    column = (inside.sum(2) * columns).sum(2) / least
    # the middle itself may lie outside of the region, in a hole or between two parts
    distance = (rows[:, None] - row[..., None, None]) ** 2 + (columns - column[..., None, None]) ** 2
    cell = distance.masked_fill(~inside, float("inf")).flatten(2).argmin(2)
    if present is None:
        present = count.nonzero()
    # one plane a region class of each image, drawn only where there is a region
    plane = present[:, 0] * regions + present[:, 1]
    cell, side = cell.flatten()[plane], count.flatten()[plane].float().sqrt()
    radius = gaussian_radius(side, side, overlap).clamp(min=0).long()
    peaks = _gaussians(plane, cell // width, cell % width, radius, (images * regions, height, width))
    return peaks.view_as(covered)


def at_centres(regions: Tensor) -> Tensor:
    """1 at the centres that `region_centres` drew, else 0, of the same shape."""
    return (regions == 1).to(regions.dtype)


def kernel_numbers(targets: Targets, categories: Categories, regions: Regions, segments: Tensor) -> Tensor:
    """The thing or region that draws each pixel, int64 [B, H, W]: 1 + m for thing m, -1 - r for region r, 0 for none.

    Args:
        segments: int64 [B, M], of `KernelTargets`.
    """
    places = torch.arange(1, segments.shape[1] + 1, device=segments.device).expand_as(segments)
    owners = torch.zeros(len(segments), targets.labels.shape[1] + 1, dtype=torch.int64, device=segments.device)
    owners.scatter_(1, segments, places)
    owners[:, 0] = 0
    things = owners.gather(1, targets.segments.flatten(1).long()).view_as(targets.segments)
    return torch.where(things > 0, things, -_region_map(targets, categories, regions))


def region_cells(targets: Targets, categories: Categories, regions: Regions, cells: tuple[int, int]) -> Tensor:
    """float32 [B, R, y, x], the share of each region class in each cell."""
    return _resized(_region_map(targets, categories, regions), len(region_classes(categories, regions)), targets, cells)


def _region_map(targets: Targets, categories: Categories, regions: Regions) -> Tensor:
    """int64 [B, H, W], 1 + the region class of each pixel, 0 for none; crowds belong to their class."""
    table = torch.zeros(len(categories) + 1, dtype=torch.int64)  # the last entry, read by `IGNORE`, is void
    for region, label in enumerate(region_classes(categories, regions)):
        table[list(categories.things) if label == IGNORE else label] = region + 1
    return table.to(targets.segments.device, non_blocking=True)[semantic_map(targets)]


def segment_cells(targets: Targets, slots: Tensor, count: int, cells: tuple[int, int]) -> Tensor:
    """float32 [B, M, y, x], the share of chosen segments in each cell.

    Args:
        slots: int64 [B, N], 1 + the place of each segment among the `count` = M, 0 where it is not chosen.
    """
    table = torch.cat([torch.zeros_like(slots[:, :1]), slots], 1)
    index = targets.segments.flatten(1).long()
    return _resized(table.gather(1, index).view_as(targets.segments), count, targets, cells)


def mass_centres(masks: Tensor, boxes: Tensor, centre: Centre) -> Tensor:
    """float32 [B, M, 2], x and y of each thing in cells of stride 4.

    Args:
        masks: float [B, M, y, x].
        boxes: float [B, M, 4] in pixels, what counts for `centre` "box" and where a mask is empty.
    """
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2 / STRIDE
    if centre == "box":
        return middle
    touched = masks > 0
    by_column, by_row = touched.sum(-2), touched.sum(-1)
    count = by_row.sum(-1)
    x, y = ((line * torch.arange(line.shape[-1], device=line.device)).sum(-1) for line in (by_column, by_row))
    mean = torch.stack([x, y], -1).float() / count.clamp(min=1)[..., None]
    return torch.where(count[..., None] > 0, mean, middle)


def _largest(chosen: Tensor, areas: Tensor, most: int) -> Tensor:
    """bool [B, N], of the chosen at most `most` an image: the largest, the first of equally large ones."""
    if chosen.shape[1] <= most:
        return chosen
    order = torch.where(chosen, areas, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :most]
    return torch.zeros_like(chosen).scatter_(1, order, True) & chosen


def _listed(slots: Tensor, most: int) -> Tensor:
    """int64 [B, M], the segment (1..N) of each slot, 0 for none.

    Args:
        slots: int64 [B, N], 1..M for the segments that are used, else 0.
        most: M.
    """
    numbers = torch.arange(1, slots.shape[1] + 1, device=slots.device).expand_as(slots)
    segments = torch.zeros(len(slots), most + 1, dtype=torch.int64, device=slots.device)
    return segments.scatter_(1, slots, numbers * (slots > 0))[:, 1:]


def _entries(segments: Tensor, width: int) -> Tensor:
    """An index for `gather` along the segments: int64 [B, M, width], 0 where there is none."""
    return (segments - 1).clamp(min=0)[..., None].expand(-1, -1, width)


def _thing_classes(targets: Targets, categories: Categories) -> Tensor:
    """int64 [B, N], the place of each label among the thing classes, 0 where it is none."""
    table = torch.zeros(len(categories) + 1, dtype=torch.int64)
    table[list(categories.things)] = torch.arange(len(categories.things))
    return table.to(targets.labels.device, non_blocking=True)[targets.labels]


def _level_cells(middles: Tensor, cells: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int64 [P] each, row and column on a level of centres [P, 2] (x, y) at stride 4; truncated."""
    x = (middles[:, 0] * (shape[1] / cells[1])).long().clamp(0, shape[1] - 1)
    y = (middles[:, 1] * (shape[0] / cells[0])).long().clamp(0, shape[0] - 1)
    return y, x


def _radii(sides: Tensor, cells: tuple[int, int], shape: tuple[int, int], overlap: float) -> Tensor:
    """int64 [P], the Gaussian's radius on a level for boxes of `sides` [P, 2] (width, height) in pixels."""
    width = sides[:, 0] * (shape[1] / (cells[1] * STRIDE))
    height = sides[:, 1] * (shape[0] / (cells[0] * STRIDE))
    return gaussian_radius(width, height, overlap).clamp(min=0).long()


def gaussian_radius(width: Tensor, height: Tensor, overlap: float) -> Tensor:
    """CornerNet's radius as it was first published: divided by 2 and not by 2a, which the references kept."""
    total, area = width + height, width * height
    quadratics = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * total, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * total, (overlap - 1) * area),
    )
    roots = [(b + torch.sqrt(b**2 - 4 * a * c)) / 2 for a, b, c in quadratics]
    return torch.min(roots[0], torch.min(roots[1], roots[2]))


def _gaussians(index: Tensor, row: Tensor, column: Tensor, radius: Tensor, size: tuple[int, int, int]) -> Tensor:
    """float32 [planes, h, w], one Gaussian a pair in plane `index`, of deviation (2 radius + 1) / 3, within its radius.

    In float64 as published; a window ends where its values are about 0.1.
    """
    planes, height, width = size
    dy = torch.arange(height, device=row.device) - row[:, None]
    dx = torch.arange(width, device=row.device) - column[:, None]
    factor = -0.5 / ((2 * radius + 1).double() / 3) ** 2
    squared = dy[:, :, None] ** 2 + dx[:, None, :] ** 2  # whole numbers
    inside = (dy.abs() <= radius[:, None])[:, :, None] & (dx.abs() <= radius[:, None])[:, None, :]
    values = torch.exp(squared * factor[:, None, None]).float() * inside
    score = torch.zeros(planes, height * width, device=row.device)
    score.scatter_reduce_(0, index[:, None].expand(-1, height * width), values.flatten(1), "amax")
    return score.view(planes, height, width)


def _resized(values: Tensor, count: int, targets: Targets, cells: tuple[int, int]) -> Tensor:
    """float32 [B, count, y, x]: each value's mask, brought from each image to stride 4 and pasted into zeros.

    Bilinear without antialiasing, corners not aligned, to int(side / 4 + 0.5) cells, in torch's order of operations.

    Args:
        values: int64 [B, H, W], 1..count, 0 for none.
    """
    sizes = targets.frame.sizes.to(values.device, non_blocking=True)
    (top, bottom, down), (left, right, across) = (_taps(sizes[:, axis], cells[axis]) for axis in (0, 1))
    flat, width = values.flatten(1), values.shape[2]
    lines = []
    for row in (top, bottom):
        line = torch.zeros(len(values), count + 1, cells[0] * cells[1], device=values.device)
        for column, weight in ((left, across[0]), (right, across[1])):
            index = (row[:, :, None] * width + column[:, None, :]).flatten(1)
            share = weight[:, None, :].expand(-1, cells[0], -1).flatten(1)
            line.scatter_add_(1, flat.gather(1, index)[:, None], share[:, None])
        lines.append(line[:, 1:].view(len(values), count, *cells))
    upper, lower = (weight[:, None, :, None] for weight in down)
    return lines[0] * upper + lines[1] * lower


def _taps(sizes: Tensor, cells: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Along one axis, for images of `sizes` int64 [B]: the two pixels that a cell reads, and their weights.

    Returns:
        int64 [B, cells] twice, and float32 [B, cells] twice; the weights are 0 where a cell lies beyond the image.
    """
    inside = (sizes.float() / STRIDE + 0.5).long().clamp(min=1)[:, None]
    place = torch.arange(cells, device=sizes.device)
    scale = sizes[:, None].float() / inside.float()
    source = (scale * (place + 0.5) - 0.5).clamp(min=0.0)
    first = torch.minimum(source.long(), sizes[:, None] - 1)
    second = torch.minimum(first + 1, sizes[:, None] - 1)
    share = (source - first).clamp(max=1.0)
    valid = place < inside
    return first, second, ((1 - share) * valid, share * valid)
