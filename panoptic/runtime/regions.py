"""The steps of two-stage models between their graphs: proposals, suppression, detections (as detectron2 does).

Graphs that look into regions take the regions of each level apart ("regions_p2" [R, 4] and so on), two of each at
least: a graph whose sizes vary is free of choices between none, one and many.

Shapes: A anchors of all levels, P proposals, K thing classes, N detections, M side of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from panoptic.rcnn.config import CANONICAL_SIDE, CANONICAL_STRIDE
from panoptic.runtime.detr import Graph
from panoptic.runtime.place import Place

LARGEST_STRETCH = np.float32(math.log(1000 / 16))
"""Width and height change by no more than this, in logarithms, when deltas are applied."""

BLOCK = 256
"""Boxes whose overlaps with all others are held at once."""

BLANK = np.array([[0, 0, 1, 1]] * 2, np.float32)
"""Regions that fill every level up to two."""


def decode(boxes: np.ndarray, deltas: np.ndarray, code: Sequence[float] = (1, 1, 1, 1)) -> np.ndarray:
    """Boxes float32 [P, 1, 4] or [P, 4] moved by deltas [P, ..., 4] over the factors of the code, [P, ..., 4]."""
    factors = np.array(code, np.float32)
    sizes = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + np.float32(0.5) * sizes
    middles = deltas[..., :2] / factors[:2] * sizes + centres
    halves = np.float32(0.5) * (np.exp(np.minimum(deltas[..., 2:] / factors[2:], LARGEST_STRETCH)) * sizes)
    return np.concatenate([middles - halves, middles + halves], -1)


def clip(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes [..., 4] cut to an image of that height and width."""
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))


def is_empty(boxes: np.ndarray, least: float = 0.0) -> np.ndarray:
    """bool [...], boxes [..., 4] whose width or height is not above `least`."""
    return np.asarray(((boxes[..., 2:] - boxes[..., :2]) <= least).any(-1))


