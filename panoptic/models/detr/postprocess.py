"""DETR's two post-processors (facebookresearch/detr, models/segmentation.py), of one image.

Panoptic: every pixel goes to the kept query of the highest mask logit; there is no void as long as one is
kept. Queries of one stuff class first share their pixels; then those of few pixels are removed and their
pixels handed out again, until none is left that is too small. Instances: the mask of each query by itself.

Shapes: K kept queries, h x w their masks, which cover the canvas, H x W the image inside of it.
"""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional

from panoptic.layers.upsampled_argmax import highest
from panoptic.segmentation import VOID, Categories, Segmentation


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
    """The panoptic map of the kept queries.

    Args:
        masks: [K, h, w] logits over the canvas, of any resolution.
        labels: int64 [K], classes.
        scores: float [K].
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
    owners = highest(masks, canvas, size)
    alive = torch.ones(len(masks), dtype=torch.bool, device=masks.device)
    areas = torch.zeros(len(masks), dtype=torch.int64, device=masks.device)
    # duplicates of stuff have no area of their own in the first pass, and so never reach the map
    areas.index_add_(0, _first_of_stuff(labels, categories), _areas(owners, output_size, len(masks)))
    while not (large := areas[alive] > min_area).all():
        alive[alive.clone()] = large
        if not alive.any():
            return void
        gone = ~alive.index_select(0, owners.view(-1)).view_as(owners)
        index = torch.nonzero(alive)[:, 0].to(owners.dtype)
        others = index.index_select(0, highest(masks[alive], canvas, size, gone).view(-1)).view_as(owners)
        owners = torch.where(gone, others, owners)
        areas = _areas(owners, output_size, len(masks))
    numbers = alive.cumsum(0, dtype=torch.int32)
    segments = numbers.index_select(0, _resized(owners, output_size).view(-1)).view(output_size)
    found = (labels[alive], scores[alive].float())
    return Segmentation(segments.cpu().numpy(), found[0].cpu().numpy(), scores=found[1].cpu().numpy())


def _areas(owners: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """int64 [count], the pixels of each query at that size."""
    return torch.bincount(_resized(owners, size).view(-1), minlength=count)


def _first_of_stuff(labels: Tensor, categories: Categories) -> Tensor:
    """int64 [K], for a query of stuff the first one of its class, for the others they themselves."""
    index = torch.arange(len(labels), device=labels.device)
    stuff = ~torch.tensor(categories.is_thing, device=labels.device)[labels]
    same = (labels[:, None] == labels) & stuff
    return torch.where(stuff, same.int().argmax(1), index) if len(labels) else index


def _resized(owners: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] at another size, by Pillow's nearest neighbour; the tensor itself where it has that size."""
    if tuple(owners.shape) == tuple(size):
        return owners
    rows, columns = (_nearest(*sides).to(owners.device) for sides in zip(owners.shape, size, strict=True))
    return owners.index_select(1, columns).index_select(0, rows)


def _nearest(before: int, after: int) -> Tensor:
    """int64 [after], the positions that Pillow's nearest neighbour takes, which steps by addition."""
    step = before / after
    positions = np.cumsum(np.concatenate([[step * 0.5], np.full(after - 1, step)]))
    return torch.from_numpy(np.minimum(positions.astype(np.int64), before - 1))


def merge_boxes(
    boxes: Tensor, labels: Tensor, scores: Tensor, categories: Categories, size: tuple[int, int]
) -> Segmentation:
    """A map of filled boxes, the more certain ones in front: what a model without masks can show.

    Args:
        boxes: [K, 4], x0 y0 x1 y1 in pixels of the map, their last row and column included.
        labels: int64 [K].
        scores: [K].
        categories: tell things from stuff, of which a class has one segment.
        size: height and width of the map.
    """
    segments = np.full(size, VOID, np.int32)
    first = _first_of_stuff(labels, categories).cpu().numpy()
    corners = boxes.round().cpu().numpy()
    for k in np.argsort(scores.float().cpu().numpy(), kind="stable"):
        x0, y0, x1, y1 = (max(int(value), 0) for value in (*corners[k, :2], *(corners[k, 2:] + 1)))
        segments[y0:y1, x0:x1] = first[k] + 1
    found = Segmentation(segments, labels.cpu().numpy(), scores=scores.float().cpu().numpy())
    return found.compact()


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """bool [K, H, W], filled boxes as of `merge_boxes`."""
    x0, y0, x1, y1 = boxes.round().T[:, :, None, None]
    rows = torch.arange(size[0], device=boxes.device)[:, None]
    columns = torch.arange(size[1], device=boxes.device)
    return (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)


def binary_masks(
    masks: Tensor, canvas: tuple[int, int], size: tuple[int, int], output_size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """bool [K, rows, columns] of the output: bilinear to the canvas, above the probability, nearest to the output.

    Args:
        masks: [K, h, w] logits over the canvas.
    """
    if tuple(masks.shape[-2:]) != tuple(canvas):
        masks = functional.interpolate(masks[None].float(), size=canvas, mode="bilinear", align_corners=False)[0]
    inside = masks[:, : size[0], : size[1]] > torch.logit(torch.tensor(threshold)).item()
    if tuple(output_size) == tuple(size):
        return inside
    return functional.interpolate(inside[None].to(torch.uint8), size=output_size, mode="nearest")[0].bool()


def encode(masks: Tensor) -> list[dict]:
    """COCO RLE of bool [K, H, W]."""
    planes = masks.permute(1, 2, 0).to(torch.uint8).cpu().numpy()
    return rle.encode(np.asfortranarray(planes))  # type: ignore[return-value]
