"""One image's errors in a sentence: the largest segments that a prediction lost, and those that it made up, by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from panoptic.metrics.panoptic_quality import overlaps, pair
from panoptic.segmentation import Categories, Segmentation

NAMED = 3
"""Segments of each kind that are named; the others are counted."""


def error_sentence(truth: Segmentation, prediction: Segmentation, categories: Categories) -> str:
    """A sentence on the errors of a predicted map, the costliest first.

    A lost segment is a true one without a match, a made-up one a predicted one that is a false positive, as PQ counts
    them. Of a lost one it is said which class lies on most of it. Where every segment has a match, the worst outline is
    named.

    Args:
        truth, prediction: maps of one image, of the same size.
        categories: the classes of both.

    Returns:
        such as "Lost: bus, 31.2 % of the image, taken for truck; 2 more. Made up: car, 3.1 %."; "" of a perfect map.
    """
    table = overlaps(truth, prediction)
    pairs = pair(table, truth.labels, truth.is_crowd(), prediction.labels)
    whole = truth.segments.size
    parts = []
    lost = sorted(np.flatnonzero(pairs.missed).tolist(), key=lambda t: -table[t + 1].sum())
    if lost:
        named = [_lost(t, table, truth, prediction, categories, whole) for t in lost[:NAMED]]
        parts.append(f"Lost: {_listed(named, len(lost))}.")
    made = sorted(np.flatnonzero(pairs.false).tolist(), key=lambda p: -table[:, p + 1].sum())
    if made:
        named = [
            f"{categories.names[prediction.labels[p]]}, {_share(table[:, p + 1].sum(), whole)}" for p in made[:NAMED]
        ]
        parts.append(f"Made up: {_listed(named, len(made))}.")
    if not parts and len(pairs.iou) and pairs.iou.min() < 1:
        worst = int(pairs.iou.argmin())
        name = categories.names[truth.labels[pairs.truth[worst]]]
        parts.append(
            f"Every segment has a match; the worst outline is that of {name}, IoU {100 * pairs.iou[worst]:.0f} %."
        )
    return " ".join(parts)


def _lost(
    t: int, table: np.ndarray, truth: Segmentation, prediction: Segmentation, categories: Categories, whole: int
) -> str:
    """A lost segment: its class, its share of the image, and what lies on most of it."""
    label = int(truth.labels[t])
    by_class = np.bincount(prediction.labels, weights=table[t + 1, 1:], minlength=len(categories))
    name = f"{categories.names[label]}, {_share(table[t + 1].sum(), whole)} of the image"
    found = int(by_class.argmax())
    if table[t + 1, 0] >= by_class[found]:
        return f"{name}, where nothing was found"
    if found == label:
        return f"{name}, of which too little or too much was found"
    return f"{name}, taken for {categories.names[found]}"


def _listed(named: Sequence[str], count: int) -> str:
    return "; ".join([*named, *([f"{count - len(named)} more"] if count > len(named) else [])])


def _share(pixels: float, whole: int) -> str:
    return f"{100 * pixels / whole:.1f} %"
