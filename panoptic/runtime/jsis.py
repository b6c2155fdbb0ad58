"""JSIS-Net's merge: instances by their probability pixel by pixel, above stuff of which little is replaced (arXiv
1809.02110, section 2.2).

Shapes: C classes, h x w maps of the network, P proposals, K thing classes, N instances, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from panoptic.runtime.detr import Graph
from panoptic.runtime.place import Place, best_planes, bilinear, sigmoid, softmax
from panoptic.runtime.regions import clip, decode, enlarged, is_empty, look_into, propose, suppress
from panoptic.segmentation import VOID, Categories, Segmentation


def merge(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> Segmentation:
    """The panoptic map of one image; stuff scores 1.

    Args:
        outputs: "semantic" logits [1, C, h, w]; "features" [1, D, h, w], "objectness" [1, 2 A, h, w] (background,
            thing) and "deltas" [1, 4 A, h, w]. A branch that was trained alone has its own only.
        place: of the image.
        categories: tell things from stuff.
        rules: "regions", "detection", "background_wins", "conflicts" and "align_corners".
        graph: of the head, "boxes" and "masks".
    """
    owners, labels, scores = np.zeros(place.output, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
    if "features" in outputs:
        owners, labels, scores = _instances(outputs, place, categories, rules, graph)
    if "semantic" in outputs and categories.stuff:
        height, width = place.size
        logits = bilinear(outputs["semantic"][0], place.canvas, rules["align_corners"])[:, :height, :width]
        classes = _stuff_map(softmax(logits, 0), place, categories, rules["conflicts"], owners > 0)
        numbers = np.full(len(categories) + 1, VOID, np.int32)  # the last entry is void
        numbers[list(categories.stuff)] = np.arange(len(labels) + 1, len(labels) + 1 + len(categories.stuff))
        owners = np.where(owners > 0, owners, numbers[classes])
        labels = np.concatenate([labels, np.array(categories.stuff, np.int64)])
        scores = np.concatenate([scores, np.ones(len(categories.stuff), np.float32)])
    return Segmentation(owners, labels, scores=scores).compact()


def _instances(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 + the instance of each pixel of the output (0 = none), and the classes and scores of the instances."""
    regions, detection = rules["regions"], rules["detection"]
    pairs = outputs["objectness"][0].reshape(-1, 2, *outputs["objectness"].shape[2:])
    proposals = propose([pairs[:, 1] - pairs[:, 0]], [outputs["deltas"][0]], place.size, regions)
    if not len(proposals):  # the whole image, where every box vanished
        proposals = np.array([[0, 0, place.size[1], place.size[0]]], np.float32)
    features = {"features": outputs["features"]}
    heads = look_into(graph, "boxes", features, regions["strides"], proposals)
    probabilities = softmax(heads["logits"])
    # the most probable thing of each region
    label, every = probabilities[:, :-1].argmax(1), np.arange(len(proposals))
    best, background = probabilities[every, label], probabilities[:, -1]
    codes = heads["deltas"].reshape(len(proposals), -1, 4)[every, label]
    boxes = clip(decode(proposals, codes, detection["code"]), place.size)
    # detections that only AP counts take part in the suppression
    kept = np.flatnonzero(np.isfinite(boxes).all(1) & (best > detection["threshold"]) & ~is_empty(boxes))
    group = np.zeros_like(kept) if detection["across_classes"] else label[kept]
    kept = kept[suppress(boxes[kept], best[kept], group, detection["nms"])[: detection["most"]]]
    shown = best[kept] > detection["merged_threshold"]
    if rules["background_wins"]:
        shown &= best[kept] >= background[kept]
    kept = kept[shown]
    boxes, classes = boxes[kept], label[kept]
    masks = sigmoid(look_into(graph, "masks", features, regions["strides"], boxes, classes)["masks"])
    owners = _pixel_owners(enlarged(boxes, place), masks, place.output, rules["conflicts"]["mask_threshold"])
    return owners, np.array(categories.things, np.int64)[classes], best[kept]


def _pixel_owners(boxes: np.ndarray, masks: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """int32 [H, W], 1 + the instance that is most probable at each pixel, 0 where none reaches the threshold."""
    best, owners = np.zeros(size, np.float32), np.zeros(size, np.int32)
    for k, ((x0, y0, x1, y1), mask) in enumerate(zip(boxes.astype(np.float64).tolist(), masks, strict=True)):
        rows, down = _axis(y0, y1, size[0], len(mask))
        columns, across = _axis(x0, x1, size[1], len(mask))
        values, window = down @ mask @ across.T, (rows, columns)
        better = (values >= threshold) & (values > best[window])
        best[window] = np.where(better, values, best[window])
        owners[window][better] = k + 1
    return owners


def _axis(low: float, high: float, size: int, side: int) -> tuple[slice, np.ndarray]:
    """The pixels of an axis with their centre in [low, high), and float32 [pixels, M], what each takes of each cell."""
    first, last = (min(max(int(np.ceil(edge - 0.5)), 0), size) for edge in (low, high))
    place = (np.arange(first, last) + 0.5 - low) / max(high - low, 1e-6) * side - 0.5
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(side)), 0)
    return slice(first, max(first, last)), weights.astype(np.float32)


def _stuff_map(
    probabilities: np.ndarray, place: Place, categories: Categories, rules: Mapping[str, Any], covered: np.ndarray
) -> np.ndarray:
    """The class of stuff of each pixel of the output; -1 where void.

    Args:
        probabilities: float32 [C, height, width] of the image at network size.
        place: of the image.
        categories: with stuff among them.
        rules: "stuff_area", "stuff_share", "stuff_threshold" and "count_after_things".
        covered: bool [H, W], pixels of instances.
    """
    whole = Place(place.size, place.size, place.output)

    def most_probable(chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        best, number = best_planes(probabilities[list(chosen)], whole)
        return best, np.array(chosen)[number]

    stuff = categories.stuff
    best, classes = most_probable(stuff)
    counted = classes[~covered] if rules["count_after_things"] else classes.reshape(-1)
    counts = np.bincount(counted, minlength=len(categories))[list(stuff)]
    least = rules["stuff_area"]
    if rules["stuff_share"]:
        least = int(rules["stuff_share"] * classes.size) + 1  # strictly more than the share
    allowed = [c for c, count in zip(stuff, counts.tolist(), strict=True) if count >= least]
    allowed = allowed or [stuff[int(counts.argmax())]]
    if set(np.unique(classes).tolist()) - set(allowed):
        best, classes = most_probable(allowed)
    if rules["stuff_threshold"]:
        classes = np.where(best > rules["stuff_threshold"], classes, -1)
    return classes
