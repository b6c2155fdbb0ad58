"""Merge rules: from dense predictions to panoptic maps, vectorised over instances.

Centre grouping is Panoptic-DeepLab's post-processing (Cheng et al., arXiv 1911.10194; "Panoptic-DeepLab
in PyTorch", section 2.3), with the tie rules of the two published implementations: the first of equally
near centres, the smallest of equally frequent classes. Maps come in cropped to the image: nothing here
knows about batch padding.

Shapes: H x W pixels, C classes, K centres, P pixels of things.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional

from panoptic.segmentation import Categories, Instances, Segmentation

Score = Literal["semantic", "instance", "both"]
"""What ranks an instance: its mean class probability, the heatmap at its centroid, or their product."""

BLOCK = 1 << 16
"""Distances computed at once: what fits a core's cache."""


def find_centres(heatmap: Tensor, threshold: float = 0.1, kernel: int = 7, top_k: int | None = 200) -> Tensor:
    """Peaks of the heatmap: pixels above `threshold` that are the maximum of their window.

    With `top_k` peaks or more, those strictly above the top_k-th highest survive, so at most top_k - 1
    (as published; ties at the cutoff are dropped).

    Args:
        heatmap: float [H, W].
        threshold: peaks are strictly higher (and higher than 0).
        kernel: odd side of the window.
        top_k: None keeps all.

    Returns:
        int64 [K, 2], row and column, in row-major order.
    """
    pooled = functional.max_pool2d(heatmap[None, None], (kernel, 1), 1, (kernel // 2, 0))
    pooled = functional.max_pool2d(pooled, (1, kernel), 1, (0, kernel // 2))[0, 0]
    centres = torch.nonzero((heatmap == pooled) & (heatmap > max(threshold, 0.0)))
    if top_k is None or len(centres) < top_k:
        return centres
    values = heatmap[centres[:, 0], centres[:, 1]]
    return centres[values > values.topk(top_k).values[-1]]


def group_pixels(centres: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The nearest centre of each location, Euclidean; the first of equally near ones.

    Args:
        centres: int64 [K, 2], row and column; K at least 1.
        rows: float [P], where each pixel points to (its row plus dy).
        columns: float [P].

    Returns:
        int64 [P], 1-based.
    """
    y, x = centres.to(rows.dtype).T[:, :, None]
    nearest = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    step = max(1, BLOCK // len(centres))
    for start in range(0, len(rows), step):
        stop = start + step
        distance = (y - rows[start:stop]).square_().add_((x - columns[start:stop]).square_())
        nearest[start:stop] = distance.argmin(0)
    return nearest.add_(1)


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

    Args:
        semantic: int [H, W], contiguous classes; values outside 0..C-1 are void.
        heatmap: float [H, W].
        offset: float [2, H, W], (dy, dx) in pixels of this map.
        categories: tell things from stuff.
        threshold, kernel, top_k: of `find_centres`.
        stuff_area: stuff of fewer pixels becomes void.
        foreground: bool [H, W], where instances may be; None means wherever the class is a thing. Stuff
            inside of it and things outside become void, as published.

    Returns:
        instances in the order of their centres, then stuff in the order of classes; `scores` is None.
    """
    height, width = semantic.shape
    classes = len(categories)
    known = torch.tensor([*categories.is_thing, False], device=semantic.device)
    flat = semantic.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < classes), flat, classes)
    thing = known[flat]
    allowed = torch.ones_like(thing) if foreground is None else foreground.reshape(-1)
    centres = find_centres(heatmap, threshold, kernel, top_k)
    pixels = torch.nonzero(thing & allowed)[:, 0]
    segments = torch.zeros(height * width, dtype=torch.int32, device=semantic.device)
    labels = torch.zeros(0, dtype=torch.int64, device=semantic.device)
    if len(centres) and len(pixels):
        rows = (pixels // width).to(offset.dtype) + offset[0].reshape(-1)[pixels]
        columns = (pixels % width).to(offset.dtype) + offset[1].reshape(-1)[pixels]
        nearest = group_pixels(centres, rows, columns) - 1
        votes = torch.bincount(nearest * classes + flat[pixels], minlength=len(centres) * classes).view(-1, classes)
        present = votes.sum(1) > 0
        labels = votes.argmax(1)[present]
        number = (present.cumsum(0) * present).int()
        segments[pixels] = number[nearest]
    free = torch.where(thing | ~(allowed if foreground is None else ~allowed), flat, flat)
    free = flat.masked_fill(allowed, classes) if foreground is not None else flat
    areas = torch.bincount(free.masked_fill(thing, classes), minlength=classes + 1)[:classes]
    stuff = torch.nonzero((areas >= max(1, stuff_area)) & ~known[:classes])[:, 0]
    table = torch.zeros(classes + 1, dtype=torch.int32, device=semantic.device)
    table[stuff] = torch.arange(len(labels) + 1, len(labels) + len(stuff) + 1, dtype=torch.int32, device=table.device)
    segments += table[free]
    labels = torch.cat([labels, stuff])
    return Segmentation(segments.view(height, width).cpu().numpy(), labels.cpu().numpy())


def scored_instances(
    segmentation: Segmentation, logits: Tensor, heatmap: Tensor, categories: Categories, score: Score = "both"
) -> Instances:
    """The things of a merged map as scored instances.

    Args:
        segmentation: from `merge_centres`.
        logits: float [C, H, W], the semantic logits at the map's size.
        heatmap: float [H, W].
        categories: tell things from stuff.
        score: what ranks an instance.
    """
    things = [k + 1 for k, label in enumerate(segmentation.labels) if categories.is_thing[label]]
    labels = segmentation.labels[[k - 1 for k in things]].astype(np.int64)
    masks, scores = [], []
    probability = logits.softmax(0).cpu().numpy()
    heat = heatmap.cpu().numpy()
    for k, label in zip(things, labels, strict=True):
        mask = segmentation.segments == k
        masks.append(rle.encode(np.asfortranarray(mask.astype(np.uint8))))
        rows, columns = np.nonzero(mask)
        value = 1.0
        if score != "instance":
            value *= probability[label][mask].mean()
        if score != "semantic":
            value *= heat[int(rows.mean()), int(columns.mean())]
        scores.append(value)
    boxes = rle.toBbox(masks) if masks else np.zeros((0, 4))
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)
    return Instances(masks, labels, np.array(scores, np.float32), boxes)
