"""Panoptic-DeepLab's merge: centres, the pixels that point to them, a vote on their class, and stuff (arXiv 1911.10194,
section 3.3).

Shapes: H x W pixels, h x w maps of the network, C classes, K centres, P pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from panoptic.runtime.place import Place, bilinear
from panoptic.segmentation import Categories, Segmentation

CELL = 16
"""Side in pixels of the cells for which the only centre that can be nearest is looked for."""

BLOCK = 1 << 18
"""Distances that are held at once."""


def merge(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any]
) -> Segmentation:
    """The panoptic map of one image; scores are None.

    Args:
        outputs: "semantic" logits [1, C, h, w], "centre" [1, 1, h, w], "offset" [1, 2, h, w], perhaps "foreground".
        place: of the image.
        categories: tell things from stuff.
        rules: "standalone", "stride", "threshold", "kernel", "top_k", "stuff_area" and "rescale_offset".
    """
    standalone, size = rules["standalone"], place.size if rules["standalone"] else place.output

    def merged_size(x: np.ndarray) -> np.ndarray:
        whole = place.canvas if standalone else (x.shape[-2] * rules["stride"], x.shape[-1] * rules["stride"])
        return bilinear(bilinear(x, whole, standalone)[..., : place.size[0], : place.size[1]], size)

    classes, best = np.zeros(size, np.int32), np.full(size, -np.inf, np.float32)
    for label, plane in enumerate(outputs["semantic"][0]):
        plane = merged_size(plane)
        classes[plane > best] = label
        np.maximum(best, plane, out=best)
    centre, offset = merged_size(outputs["centre"][0, 0]), merged_size(outputs["offset"][0])
    if rules["rescale_offset"] and not standalone:
        factor = np.array(place.output) / np.array(place.size)
        offset = offset * factor.astype(np.float32)[:, None, None]
    foreground = merged_size(outputs["foreground"][0, 0]) > 0 if "foreground" in outputs else None
    merged = merge_centres(classes, centre, offset, foreground, categories, rules)
    if merged.size == place.output:
        return merged
    segments = cv2.resize(merged.segments, place.output[::-1], interpolation=cv2.INTER_NEAREST)
    return replace(merged, segments=segments).compact()


def merge_centres(
    classes: np.ndarray,
    heatmap: np.ndarray,
    offset: np.ndarray,
    foreground: np.ndarray | None,
    categories: Categories,
    rules: Mapping[str, Any],
) -> Segmentation:
    """Instances in the order of their centres, then stuff in the order of classes.

    Args:
        classes: int32 [H, W].
        heatmap: float32 [H, W].
        offset: float32 [2, H, W], (dy, dx).
        foreground: bool [H, W], where instances may be; None = where the class is a thing.
        categories: tell things from stuff.
        rules: as of `merge`.
    """
    is_thing = np.array(categories.is_thing)
    thing = is_thing[classes] if foreground is None else foreground
    centres = find_centres(heatmap, rules["threshold"], rules["kernel"], rules["top_k"])
    owners = group_pixels(centres, offset, thing)
    # the number of pixels of each pair of an instance and a class
    wide = len(categories)
    pairs = owners * wide + classes
    votes = np.bincount(pairs.reshape(-1), minlength=(len(centres) + 1) * wide).reshape(-1, wide)
    # an instance takes the class that most of its thing pixels have; stuff is counted where there is no instance
    ballots = votes[1:] * is_thing
    alive = ballots.sum(1) > 0
    labels = ballots.argmax(1)[alive]
    stuff = np.flatnonzero((votes[0] >= max(1, rules["stuff_area"])) & ~is_thing)
    table = np.zeros(votes.shape, np.int32)
    table[1:] = (np.cumsum(alive) * alive)[:, None] * is_thing
    table[0, stuff] = np.arange(len(labels) + 1, len(labels) + len(stuff) + 1)
    return Segmentation(table.reshape(-1)[pairs], np.concatenate([labels, stuff]).astype(np.int64))


def find_centres(heatmap: np.ndarray, threshold: float, kernel: int, top_k: int | None) -> np.ndarray:
    """int64 [K, 2], row and column of the pixels above the threshold that are the maximum of their window.

    With `top_k` peaks or more, those strictly above the top_k-th highest stay.
    """
    highest = cv2.dilate(heatmap, np.ones((kernel, kernel), np.uint8))
    rows, columns = np.nonzero((heatmap == highest) & (heatmap > max(threshold, 0.0)))
    if top_k is not None and len(rows) >= top_k:
        values = heatmap[rows, columns]
        kept = values > np.sort(values)[-top_k]
        rows, columns = rows[kept], columns[kept]
    return np.stack([rows, columns], 1)


def group_pixels(centres: np.ndarray, offset: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """int32 [H, W], 1 + the centre nearest to where each pixel of `mask` points, the first of equals; 0 elsewhere."""
    owners = np.zeros(mask.shape, np.int32)
    if not len(centres):
        return owners
    rows, columns = np.nonzero(mask)
    y, x = offset[0, rows, columns] + rows, offset[1, rows, columns] + columns
    y, x = y.astype(np.float32), x.astype(np.float32)
    # most pixels point to a cell in which only one centre can be nearest; only the others compare distances
    cells = _only_candidates(centres, mask.shape)
    places = [
        np.clip((position / np.float32(CELL) + 1).astype(np.int64), 0, side - 1)
        for position, side in zip((y, x), cells.shape, strict=True)
    ]
    nearest = cells[places[0], places[1]]
    undecided = np.flatnonzero(nearest == 0)
    centre_rows, centre_columns = centres.astype(np.float32).T
    for start in range(0, len(undecided), max(1, BLOCK // len(centres))):
        part = undecided[start : start + max(1, BLOCK // len(centres))]
        distances = (centre_rows - y[part, None]) ** 2 + (centre_columns - x[part, None]) ** 2
        nearest[part] = distances.argmin(1) + 1
    owners[rows, columns] = nearest
    return owners


def _only_candidates(centres: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The centre that is the nearest from everywhere within each cell, 1 + its index; 0 where there are several.

    The bound is that of `panoptic.models.panoptic_deeplab.grouping`. A border of zeros stands for all outside the map.
    """
    rows, columns = centres.astype(np.float64).T
    middles = [(np.arange(-(-side // CELL)) + 0.5) * CELL for side in size]
    cells = np.zeros((len(middles[0]) + 2, len(middles[1]) + 2), np.int32)
    across = (middles[1][:, None] - columns) ** 2
    for row, middle in enumerate(middles[0]):
        distances = across + (middle - rows) ** 2
        nearest = distances.argmin(1)
        gained = (np.abs(rows - rows[nearest, None]) + np.abs(columns - columns[nearest, None])) * (CELL + 2)
        rivals = (distances - distances.min(1)[:, None] <= gained).sum(1)
        cells[row + 1, 1:-1] = np.where(rivals == 1, nearest + 1, 0)
    return cells