def suppress(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression within each group: the boxes that stay, int64, best first.

    Args:
        boxes: float32 [P, 4].
        scores: float32 [P].
        groups: int64 [P].
        threshold: of two that overlap by more the better one stays.
    """
    kept = []
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        places = places[np.argsort(-scores[places], kind="stable")]
        alive, corners = np.ones(len(places), bool), boxes[places]
        # the overlaps of a block of boxes with all others at a time: those of all boxes at once may not fit memory
        for start in range(0, len(places), BLOCK):
            rows = start + np.flatnonzero(alive[start : start + BLOCK])
            close = overlaps(corners[rows], corners) > threshold
            for k, row in zip(rows.tolist(), close, strict=True):
                if alive[k]:  # a box that a better one of this block has suppressed suppresses none itself
                    alive[k + 1 :] &= ~row[k + 1 :]
        kept.append(places[alive])
    every = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    return every[np.argsort(-scores[every], kind="stable")]


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float32 [N, P], intersection over union of each pair of boxes [N, 4] and [P, 4]."""
    low, high = np.maximum(first[:, None, :2], second[:, :2]), np.minimum(first[:, None, 2:], second[:, 2:])
    sides = np.maximum(high - low, 0)
    shared = sides[..., 0] * sides[..., 1]
    areas = [(part[:, 2] - part[:, 0]) * (part[:, 3] - part[:, 1]) for part in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, np.float32(1e-12))


def anchors(cells: np.ndarray, height: int, width: int, stride: int, offset: float) -> np.ndarray:
    """float32 [height * width * K, 4]: `cells` [K, 4] at each place of a map, rows first, then columns, then K."""
    down, across = ((np.arange(count, dtype=np.float32) + np.float32(offset)) * stride for count in (height, width))
    x, y = np.meshgrid(across, down)
    shift = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (shift + cells).reshape(-1, 4)


def propose(
    logits: Sequence[np.ndarray], deltas: Sequence[np.ndarray], size: tuple[int, int], rules: Mapping[str, Any]
) -> np.ndarray:
    """The proposals of one image, float32 [P, 4] in pixels of the canvas, best first.

    Args:
        logits: of each level [K, h, w].
        deltas: of each level [4 K, h, w].
        size: of the image.
        rules: "cells" and "strides" of each level, "offset", "before", "after", "nms" and "least_side".
    """
    boxes, scores, levels = [], [], []
    for k, (confidence, code) in enumerate(zip(logits, deltas, strict=True)):
        height, width = confidence.shape[1:]
        flat = confidence.transpose(1, 2, 0).reshape(-1)
        codes = code.reshape(-1, 4, height, width).transpose(2, 3, 0, 1).reshape(-1, 4)
        cells = np.array(rules["cells"][k], np.float32)
        best = np.argsort(-flat, kind="stable")[: rules["before"]]
        places = anchors(cells, height, width, rules["strides"][k], rules["offset"])[best]
        boxes.append(decode(places, codes[best]))
        scores.append(flat[best])
        levels.append(np.full(len(best), k))
    every, confidence, level = clip(np.concatenate(boxes), size), np.concatenate(scores), np.concatenate(levels)
    usable = np.isfinite(every).all(1) & np.isfinite(confidence) & ~is_empty(every, rules["least_side"])
    every, confidence, level = every[usable], confidence[usable], level[usable]
    return every[suppress(every, confidence, level, rules["nms"])[: rules["after"]]]


def look_into(
    graph: Graph,
    name: str,
    features: Mapping[str, np.ndarray],
    strides: Sequence[int],
    boxes: np.ndarray,
    classes: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The outputs of a second graph for regions, each pooled from the level that fits its size, in their order.

    Args:
        graph: of the exported model.
        name: of the second graph.
        features: the pooled levels [1, C, h, w], fine to coarse.
        strides: of these levels.
        boxes: float32 [R, 4] in pixels of the canvas.
        classes: int64 [R], where the graph asks for them.
    """
    levels = _assign_levels(boxes, strides)
    places = [np.flatnonzero(levels == k) for k in range(len(features))]
    inputs = dict(features)
    for level, chosen in zip(features, places, strict=True):
        inputs[f"regions_{level}"] = np.concatenate([boxes[chosen], BLANK]).astype(np.float32)
    if classes is not None:
        blank = np.zeros(len(BLANK), np.int64)
        inputs["classes"] = np.concatenate([part for chosen in places for part in (classes[chosen], blank)])
    # where the rows of a level's regions begin, its blank ones left out
    starts = np.cumsum([0, *(len(chosen) + len(BLANK) for chosen in places)])
    rows = np.empty(len(boxes), np.int64)
    for start, chosen in zip(starts.tolist(), places, strict=False):
        rows[chosen] = np.arange(start, start + len(chosen))
    return {key: value[rows] for key, value in graph(name, inputs).items()}


def _assign_levels(boxes: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """int64 [R], the index of the level for each box; `strides` are powers of two, ascending."""
    if len(strides) == 1:
        return np.zeros(len(boxes), np.int64)
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    level = np.floor(math.log2(CANONICAL_STRIDE) + np.log2(sides / np.float32(CANONICAL_SIDE) + np.float32(1e-8)))
    lowest, highest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    return np.clip(level, lowest, highest).astype(np.int64) - lowest


def detect(
    boxes: np.ndarray, probabilities: np.ndarray, size: tuple[int, int], rules: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [N, 4], scores [N] and classes [N] of one image: each class of each region on its own.

    Args:
        boxes: float32 [P, K, 4], decoded.
        probabilities: float32 [P, K + 1], background last.
        size: of the image.
        rules: "threshold", "nms" and "most".
    """
    finite = np.isfinite(boxes).all((1, 2)) & np.isfinite(probabilities).all(1)
    boxes, scores = clip(boxes[finite], size), probabilities[finite, :-1]
    region, label = np.nonzero(scores > rules["threshold"])
    boxes, scores = boxes[region, label], scores[region, label]
    best = suppress(boxes, scores, label, rules["nms"])[: rules["most"]]
    return boxes[best], scores[best], label[best]


def enlarged(boxes: np.ndarray, place: Place) -> np.ndarray:
    """Boxes [..., 4] from pixels of the canvas to pixels of the output."""
    height, width = (after / before for after, before in zip(place.output, place.size, strict=True))
    return boxes * np.array([width, height] * 2, np.float32)
