"""Boxes and masks of segments, from the segment map and on its device.

Boxes come from the runs of equal pixels within rows, all segments of a batch at once; on a GPU from all pixels, since
the number of runs would have to be asked for. A mask is made only where a loss needs it, at the resolution of that
loss.

Mask targets follow detectron2: RoIAlign (aligned, adaptive) of the 0/1 mask, and at least 1/2.

Shapes: B images, H x W pixels of the canvas, N segments (padded), R regions, S side of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from panoptic.segmentation import IGNORE, Categories, Targets
from panoptic.targets.dense import is_thing

PLANES = 1 << 26
"""Mask pixels that are held as floats at once while targets are cut out of them."""


def boxes(targets: Targets) -> Tensor:
    """The bounding box of each segment, float32 [B, N, 4]: x0 y0 x1 y1, half-open; zeros where it has no pixel."""
    return (_boxes_of_pixels if targets.segments.is_cuda else _boxes_of_runs)(targets)


def _boxes_of_pixels(targets: Targets) -> Tensor:
    """`boxes` without a value that the host has to know: each pixel marks its column and its row of its segment."""
    segments = targets.segments.long()
    images, count = len(segments), targets.labels.shape[1] + 1
    corners = []
    for axis in (2, 1):
        side = segments.shape[axis]
        place = torch.arange(side, device=segments.device).view((1, 1, -1) if axis == 2 else (1, -1, 1))
        seen = torch.zeros(images, count * side, dtype=torch.uint8, device=segments.device)
        seen = seen.scatter_(1, (segments * side + place).flatten(1), 1).view(images, count, side)
        present = seen.amax(2)
        corners.append((seen.argmax(2) * present, (side - seen.flip(2).argmax(2)) * present))
    (left, right), (top, bottom) = corners
    return torch.stack([left, top, right, bottom], 2)[:, 1:].float()  # without void


def _boxes_of_runs(targets: Targets) -> Tensor:
    """`boxes` from where the runs begin, a small part of all pixels: three to eight times as fast on a CPU."""
    segments = targets.segments
    images, height, width = segments.shape
    count = targets.labels.shape[1] + 1
    # a run begins at the first pixel of a row and wherever a pixel differs from the one before it
    begins = torch.ones(segments.shape, dtype=torch.bool, device=segments.device)
    torch.ne(segments[:, :, 1:], segments[:, :, :-1], out=begins[:, :, 1:])
    starts = begins.view(-1).nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_full((1,), segments.numel())])
    # the box of each run, filed under its segment (entry 0 is void) among those of all images
    rows, columns = starts // width, starts % width
    entry = segments.view(-1)[starts] + rows // height * count
    low, high = torch.stack([columns, rows % height]), torch.stack([columns + ends - starts, rows % height + 1])
    entry = entry.long().expand(2, -1)
    # the least corner and the largest of each segment's runs
    first = torch.full((2, images * count), max(height, width), device=segments.device)
    first.scatter_reduce_(1, entry, low, "amin")
    last = torch.zeros_like(first).scatter_reduce_(1, entry, high, "amax")
    corners = torch.cat([first.masked_fill_(last == 0, 0), last]).T.view(images, count, 4)
    return corners[:, 1:].float()  # without void


def is_instance(targets: Targets, categories: Categories) -> Tensor:
    """The things that are no crowd, bool [B, N]: what detectors learn. Those without a pixel have empty `boxes`."""
    return is_thing(targets, categories) & ~targets.crowd


def visible_instances(targets: Targets, categories: Categories) -> tuple[Tensor, Tensor]:
    """The things to detect: `is_instance`, bool [B, N], without those that have no pixel; and the `boxes` of all."""
    outlines = boxes(targets)
    return is_instance(targets, categories) & (outlines[:, :, 2] > outlines[:, :, 0]), outlines


def instance_lists(targets: Targets, categories: Categories) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The things to detect, image by image: crowds and segments without a pixel are left out.

    The device is read once where the host does not know `targets.countable`.

    Args:
        targets: of B images.
        categories: of the dataset.

    Returns:
        for each image their entries int64 [n] (segment k has entry k - 1), boxes float32 [n, 4] and
        classes int64 [n], which count the things only: class k is `categories.things[k]`.
    """
    shown, outlines = visible_instances(targets, categories)
    table = torch.full((len(categories) + 1,), IGNORE)
    table[list(categories.things)] = torch.arange(len(categories.things))
    classes = table.to(targets.labels.device, non_blocking=True)[targets.labels]
    if targets.countable is None:
        counts = shown.sum(1).tolist()
    else:
        counts = np.isin(targets.countable.numpy(), categories.things).sum(1).tolist()
    entries = torch.nonzero_static(shown, size=sum(counts))[:, 1].split(counts)
    return (
        list(entries),
        [outlines[b, chosen] for b, chosen in enumerate(entries)],
        [classes[b, chosen] for b, chosen in enumerate(entries)],
    )


def masks(targets: Targets, image: int, entries: Tensor) -> Tensor:
    """The masks of some segments of an image, bool [n, H, W].

    Args:
        image: its number within the batch.
        entries: int64 [n]; segment k has entry k - 1.
    """
    return targets.segments[image] == (entries + 1)[:, None, None]


def mask_targets(masks: Tensor, boxes: Tensor, owners: Tensor, side: int) -> Tensor:
    """The part of each mask that lies within a box, at the resolution of a mask head.

    Args:
        masks: bool or float [n, H, W].
        boxes: float [R, 4] in pixels of the masks.
        owners: int64 [R], the mask that each box is of.
        side: S.

    Returns:
        float32 [R, S, S], the share of each cell that the mask covers; detectron2 trains on those of at
        least 1/2.
    """
    from torchvision.ops import roi_align  # torchvision takes seconds, and most processes need nothing of it

    regions = torch.cat([owners[:, None].to(boxes.dtype), boxes], 1)
    return roi_align(masks.to(boxes.dtype)[:, None], regions, side, 1.0, 0, True)[:, 0]


def region_masks(
    targets: Targets, entries: Sequence[Tensor], regions: Sequence[Tensor], owners: Sequence[Tensor], side: int
) -> Tensor:
    """`mask_targets` of a batch, in bounded memory, only of the segments that own a region.

    Args:
        targets: of B images.
        entries: for each image int64 [n], of `instance_lists`.
        regions: for each image float [R, 4].
        owners: for each image int64 [R], indices into `entries`.
        side: S.

    Returns:
        float32 [sum of R, S, S].
    """
    height, width = targets.frame.canvas
    step = max(1, PLANES // (height * width))
    cut = [torch.zeros(0, side, side, device=targets.segments.device)]
    for image, (listed, boxes, owner) in enumerate(zip(entries, regions, owners, strict=True)):
        if boxes.is_cuda and 0 < len(listed) <= step:  # the planes of all cost less there than asking which are used
            cut.append(mask_targets(masks(targets, image, listed), boxes, owner, side))
            continue
        # each mask once, though many regions may have it; so many masks at a time as memory allows
        used, place = owner.unique(return_inverse=True)
        shares = boxes.new_zeros(len(boxes), side, side)
        for first in range(0, len(used), step):
            inside = ((place >= first) & (place < first + step)).nonzero()[:, 0]
            planes = masks(targets, image, listed[used[first : first + step]])
            shares[inside] = mask_targets(planes, boxes[inside], place[inside] - first, side)
        cut.append(shares)
    return torch.cat(cut)
