"""Semantic segmentation: confusion matrix, mean IoU and pixel accuracy of class maps.

`runs` and `tabulate` count pixels over a pair of maps; panoptic quality is counted with them, too.

Shapes: H x W pixels, C classes, R runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from panoptic.segmentation import IGNORE, Categories

BLOCK = 1 << 16
"""Pixels that are compared at once: they still lie in the cache when the values of the runs are taken from them."""


def runs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs over which a pair of maps is constant, in raster order.

    Label maps are constant over long runs, so counting runs instead of pixels is 10 to 100 times less work. Only the
    comparison of neighbours touches every pixel.

    Args:
        first, second: [H, W] (or any equal shape) of one or two integer types.

    Returns:
        the value of `first` and of `second` in each run, and its length int64, all [R].
    """
    a, b = np.ascontiguousarray(first).ravel(), np.ascontiguousarray(second).ravel()
    return runs_by_block(a.size, lambda block: (a[block], b[block]))


def runs_by_block(
    size: int, read: Callable[[slice], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`runs` of a pair of maps that are never whole in memory.

    Args:
        size: the number of pixels.
        read: gives both maps on a range of at most `BLOCK` + 1 pixels in raster order; they may be overwritten by the
            next call.
    """
    first, second, starts = [], [], []
    for start in range(0, max(size, 1), BLOCK):
        begin = max(start - 1, 0)  # with the pixel before, as a run that goes on has no start here
        a, b = read(slice(begin, min(start + BLOCK, size)))
        # a run starts at the first pixel, and wherever a pixel differs from the one before it in either map
        changes = np.full(len(a), start == 0)
        np.not_equal(a[1:], a[:-1], out=changes[1:])
        changes[1:] |= b[1:] != b[:-1]
        places = np.flatnonzero(changes)
        first.append(a[places])
        second.append(b[places])
        starts.append(places + begin)
    return np.concatenate(first), np.concatenate(second), np.diff(np.concatenate(starts), append=size)


def tabulate(first: np.ndarray, second: np.ndarray, lengths: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """An int64 [rows, columns] table of pixels: `lengths` summed at (first, second).

    All three are int [R]; `first` is below `rows` and `second` below `columns`.
    """
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
class SemanticQuality:
    """Mean IoU and pixel accuracy of class maps, in percent; NaN where there was nothing to evaluate."""

    iou: np.ndarray
    """float64 [C], NaN for a class that neither truth nor prediction holds."""
    mean_iou: float
    """The mean over the classes that are not NaN."""
    pixel_accuracy: float
    """The share of right pixels among those whose truth is not void; a void prediction is wrong."""

    def mean_of(self, classes: tuple[int, ...]) -> float:
        """Mean IoU of some classes, NaN where none of them occurs."""
        return known_mean(self.iou[list(classes)])

    def by_kind(self, categories: Categories) -> tuple[float, float, float]:
        """Mean IoU of all, things and stuff."""
        return self.mean_iou, self.mean_of(categories.things), self.mean_of(categories.stuff)


def mean_iou(confusion: np.ndarray) -> SemanticQuality:
    """IoU of each class, their mean and the pixel accuracy of summed confusion matrices int64 [C, C + 1].

    IoU = right / (truth + predicted - right) over the pixels whose truth is not void. A class that is
    predicted but never true counts with 0.
    """
    right = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - right
    iou = np.divide(100 * right, union, out=np.full(len(right), np.nan), where=union > 0)
    total = confusion.sum()
    return SemanticQuality(iou, known_mean(iou), float(100 * right.sum() / total) if total else float("nan"))


def known_mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
