"""All that is counted on one image, in a record of a few kilobytes.

| count | remarks |
|---|---|
| PQ | also by the size of the segments: COCO's areas below 32^2, below 96^2 and above |
| boundary PQ | when asked for |
| confusion | true segments by the class of the predicted segment that matches by IoU alone |

A matched pair has the size of its true segment, a false positive its own.

Shapes: C classes, T true and P predicted segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panoptic.metrics.average_precision import InstanceOverlaps
from panoptic.metrics.boundary import boundary_overlaps
from panoptic.metrics.panoptic_quality import Pairs, QualityCounts, check_labels, overlaps, pair
from panoptic.segmentation import Segmentation

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""Names and areas in pixels (from, below) of the true segment: COCO's."""

Sparse = tuple[np.ndarray, np.ndarray]
"""Classes and rows of counts, as `QualityCounts.nonzero` gives them."""


@dataclass(frozen=True)
class ImageCounts:
    """The counts of one image."""

    quality: Sparse
    sizes: tuple[Sparse, ...]
    """PQ by the size of the segments, in the order of `SIZES`."""
    confusion: np.ndarray
    """int64 [K, 3]: true class, predicted class, number of segments. Class C is "none": missed or made up."""
    boundary: Sparse | None = None
    instances: InstanceOverlaps | None = None
    """Overlaps of instances, for AP."""
    recall: tuple[int, int] | None = None
    """Number of true things that some region proposal covers, and of all."""
    name: str = ""
    """The image's name."""

    def pq(self, classes: int) -> float:
        """PQ of this image alone, 0 to 100: the mean over the classes that occur in it, NaN for none."""
        counts = QualityCounts.from_nonzero(*self.quality, classes)
        weight = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
        known = weight > 0
        return float(100 * (counts.iou[known] / weight[known]).mean()) if known.any() else float("nan")


def count_image(
    truth: Segmentation,
    prediction: Segmentation,
    classes: int,
    boundary: bool = False,
    instances: InstanceOverlaps | None = None,
    name: str = "",
    recall: tuple[int, int] | None = None,
) -> ImageCounts:
    """Compare one predicted map with its truth.

    Args:
        truth: at its original size.
        prediction: at the same size.
        classes: C.
        boundary: count boundary PQ, too.
        instances, name, recall: passed on.

    Raises:
        ValueError: the maps differ in size, or hold a segment or class that does not exist.
    """
    table = overlaps(truth, prediction)
    check_labels(truth.labels, prediction.labels, classes)
    labels = truth.labels, prediction.labels
    crowd = truth.is_crowd()
    pairs = pair(table, truth.labels, crowd, prediction.labels)
    inner = None
    if boundary:
        inner = pair(table, truth.labels, crowd, prediction.labels, boundary_overlaps(truth, prediction))
    return ImageCounts(
        quality=pairs.counts(*labels, classes).nonzero(),
        sizes=_by_size(pairs, table, labels, classes),
        confusion=_confusion(pair(table, truth.labels, crowd, prediction.labels, same_class=False), labels, classes),
        boundary=None if inner is None else inner.counts(*labels, classes).nonzero(),
        instances=instances,
        recall=recall,
        name=name,
    )


def _by_size(
    pairs: Pairs, table: np.ndarray, labels: tuple[np.ndarray, np.ndarray], classes: int
) -> tuple[Sparse, ...]:
    """The counts of each range of `SIZES`."""
    areas = table.sum(1)[1:], table.sum(0)[1:]
    return tuple(
        pairs.counts(
            *labels, classes, ((low <= areas[0]) & (areas[0] < high), (low <= areas[1]) & (areas[1] < high))
        ).nonzero()
        for low, high in SIZES.values()
    )


def _confusion(pairs: Pairs, labels: tuple[np.ndarray, np.ndarray], classes: int) -> np.ndarray:
    """`ImageCounts.confusion` of segments that were paired whatever their class."""
    missed, false = labels[0][pairs.missed], labels[1][pairs.false]
    rows = np.concatenate([labels[0][pairs.truth], missed, np.full(len(false), classes)])
    columns = np.concatenate([labels[1][pairs.prediction], np.full(len(missed), classes), false])
    cells, numbers = np.unique(rows * (classes + 1) + columns, return_counts=True)
    return np.stack([*np.divmod(cells, classes + 1), numbers], 1).astype(np.int64).reshape(-1, 3)
