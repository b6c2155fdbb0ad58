"""Recall of region proposals (JSIS-Net, arXiv 1809.02110, table 4).

Shapes: C classes, N things of an image, P proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panoptic.rle import bounding_boxes, encode_segments
from panoptic.segmentation import Categories, Segmentation


@dataclass(frozen=True)
class RecallCounts:
    """The true things of one image, and those that some proposal covers."""

    covered: np.ndarray
    """int64 [C], true things that some proposal covers."""
    total: np.ndarray
    """int64 [C], true things that are no crowd; 0 for stuff."""


def count_recall(truth: Segmentation, boxes: np.ndarray, categories: Categories, overlap: float = 0.5) -> RecallCounts:
    """Count the things of an image that a proposal covers.

    A thing is covered if any proposal overlaps its own box by `overlap` at least; one proposal may cover several.

    Args:
        truth: at the size to which the boxes refer; crowds and segments without a pixel are not counted.
        boxes: float [P, 4], x0 y0 x1 y1, half-open.
        categories: tell which classes are things.
        overlap: least intersection over union.
    """
    classes = len(categories)
    counted = np.array(categories.is_thing, bool)[truth.labels] & ~truth.is_crowd() & (truth.areas() > 0)
    entries = np.flatnonzero(counted)
    things = bounding_boxes(encode_segments(truth.segments, entries + 1))
    proposed = np.asarray(boxes, np.float64).reshape(-1, 4)
    # the area that each thing [N, 1] shares with each proposal [P]
    low = np.maximum(things[:, None, :2], proposed[:, :2])
    shared = np.clip(np.minimum(things[:, None, 2:], proposed[:, 2:]) - low, 0, None).prod(2)
    areas = [(part[:, 2:] - part[:, :2]).prod(1) for part in (things, proposed)]
    # IoU >= overlap, without a division
    covered = (shared >= overlap * (areas[0][:, None] + areas[1] - shared)).any(1)
    labels = truth.labels[entries]
    return RecallCounts(np.bincount(labels[covered], minlength=classes), np.bincount(labels, minlength=classes))
