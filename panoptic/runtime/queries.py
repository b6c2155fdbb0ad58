"""The merge of MaskFormer, Mask2Former and EoMT (arXiv 2107.06278, section 3.4).

A pixel goes to the confident query of the highest product of class and mask probability, and a query that loses too
much of its own mask is dropped.

Shapes: Q queries, K classes, D mask channels, h x w cells of a mask, n confident queries, H x W the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from panoptic.runtime.place import Place, sigmoid, softmax, to_output
from panoptic.segmentation import VOID, Categories, Segmentation


def merge(
    outputs: Mapping[str, np.ndarray], place: Place, categories: Categories, rules: Mapping[str, Any]
) -> Segmentation:
    """The panoptic map of one image, with the probability of each segment's class.

    Args:
        outputs: "classes" [1, Q, K + 1] ("no object" last), "embeddings" [1, Q, D] and "features" [1, D, h, w].
        place: of the image.
        categories: tell things from stuff.
        rules: "threshold", "overlap", "inside" and "step", of which canvases are multiples.
    """
    probabilities = softmax(outputs["classes"][0])
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    kept = np.flatnonzero((labels != probabilities.shape[-1] - 1) & (scores > rules["threshold"]))
    if not len(kept):
        nothing = np.zeros(0, np.int64)
        return Segmentation(np.full(place.output, VOID, np.int32), nothing, scores=nothing.astype(np.float32))
    scores, labels, place = scores[kept], labels[kept], place.rounded(rules["step"])
    features = outputs["features"][0]
    masks = (outputs["embeddings"][0, kept] @ features.reshape(len(features), -1)).reshape(-1, *features.shape[1:])
    # codes: 2 k + 1 where query k (1..n) wins and its mask is at least 1/2, 2 k where it is less
    best = np.full(place.output, -1, np.float32)
    codes = np.zeros(place.output, np.int32)
    whole = np.zeros(len(kept), np.int64)
    for k, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        probability = sigmoid(to_output(mask, place))
        own = probability >= 0.5
        whole[k] = np.count_nonzero(own)
        probability *= score
        won = probability > best
        codes[won] = own[won] + np.int32(2 * k + 2)
        np.maximum(best, probability, out=best)
    won = np.bincount(codes.reshape(-1), minlength=2 * len(kept) + 2).reshape(-1, 2)[1:]
    painted = won[:, 1] if rules["inside"] else won.sum(1)
    accepted = (painted > 0) & (whole > 0) & (won.sum(1) >= rules["overlap"] * whole)
    numbers, chosen = _numbered(accepted, labels, categories)
    table = np.zeros(2 * len(kept) + 2, np.int32)
    table[2::2], table[3::2] = (0 if rules["inside"] else numbers), numbers
    return Segmentation(table[codes], labels[chosen].astype(np.int64), scores=scores[chosen])


def _numbered(accepted: np.ndarray, labels: np.ndarray, categories: Categories) -> tuple[np.ndarray, list[int]]:
    """The segment of each query, int32 [n] (0 = none), and the query that each segment began with.

    Queries of one class of stuff are one segment.
    """
    numbers, chosen = np.zeros(len(labels), np.int32), []
    of_stuff: dict[int, int] = {}
    for k in np.flatnonzero(accepted).tolist():
        label = int(labels[k])
        if label in of_stuff:
            numbers[k] = of_stuff[label]
            continue
        chosen.append(k)
        numbers[k] = len(chosen)
        if not categories.is_thing[label]:
            of_stuff[label] = len(chosen)
    return numbers, chosen
