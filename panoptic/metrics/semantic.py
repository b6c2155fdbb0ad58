"""Agreement of class maps: pixel counts over pairs of maps, confusion matrix, mean IoU, pixel accuracy; and how many
things region proposals cover.

Shapes: H x W pixels, C classes, N things of an image, P proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panoptic.rle import bounding_boxes, encode_segments
from panoptic.segmentation import IGNORE, Categories, Segmentation

_BLOCK = 1 << 17
"""Pixels that are compared at once: what is written then still lies in the cache when it is read."""


def runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs over which a pair of maps is constant, in raster order.

    Label maps are constant over long runs, so that whatever is counted per run instead of per pixel is
    10 to 100 times less work. Comparing neighbours is all that touches every pixel.

    Args:
        first, second: [H, W] (or any equal shape) of one or two integer types.

    Returns:
        the value of `first` and of `second` in each run, and its length int64, all [R].
    """
    a, b = np.ascontiguousarray(first).ravel(), np.ascontiguousarray(second).ravel()
    found = [np.zeros(min(a.size, 1), np.intp)]
    for start in range(1, a.size, _BLOCK):
        stop = min(start + _BLOCK, a.size)
        changes = a[start:stop] != a[start - 1 : stop - 1]
        changes |= b[start:stop] != b[start - 1 : stop - 1]
        found.append(np.flatnonzero(changes) + start)
    starts = np.concatenate(found)
    return a[starts], b[starts], np.diff(starts, append=a.size)


def tabulate(first: np.ndarray, second: np.ndarray, lengths: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sum `lengths` into an int64 [rows, columns] table at (first, second); all are int [R] and in range."""
    keys = first.astype(np.int64) * columns + second
    # float64 sums of whole numbers are exact below 2^53 pixels
    return np.bincount(keys, weights=lengths, minlength=rows * columns).astype(np.int64).reshape(rows, columns)


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count the pixels of each (true class, predicted class).

    Args:
        truth: int [H, W], 0..C-1, `IGNORE` (-1) where void; those pixels are not counted.
        prediction: int [H, W], 0..C-1, `IGNORE` where the prediction is void.
        classes: C.

    Returns:
        int64 [C, C + 1]; the last column holds the pixels that the prediction left void.

    Raises:
        ValueError: the maps differ in size, or a value lies outside -1..C-1.
    """
    if truth.shape != prediction.shape:
        raise ValueError(
            f"truth is {truth.shape} but the prediction is {prediction.shape}; resize the prediction first"
        )
    a, b, lengths = runs(truth, prediction)
    for name, values in (("truth", a), ("prediction", b)):
        if values.size and not IGNORE <= values.min() <= values.max() < classes:
            raise ValueError(
                f"{name}: classes run from {values.min()} to {values.max()}, expected {IGNORE} to {classes - 1}; "
                f"map every other value of void to {IGNORE}"
            )
    # void truth becomes a last row, void prediction a last column
    a, b = np.where(a == IGNORE, classes, a), np.where(b == IGNORE, classes, b)
    return tabulate(a, b, lengths, classes + 1, classes + 1)[:classes]


@dataclass(frozen=True)
class Regions:
    """How well class maps agree, in percent; NaN where there was nothing to evaluate."""

    iou: np.ndarray
    """float64 [C], NaN for a class that neither truth nor prediction holds."""
    mean_iou: float
    """Over the classes that are not NaN."""
    pixel_accuracy: float
    """Right pixels among those whose truth is not void; a void prediction is wrong."""

    def mean_of(self, classes: tuple[int, ...]) -> float:
        """Mean IoU of some classes, NaN where none of them occurs."""
        return _mean(self.iou[list(classes)])

    def by_kind(self, categories: Categories) -> tuple[float, float, float]:
        """Mean IoU of all, things and stuff."""
        return self.mean_iou, self.mean_of(categories.things), self.mean_of(categories.stuff)


def mean_iou(confusion: np.ndarray) -> Regions:
    """IoU of each class, their mean and the pixel accuracy of summed confusion matrices int64 [C, C + 1].

    IoU = right / (truth + predicted - right) over the pixels whose truth is not void. A class that is
    predicted but never true counts with 0.
    """
    right = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - right
    iou = np.divide(100 * right, union, out=np.full(len(right), np.nan), where=union > 0)
    total = confusion.sum()
    return Regions(iou, _mean(iou), float(100 * right.sum() / total) if total else float("nan"))


@dataclass(frozen=True)
class RecallCounts:
    """How many true things some proposal covers; counts of images add up."""

    covered: np.ndarray
    """int64 [C]."""
    total: np.ndarray
    """int64 [C], true things that are no crowd; 0 for stuff."""

    def __add__(self, other: RecallCounts) -> RecallCounts:
        return RecallCounts(self.covered + other.covered, self.total + other.total)

    @classmethod
    def zeros(cls, classes: int) -> RecallCounts:
        """Of no image."""
        return cls(np.zeros(classes, np.int64), np.zeros(classes, np.int64))

    @property
    def recall(self) -> float:
        """Percent of all things; NaN where there is none."""
        total = self.total.sum()
        return float(100 * self.covered.sum() / total) if total else float("nan")

    @property
    def mean_recall(self) -> float:
        """Percent of the things of a class, averaged over the classes that occur; NaN where none does."""
        known = self.total > 0
        return _mean(100 * self.covered[known] / self.total[known])


def count_recall(truth: Segmentation, boxes: np.ndarray, categories: Categories, overlap: float = 0.5) -> RecallCounts:
    """Which things of an image are covered by a proposal: recall of region proposals.

    A thing is covered if any box overlaps its own box by `overlap` at least; one proposal may cover several.

    Args:
        truth: at the size to which the boxes refer; crowds and segments without a pixel are not counted.
        boxes: float [P, 4], x0 y0 x1 y1, half-open.
        categories: tell which classes are things.
        overlap: least intersection over union.
    """
    wanted = np.array(categories.is_thing, bool)[truth.labels] & ~truth.is_crowd() & (truth.areas() > 0)
    entries = np.flatnonzero(wanted)
    classes = len(categories)
    if not len(entries):
        return RecallCounts.zeros(classes)
    things = bounding_boxes(encode_segments(truth.segments, entries + 1))
    proposed = np.asarray(boxes, np.float64).reshape(-1, 4)
    low = np.maximum(things[:, None, :2], proposed[:, :2])
    shared = np.clip(np.minimum(things[:, None, 2:], proposed[:, 2:]) - low, 0, None).prod(2)
    areas = [(part[:, 2:] - part[:, :2]).prod(1) for part in (things, proposed)]
    hit = (shared >= overlap * (areas[0][:, None] + areas[1] - shared)).any(1)
    labels = truth.labels[entries]
    return RecallCounts(np.bincount(labels[hit], minlength=classes), np.bincount(labels, minlength=classes))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
