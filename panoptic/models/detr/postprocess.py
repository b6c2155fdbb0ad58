"""DETR's two post-processors (facebookresearch/detr, models/detr.py and models/segmentation.py).

Panoptic: every pixel goes to the kept query of the highest mask logit; there is no void as long as one is
kept. Queries of one stuff class first share their pixels; then those of few pixels are removed and their
pixels handed out again, until none is left that is too small. Instances: the mask of each query by itself.

Shapes: Q queries, K + 1 logits, n selected queries, h x w their masks, which cover the canvas, H x W the output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.layers.upsampled_argmax import highest
from panoptic.losses import box_corners
from panoptic.models.base import Prediction, Wanted
from panoptic.models.detr.class_space import ClassSpace
from panoptic.rle import encode_masks
from panoptic.segmentation import IGNORE, VOID, Categories, Frame, Instances, Segmentation

CHUNK = 16
"""Masks at canvas resolution that are held at once."""


QueryMasks = Callable[[int, Tensor], Tensor]
"""The mask logits [n, h, w] over the canvas of some queries, int64 [n], of one image."""


class Selection(NamedTuple):
    """The queries of an image that a map or instances are made of."""

    queries: Tensor
    """int64 [n], ascending."""
    labels: Tensor
    """int64 [n], classes."""
    scores: Tensor
    """float [n], their probabilities."""


def postprocess(
    outputs: Mapping[str, Tensor],
    frame: Frame,
    want: Collection[Wanted],
    *,
    classes: ClassSpace,
    categories: Categories,
    query_masks: QueryMasks | None,
    threshold: float = 0.85,
    min_area: int = 4,
    mask_threshold: float = 0.5,
) -> Prediction:
    """Maps, instances and class maps (those of the merged maps), whichever are wanted.

    The mask head runs once an image, for the queries that anything needs.

    Args:
        outputs: "logits" [B, Q, K + 1] and "boxes" [B, Q, 4] of `DETR.network`.
        frame: of the batch.
        want: fields of `Prediction`; proposals are None.
        classes: of the logits.
        categories: tell things from stuff.
        query_masks: of the model; None for one without masks, whose boxes stand for them.
        threshold: queries merge whose class is more probable.
        min_area: merged segments of this many pixels or fewer are removed.
        mask_threshold: the probability above which a pixel belongs to an instance.
    """
    want_maps, want_instances = bool({"maps", "semantics"} & set(want)), "instances" in want
    maps, instances = [], []
    for b in range(len(frame.sizes) if want_maps or want_instances else 0):
        probabilities = outputs["logits"][b].softmax(-1)
        confident = confident_queries(probabilities, classes, threshold) if want_maps else None
        things = thing_queries(probabilities, classes, categories) if want_instances else None
        selections = [selection for selection in (confident, things) if selection is not None]
        masks = None if query_masks is None else _Masks(query_masks, b, selections)
        if confident is not None:
            maps.append(_map(confident, masks, outputs, frame, b, categories, min_area))
        if things is not None:
            instances.append(_instances(things, masks, outputs, frame, b, mask_threshold))
    return Prediction(
        maps=maps if "maps" in want else None,
        instances=instances if want_instances else None,
        semantics=[segmentation.semantic() for segmentation in maps] if "semantics" in want else None,
    )


def confident_queries(probabilities: Tensor, classes: ClassSpace, threshold: float) -> Selection:
    """The queries whose most probable logit stands for a class, at more than the threshold.

    Args:
        probabilities: [Q, K + 1].
        classes: of the logits.
        threshold: a probability.
    """
    scores, best = probabilities.max(-1)
    labels = classes.to_classes(best)
    kept = torch.nonzero((labels != IGNORE) & (scores > threshold))[:, 0]
    return Selection(kept, labels[kept], scores[kept])


def thing_queries(probabilities: Tensor, classes: ClassSpace, categories: Categories) -> Selection:
    """The queries whose most probable class, "no object" left aside, is a thing; no other suppression.

    Args:
        probabilities: [Q, K + 1].
        classes: of the logits.
        categories: tell things from stuff.
    """
    is_thing = torch.tensor([*categories.is_thing, False], device=probabilities.device)
    scores, best = probabilities[:, :-1].max(-1)
    labels = classes.to_classes(best)
    kept = torch.nonzero(is_thing[labels])[:, 0]  # IGNORE, -1, reads the last entry
    return Selection(kept, labels[kept], scores[kept])


class _Masks:
    """The mask logits of all queries of an image that are selected for anything, made once."""

    def __init__(self, query_masks: QueryMasks, image: int, selections: Sequence[Selection]) -> None:
        self._queries = torch.cat([selection.queries for selection in selections]).unique()  # ascending
        self._logits = query_masks(image, self._queries)

    def of(self, queries: Tensor) -> Tensor:
        """The mask logits [n, h, w] of some of these queries, int64 [n]."""
        return self._logits[torch.searchsorted(self._queries, queries)]


def _map(
    selection: Selection,
    masks: _Masks | None,
    outputs: Mapping[str, Tensor],
    frame: Frame,
    image: int,
    categories: Categories,
    min_area: int,
) -> Segmentation:
    """The merged map of an image, from masks or else from boxes."""
    queries, labels, scores = selection
    size, output_size = frame.size(image), frame.output_size(image)
    if masks is None:
        boxes = scaled_boxes(outputs["boxes"][image, queries], output_size)
        return merge_boxes(boxes, labels, scores, categories, output_size)
    view = {"canvas": frame.canvas, "size": size, "output_size": output_size}
    return merge_masks(masks.of(queries), labels, scores, categories, **view, min_area=min_area)


def _instances(
    selection: Selection,
    masks: _Masks | None,
    outputs: Mapping[str, Tensor],
    frame: Frame,
    image: int,
    threshold: float,
) -> Instances:
    """The instances of an image, a few masks at a time."""
    size, output_size = frame.size(image), frame.output_size(image)
    boxes, encoded = scaled_boxes(outputs["boxes"][image, selection.queries], output_size), []
    for queries, part in zip(selection.queries.split(CHUNK), boxes.split(CHUNK), strict=True):
        if not len(queries):
            continue
        if masks is None:
            encoded += encode(box_masks(part, output_size))
        else:
            encoded += encode(binary_masks(masks.of(queries), frame.canvas, size, output_size, threshold))
    labels, scores = selection.labels.cpu().numpy(), selection.scores.float().cpu().numpy()
    return Instances(encoded, labels, scores, boxes.float().cpu().numpy())


def merge_masks(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    categories: Categories,
    *,
    canvas: tuple[int, int],
    size: tuple[int, int],
    output_size: tuple[int, int],
    min_area: int = 4,
) -> Segmentation:
    """The panoptic map of the confident queries (the reference's PostProcessPanoptic).

    Args:
        masks: [n, h, w] logits over the canvas, of any resolution.
        labels: int64 [n], classes.
        scores: float [n].
        categories: tell things from stuff.
        canvas: height and width of the batch tensor.
        size: of the image inside of it.
        output_size: of the map.
        min_area: segments of so many pixels or fewer are removed.

    Returns:
        segments in the order of the queries; all void where none is left.
    """
    void = Segmentation(np.full(output_size, VOID, np.int32), np.zeros(0, np.int64), scores=np.zeros(0, np.float32))
    if not len(masks):
        return void
    # the query of the highest logit in each pixel, at network size
    owners = highest(masks, canvas, size)
    alive = torch.ones(len(masks), dtype=torch.bool, device=masks.device)
    areas = torch.zeros(len(masks), dtype=torch.int64, device=masks.device)
    # duplicates of stuff have no area of their own in the first pass, and so never reach the map
    areas.index_add_(0, _first_of_stuff(labels, categories), _areas(owners, output_size, len(masks)))
    while not (large := areas[alive] > min_area).all():
        alive[alive.clone()] = large
        if not alive.any():
            return void
        # pixels of queries that are gone go to the highest of those that are left; all others keep their owner
        gone = ~alive.index_select(0, owners.view(-1)).view_as(owners)
        index = torch.nonzero(alive)[:, 0].to(owners.dtype)
        others = index.index_select(0, highest(masks[alive], canvas, size, gone).view(-1)).view_as(owners)
        owners = torch.where(gone, others, owners)
        areas = _areas(owners, output_size, len(masks))
    # segments are numbered in the order of the queries that are left
    numbers = alive.cumsum(0, dtype=torch.int32)
    segments = numbers.index_select(0, _resized(owners, output_size).view(-1)).view(output_size)
    labels, scores = labels[alive], scores[alive].float()
    return Segmentation(segments.cpu().numpy(), labels.cpu().numpy(), scores=scores.cpu().numpy())


def _areas(owners: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The number of pixels of each query at that size, int64 [count]."""
    return torch.bincount(_resized(owners, size).view(-1), minlength=count)


def _first_of_stuff(labels: Tensor, categories: Categories) -> Tensor:
    """The first query of the same class for each query of stuff, and each thing itself, int64 [n]."""
    index = torch.arange(len(labels), device=labels.device)
    stuff = ~torch.tensor(categories.is_thing, device=labels.device)[labels]
    same = (labels[:, None] == labels) & stuff
    return torch.where(stuff, same.int().argmax(1), index) if len(labels) else index


def _resized(owners: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [H, W] at another size, by Pillow's nearest neighbour; the tensor itself where it has that size."""
    if tuple(owners.shape) == tuple(size):
        return owners
    rows, columns = (_nearest(*sides).to(owners.device) for sides in zip(owners.shape, size, strict=True))
    return owners.index_select(1, columns).index_select(0, rows)


def _nearest(before: int, after: int) -> Tensor:
    """The positions that Pillow's nearest neighbour takes, which steps by addition, int64 [after]."""
    step = before / after
    positions = np.cumsum(np.concatenate([[step * 0.5], np.full(after - 1, step)]))
    return torch.from_numpy(np.minimum(positions.astype(np.int64), before - 1))


def merge_boxes(
    boxes: Tensor, labels: Tensor, scores: Tensor, categories: Categories, size: tuple[int, int]
) -> Segmentation:
    """A map of filled boxes, the more certain ones in front, for a model without masks.

    Args:
        boxes: [n, 4], x0 y0 x1 y1 in pixels of the map, their last row and column included.
        labels: int64 [n].
        scores: [n].
        categories: tell things from stuff, of which a class has one segment.
        size: height and width of the map.
    """
    segments = np.full(size, VOID, np.int32)
    first = _first_of_stuff(labels, categories).cpu().numpy()
    corners = boxes.round().cpu().numpy()
    for k in np.argsort(scores.float().cpu().numpy(), kind="stable"):
        x0, y0, x1, y1 = (max(int(value), 0) for value in (*corners[k, :2], *(corners[k, 2:] + 1)))
        segments[y0:y1, x0:x1] = first[k] + 1
    return Segmentation(segments, labels.cpu().numpy(), scores=scores.float().cpu().numpy()).compact()


def scaled_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] from centre and size as shares of the image to x0 y0 x1 y1 in pixels of that height and width."""
    height, width = size
    return box_corners(boxes) * boxes.new_tensor([width, height, width, height])


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Filled boxes, as `merge_boxes` paints them, as masks bool [n, H, W]."""
    x0, y0, x1, y1 = boxes.round().T[:, :, None, None]
    rows = torch.arange(size[0], device=boxes.device)[:, None]
    columns = torch.arange(size[1], device=boxes.device)
    return (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)


def binary_masks(
    masks: Tensor, canvas: tuple[int, int], size: tuple[int, int], output_size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Masks of instances, bool [n, H, W], as the reference's PostProcessSegm makes them.

    Logits are resized to the canvas (bilinear) and cut to the image; what is above the threshold is resized to the
    output (nearest neighbour).

    Args:
        masks: [n, h, w] logits over the canvas.
        canvas: height and width of the batch tensor.
        size: of the image inside of it.
        output_size: of the result.
        threshold: a probability.
    """
    if tuple(masks.shape[-2:]) != tuple(canvas):
        masks = F.interpolate(masks[None].float(), size=canvas, mode="bilinear", align_corners=False)[0]
    inside = masks[:, : size[0], : size[1]] > torch.logit(torch.tensor(threshold)).item()
    if tuple(output_size) == tuple(size):
        return inside
    return F.interpolate(inside[None].to(torch.uint8), size=output_size, mode="nearest")[0].bool()


def encode(masks: Tensor) -> list[dict]:
    """COCO RLE of masks bool [n, H, W]."""
    return encode_masks(masks.cpu().numpy())
