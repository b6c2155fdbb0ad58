"""DETR's merge: each pixel goes to the confident query of the highest mask logit, queries of few pixels are removed and
their pixels handed out again (facebookresearch/detr, PostProcessPanoptic).

Shapes: Q queries, K logits, D width, n confident queries, h x w their masks, H x W the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from panoptic.runtime.place import Place, bilinear, softmax
from panoptic.segmentation import IGNORE, VOID, Categories, Segmentation

CHUNK = 16
"""Queries that pass the mask head at once."""

Graph = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a second graph, by its name, on named inputs."""


def merge(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> Segmentation:
    """The panoptic map of one image, with the probability of each segment's class.

    Args:
        outputs: "logits" [1, Q, K + 1] ("no object" last), "boxes" [1, Q, 4], and with masks "states" [1, Q, D],
            "memory", "valid" and "levels_0" to "levels_3".
        place: of the image.
        categories: tell things from stuff.
        rules: "threshold", "min_area", "masks" and "classes", the class of each logit.
        graph: of the mask head, "masks".
    """
    probabilities = softmax(outputs["logits"][0])
    scores, best = probabilities.max(-1), probabilities.argmax(-1)
    labels = np.array([*rules["classes"], IGNORE], np.int64)[best]
    kept = np.flatnonzero((labels != IGNORE) & (scores > rules["threshold"]))
    scores, labels = scores[kept], labels[kept]
    if not rules["masks"]:
        return merge_boxes(outputs["boxes"][0, kept], labels, scores, categories, place.output)
    if not len(kept):
        return _void(place.output)
    fixed = {name: outputs[name] for name in ("memory", "valid", "levels_0", "levels_1", "levels_2", "levels_3")}
    masks = []
    for start in range(0, len(kept), CHUNK):
        part = kept[start : start + CHUNK]
        states = outputs["states"][0, np.append(part, part[:1])]  # two at least
        masks.append(graph("masks", fixed | {"states": states})["masks"][: len(part)])
    return merge_masks(np.concatenate(masks), labels, scores, place, categories, rules["min_area"])


def merge_masks(
    masks: np.ndarray, labels: np.ndarray, scores: np.ndarray, place: Place, categories: Categories, min_area: int
) -> Segmentation:
    """Segments in the order of the queries; all void where none is left.

    Args:
        masks: float32 [n, h, w], logits over the canvas.
        labels: int64 [n].
        scores: float32 [n].
        place: of the image.
        categories: tell things from stuff.
        min_area: segments of so many pixels or fewer are removed.
    """
    count, every = len(masks), np.arange(len(masks))
    owners = _highest(masks, every, place)
    # duplicates of stuff have no area of their own in the first pass, and so never reach the map
    areas = np.zeros(count, np.int64)
    np.add.at(areas, _first_of_stuff(labels, categories), _areas(owners, place.output, count))
    alive = np.ones(count, bool)
    while (alive & (areas <= min_area)).any():
        alive &= areas > min_area
        if not alive.any():
            return _void(place.output)
        owners = np.where(alive[owners], owners, _highest(masks, every[alive], place))
        areas = _areas(owners, place.output, count)
    numbers = np.cumsum(alive, dtype=np.int32)
    return Segmentation(numbers[_resized(owners, place.output)], labels[alive], scores=scores[alive])


def _highest(masks: np.ndarray, chosen: np.ndarray, place: Place) -> np.ndarray:
    """The query among `chosen` whose logit is highest at each pixel of the image, the first of equals, int32."""
    owners = np.full(place.size, chosen[0], np.int32)
    best = np.full(place.size, -np.inf, np.float32)
    for k in chosen.tolist():
        logits = bilinear(masks[k], place.canvas)[: place.size[0], : place.size[1]]
        owners[logits > best] = k
        np.maximum(best, logits, out=best)
    return owners


def _areas(owners: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    return np.bincount(_resized(owners, size).reshape(-1), minlength=count)


def _resized(owners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map at another size by Pillow's nearest neighbour, which steps by addition."""
    for axis, after in enumerate(size):
        before = owners.shape[axis]
        if before != after:
            step = before / after
            positions = np.cumsum(np.concatenate([[step * 0.5], np.full(after - 1, step)]))
            owners = np.take(owners, np.minimum(positions.astype(np.int64), before - 1), axis)
    return owners


def _first_of_stuff(labels: np.ndarray, categories: Categories) -> np.ndarray:
    """The first query of the same class for each query of stuff, and each thing itself, int64 [n]."""
    stuff = ~np.array(categories.is_thing)[labels]
    same = (labels[:, None] == labels) & stuff
    return np.where(stuff, same.argmax(1), np.arange(len(labels))) if len(labels) else labels


def merge_boxes(
    boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, categories: Categories, size: tuple[int, int]
) -> Segmentation:
    """A map of filled boxes, the more certain ones in front, for a model without masks.

    Args:
        boxes: float32 [n, 4], centre x, centre y, width and height as shares of the image.
    """
    segments = np.full(size, VOID, np.int32)
    centres, sides = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([centres - 0.5 * sides, centres + 0.5 * sides], 1)
    corners = np.round(corners * np.array([size[1], size[0]] * 2, np.float32))
    first = _first_of_stuff(labels, categories)
    for k in np.argsort(scores, kind="stable"):
        x0, y0, x1, y1 = (max(int(value), 0) for value in (*corners[k, :2], *(corners[k, 2:] + 1)))
        segments[y0:y1, x0:x1] = first[k] + 1
    return Segmentation(segments, labels, scores=scores).compact()


def _void(size: tuple[int, int]) -> Segmentation:
    return Segmentation(np.full(size, VOID, np.int32), np.zeros(0, np.int64), scores=np.zeros(0, np.float32))
