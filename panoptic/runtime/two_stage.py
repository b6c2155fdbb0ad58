"""The merges of Panoptic FPN and EfficientPS: Mask R-CNN's detections, then things above stuff, or their logits fused.

Shapes: S semantic logits, C channels, h x w a level, N detections, K thing classes, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from panoptic.layers.greedy_merge import merge_by_score
from panoptic.layers.logit_fusion import PastedMask, fuse
from panoptic.rcnn.paste_masks import paste, paste_values
from panoptic.runtime.detr import Graph
from panoptic.runtime.place import Place, best_planes, sigmoid, softmax, to_output
from panoptic.runtime.regions import clip, decode, detect, enlarged, is_empty, look_into, propose
from panoptic.segmentation import IGNORE, Categories, Segmentation


def merge_fpn(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> Segmentation:
    """Panoptic FPN's map of one image; stuff scores 1.

    Args:
        outputs: "semantic" [1, S, h, w] ("things", then stuff), the pooled levels, and "objectness_p2" [1, A, h, w] and
            "deltas_p2" [1, 4 A, h, w] of every level.
        place: of the image.
        categories: tell things from stuff.
        rules: of `detections`; "confidence", "overlap", "stuff_area", and "step", of which canvases are multiples.
        graph: of the heads, "boxes" and "masks".
    """
    corners, scores, labels, masks = detections(outputs, place, categories, rules, graph, rules["confidence"])
    stuff = best_planes(outputs["semantic"][0], place.rounded(rules["step"]))[1]
    return merge_by_score(
        paste(sigmoid(masks), corners, place.output),
        labels.tolist(),
        scores,
        stuff,
        (IGNORE, *categories.stuff),
        confidence=rules["confidence"],
        overlap=rules["overlap"],
        stuff_area=rules["stuff_area"],
    )


def merge_efficientps(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any], graph: Graph
) -> Segmentation:
    """EfficientPS's map of one image; stuff scores 1.

    Args:
        outputs: as of `merge_fpn`, but "semantic" [1, S, h, w] has every class.
        place: of the image.
        categories: tell things from stuff.
        rules: of `detections`; "overlap", "stuff_area", "mask_factor" and "inclusive" of the fusion, "step".
        graph: of the heads, "boxes" and "masks".
    """
    corners, scores, labels, masks = detections(outputs, place, categories, rules, graph, 0.0)
    order = np.argsort(-scores, kind="stable")
    corners, scores, labels, masks = corners[order], scores[order], labels[order], masks[order]
    pasted = []
    for values, box in zip(masks, corners, strict=True):
        if rules["inclusive"]:  # a box of one pixel keeps a sliver, so that there is something to divide by
            box = np.concatenate([box[:2], np.maximum(box[2:] - 1, box[:2] + np.float32(1e-3))])
        pasted.append(PastedMask(*paste_values(values, box, place.output)))
    semantic = _SemanticLogits(outputs["semantic"][0], place.rounded(rules["step"]))
    return fuse(
        pasted,
        np.concatenate([corners, scores[:, None], labels[:, None]], 1).astype(np.float32),
        semantic,
        semantic.best_of(range(len(categories)))[1],
        categories,
        sigmoid,
        overlap=rules["overlap"],
        stuff_area=rules["stuff_area"],
        mask_factor=rules["mask_factor"],
        inclusive=rules["inclusive"],
    )


def detections(
    outputs: Mapping[str, np.ndarray],
    place: Place,
    categories: Categories,
    rules: Mapping[str, Any],
    graph: Graph,
    least: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [N, 4] in pixels of the output, scores [N], classes [N] and mask logits [N, M, M] of one image.

    Args:
        outputs: as of `merge_fpn`.
        place: of the image.
        categories: tell things from stuff.
        rules: "regions" (see `propose`) with the names of its "levels"; "pooled", the names of those that features are
            read from, and their "pooled_strides"; "detection" (see `detect`) with its "code".
        graph: of the heads.
        least: detections score at least this.
    """
    regions, detection = rules["regions"], rules["detection"]
    proposals = propose(
        [outputs[f"objectness_{level}"][0] for level in regions["levels"]],
        [outputs[f"deltas_{level}"][0] for level in regions["levels"]],
        place.size,
        regions,
    )
    features = {level: outputs[level] for level in rules["pooled"]}
    strides: Sequence[int] = rules["pooled_strides"]
    heads = look_into(graph, "boxes", features, strides, proposals)
    codes = heads["deltas"].reshape(len(proposals), -1, 4)
    moved = decode(proposals[:, None], codes, detection["code"])
    boxes, scores, classes = detect(moved, softmax(heads["logits"]), place.size, detection)
    corners = clip(enlarged(boxes, place), place.output)
    kept = (scores >= least) & ~is_empty(corners)
    boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
    masks = look_into(graph, "masks", features, strides, boxes, classes)["masks"]
    return corners[kept], scores, np.array(categories.things, np.int64)[classes], masks


class _SemanticLogits:
    """The logits [S, h, w] of one image's semantic head at output size; a class at a time."""

    def __init__(self, logits: np.ndarray, place: Place) -> None:
        self.logits, self.place = logits, place

    def of(self, label: int) -> np.ndarray:
        """float32 [H, W], the logits of one class."""
        return to_output(self.logits[label], self.place)

    def best_of(self, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The highest logit of some classes at each pixel, and its class."""
        table = np.array(labels)
        best, number = best_planes(self.logits[table], self.place)
        return best, table[number]
