"""Panoptic FCN's merge: peaks and regions of all levels, their kernels fused, what they draw, things before stuff
(arXiv 2012.00720, sections 3.2 and 3.4).

Shapes: T thing classes, R region classes, C channels, h x w a level, K kernels, y x x cells of stride 4, H x W output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from panoptic.layers.greedy_merge import CroppedMask, merge_by_score
from panoptic.runtime.detr import Graph
from panoptic.runtime.place import Place, bilinear, sigmoid
from panoptic.segmentation import IGNORE, Categories, Segmentation

STRIDE = 4
"""The stride, in pixels of the canvas, of the cells that kernels draw on."""

TINY = 1e-8
"""The least norm that a kernel is divided by."""


def merge(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> Segmentation:
    """The panoptic map of one image.

    Args:
        outputs: "encoded" [1, C, y, x], and of each level "things_p3" [1, T, h, w], "regions_p3" [1, R, h, w] logits
            and "kernels_p3" [1, D, h, w].
        place: of the image.
        categories: tell things from stuff.
        rules: the options of `PanopticFCNConfig` for the time after the network; "levels"; "region_classes".
        graph: of the kernels' embeddings, "kernels".
    """
    things, labels, scores = _thing_kernels(outputs, rules)
    kernels, regions, region_scores = _region_kernels(outputs, rules)
    embedded = graph("kernels", {"things": _two(things), "regions": _two(kernels)})
    things, kernels = embedded["thing_kernels"][: len(things)], embedded["region_kernels"][: len(kernels)]
    things, kept = _fuse(things, _similar(things, labels, rules["fusion_threshold"], rules["class_aware"]))
    labels, scores = np.array(categories.things, np.int64)[labels[kept]], scores[kept]
    kernels, regions, region_scores = _fuse_classes(kernels, regions, region_scores)

    encoded = outputs["encoded"][0]
    flat = encoded.reshape(len(encoded), -1)
    probability = sigmoid((things @ flat).reshape(-1, *encoded.shape[1:]))
    planes = sigmoid((kernels @ flat).reshape(-1, *encoded.shape[1:]))
    inside = probability > rules["mask_threshold"]
    scores = scores * ((probability * inside).sum((1, 2)) / (inside.sum((1, 2)).astype(np.float32) + np.float32(1e-6)))
    axes = [_axis(*sides) for sides in zip(encoded.shape[1:], place.size, place.output, strict=True)]

    # value 1 + r of a region map is region class r
    values = (IGNORE, *rules["region_classes"])
    stuff = [label if label in categories.stuff else IGNORE for label in values]
    stuff_scores = np.zeros(len(values))
    stuff_scores[regions + 1] = region_scores
    order = np.argsort(-scores, kind="stable")
    if rules["merge"] == "argmax":
        order = order[scores[order] >= rules["merged_score"]][: rules["most_kernels"]]
        shown = [k for k, region in enumerate(regions) if stuff[region + 1] != IGNORE]
        first = len(order) + 1
        numbers = [*range(1, first), *(int(regions[k]) + 1 + first for k in shown)]
        owners = _draw(np.concatenate([probability[order], planes[shown]]), numbers, axes)
        every = np.array([IGNORE, *labels[order].tolist(), *stuff], np.int64)
        ranks = np.concatenate([[0.0], scores[order], stuff_scores]).astype(np.float32)
        least = np.where(np.arange(len(every)) < first, 1, max(1, rules["stuff_area"]))
        alive = (np.bincount(owners.reshape(-1), minlength=len(every)) >= least) & (every != IGNORE)
        table = np.where(alive, np.cumsum(alive), 0).astype(np.int32)
        return Segmentation(table[owners], every[alive], scores=ranks[alive])
    order = order[scores[order] >= rules["lowest_score"]][: rules["most_kernels"]]
    return merge_by_score(
        [_cropped(probability[k], inside[k], axes, rules["mask_threshold"]) for k in order],
        labels[order].tolist(),
        scores[order],
        _draw(planes, [int(region) + 1 for region in regions], axes),
        stuff,
        stuff_scores.tolist(),
        confidence=rules["merged_score"],
        overlap=rules["most_overlap"],
        stuff_area=rules["stuff_area"],
    )


def _two(kernels: np.ndarray) -> np.ndarray:
    """Kernels [K, D] and two of zeros: a graph whose sizes vary has two at least."""
    return np.concatenate([kernels, np.zeros((2, kernels.shape[1]), np.float32)])


def _thing_kernels(
    outputs: Mapping[str, np.ndarray], rules: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernels [K, D], classes among the T and scores of all peaks of all levels, best first."""
    kernels, labels, scores = [], [], []
    for level, pool in zip(rules["levels"], rules["pool"], strict=True):
        probability = sigmoid(outputs[f"things_{level}"][0])
        # the mean of a cell's probability and its window's; cells beyond the border count as 0
        mean = [cv2.blur(plane, (pool, pool), borderType=cv2.BORDER_CONSTANT) for plane in probability]
        score = (probability + np.stack(mean)) / 2
        highest = np.stack([cv2.dilate(plane, np.ones((3, 3), np.uint8)) for plane in score])
        peaks = np.where(highest == score, score, 0).reshape(-1)
        cells = score.shape[1] * score.shape[2]
        best = np.argsort(-peaks, kind="stable")[: min(rules["most_kernels"] // 2, cells)]
        best = best[peaks[best] > rules["thing_threshold"]]
        kernels.append(outputs[f"kernels_{level}"][0].reshape(-1, cells)[:, best % cells].T)
        labels.append(best // cells)
        scores.append(peaks[best])
    ranks = np.concatenate(scores)
    order = np.argsort(-ranks, kind="stable")
    return np.concatenate(kernels)[order], np.concatenate(labels)[order], ranks[order]


def _region_kernels(
    outputs: Mapping[str, np.ndarray], rules: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernels [K, D], classes among the R and scores of the regions of all levels."""
    kernels, labels, scores = [], [], []
    for level in rules["levels"]:
        probability = sigmoid(outputs[f"regions_{level}"][0]).reshape(-1, outputs[f"regions_{level}"][0, 0].size)
        count, cells = probability.shape
        if rules["centres"]:
            # a region is the one cell in which its class is most probable
            score, place = probability.max(1), probability.argmax(1)
            masks = np.eye(cells, dtype=np.float32)[place]
            label = np.flatnonzero(score > rules["region_threshold"])
        else:
            # a region is all cells in which its class is the most probable one
            masks = (probability.argmax(0) == np.arange(count)[:, None]).astype(np.float32)
            area = masks.sum(1)
            # the mean probability of the class in the cells of its region
            score = (probability * masks).sum(1) / np.maximum(area, 1)
            label = np.flatnonzero((area > 0) & (score > rules["region_threshold"]))
        # the mean kernel over the cells of a region, or, as published, their sum over the number of the level's cells
        total = masks[label] @ outputs[f"kernels_{level}"][0].reshape(-1, cells).T
        own = rules["own_cells"] or rules["centres"]
        kernels.append(total / np.maximum(masks[label].sum(1, keepdims=True), 1) if own else total / cells)
        labels.append(label)
        scores.append(score[label])
    return np.concatenate(kernels).astype(np.float32), np.concatenate(labels), np.concatenate(scores)


def _similar(kernels: np.ndarray, labels: np.ndarray, threshold: float, class_aware: bool) -> np.ndarray:
    """bool [K, K], pairs of a cosine of at least `threshold`, of one class where `class_aware`."""
    unit = kernels / np.maximum(np.linalg.norm(kernels, axis=1, keepdims=True), TINY)
    same = unit @ unit.T >= threshold
    np.fill_diagonal(same, True)
    return same & (labels[:, None] == labels) if class_aware else same


def _fuse(kernels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of kernels and the later ones that are alike, and the indices of those that stay."""
    # row i marks kernel i and the later kernels that are like it
    same = np.triu(groups)
    # a column's rows up to its first mark, so that a kernel belongs to the first one that it is like, and to no other
    first = np.cumsum(same, 0) < 2
    # a kernel stays if no earlier one is like it; where it goes, later kernels that it was the first for go too
    kept = np.flatnonzero(first.diagonal())
    members = (same & first)[kept].astype(np.float32)
    return members @ kernels / members.sum(1, keepdims=True), kept


def _fuse_classes(
    kernels: np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean kernel of each class, the classes, ascending, and the mean scores."""
    classes = np.unique(labels)
    members = (labels == classes[:, None]).astype(np.float32)
    count = members.sum(1)
    return members @ kernels / count[:, None], classes, members @ scores / count


def _axis(cells: int, side: int, output: int) -> np.ndarray:
    """float32 [output, cells], the resize of an axis up to the canvas, cut to the image, then to the output."""
    unit = np.eye(cells, dtype=np.float32)
    up = bilinear(unit, (cells, STRIDE * cells))[:, :side]
    return np.ascontiguousarray(bilinear(up, (cells, output)).T)


def _cropped(probability: np.ndarray, inside: np.ndarray, axes: Sequence[np.ndarray], threshold: float) -> CroppedMask:
    """The mask of one plane [y, x] within the part of the output that can exceed `threshold`."""
    (rows, y), (columns, x) = (_span(np.asarray(inside.any(1 - axis)), axes[axis]) for axis in (0, 1))
    mask = axes[0][rows, y] @ probability[y, x] @ axes[1][columns, x].T > threshold
    return CroppedMask(rows.start, columns.start, mask)


def _span(lines: np.ndarray, axis: np.ndarray) -> tuple[slice, slice]:
    """The output positions that read any of `lines` (bool [cells]), and all cells that they read."""
    reads = np.flatnonzero(axis[:, lines].sum(1))
    if not len(reads):
        return slice(0, 0), slice(0, 0)
    rows = slice(int(reads[0]), int(reads[-1]) + 1)
    cells = np.flatnonzero(axis[rows].sum(0))
    return rows, slice(int(cells[0]), int(cells[-1]) + 1)


def _draw(planes: np.ndarray, numbers: Sequence[int], axes: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [H, W], the number of the most probable plane [K, y, x] at each pixel, the first of equals; 0 = none."""
    down, across = axes
    best = np.zeros((len(down), len(across)), np.float32)
    owners = np.zeros(best.shape, np.int32)
    for plane, number in zip(planes, numbers, strict=True):
        values = down @ (plane @ across.T)
        owners[values > best] = number
        np.maximum(best, values, out=best)
    return owners
