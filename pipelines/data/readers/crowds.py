"""All crowds of a class in an image as one segment.

The evaluations of COCO and Cityscapes know one crowd a class and image: of several, the last one listed alone absorbs
false positives (panopticapi, evaluation.py). Merged, the figures depend on no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from panoptic.segmentation import Categories, Segmentation
from pipelines.data.readers.source import Decode, Truth

MERGED = "crowds of a class in one image, merged into its first"
"""Kind of repair, as the manifest adds them up."""


def merge_crowds(truth: Segmentation) -> tuple[Segmentation, int]:
    """A map with one crowd a class, and the number of crowds that are gone; segments keep their order."""
    crowd = truth.is_crowd()
    owner = np.arange(len(truth.labels))
    for label in np.unique(truth.labels[crowd]):
        same = np.flatnonzero(crowd & (truth.labels == label))
        owner[same] = same[0]
    kept = owner == np.arange(len(owner))
    gone = int((~kept).sum())
    if not gone:
        return truth, 0
    position = np.cumsum(kept)[owner]
    segments = np.concatenate([[0], position]).astype(np.int32)[truth.segments]
    scores = None if truth.scores is None else truth.scores[kept]
    return Segmentation(segments, truth.labels[kept], crowd[kept], scores), gone


def decode_merged(
    row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories, *, inner: Decode
) -> Truth:
    """The truth of a row with one crowd a class; a `Decode` around that of the reader."""
    truth = inner(row, read, categories)
    segmentation, gone = merge_crowds(truth.segmentation)
    repairs = {**truth.repairs, MERGED: gone} if gone else truth.repairs
    return truth._replace(segmentation=segmentation, repairs=repairs, areas=None)
