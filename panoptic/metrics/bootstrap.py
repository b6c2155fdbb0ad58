"""How sure a PQ, or the difference of two, is: bootstrap over images (Efron, 1979).

Images are drawn with replacement, their counts added, PQ taken; 95 % of such PQs lie in the interval. Two models
are compared on the same draws, so that what all models find hard cancels out.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from panoptic.metrics.image import Sparse
from panoptic.segmentation import Categories

ROUNDS = 1000
LEVEL = 95.0
"""Percent of the draws that an interval holds."""


@dataclass(frozen=True)
class Counts:
    """The PQ counts of each image of a set, to be stored and drawn from."""

    names: tuple[str, ...]
    """Of the N images."""
    places: np.ndarray
    """int64 [K, 2], image and class of each row of `values`."""
    values: np.ndarray
    """float64 [K, 4]: iou, tp, fp, fn."""

    @classmethod
    def of(cls, names: Sequence[str], images: Sequence[Sparse]) -> Counts:
        """From the counts of each image."""
        places = [np.stack([np.full(len(c), k), c], 1) for k, (c, _) in enumerate(images)]
        return cls(
            tuple(names),
            np.concatenate([np.zeros((0, 2), np.int64), *places]).astype(np.int64),
            np.concatenate([np.zeros((0, 4)), *(values for _, values in images)]),
        )

    def table(self, classes: int) -> sparse.csr_array:
        """float64 [4 C, N], by kind of count and class."""
        rows = self.places[:, 1][None] + classes * np.arange(4)[:, None]
        columns = np.broadcast_to(self.places[:, 0], rows.shape)
        cells = (self.values.T.ravel(), (rows.ravel(), columns.ravel()))
        return sparse.csr_array(cells, shape=(4 * classes, len(self.names)))


@dataclass(frozen=True)
class Interval:
    """A figure in percent and where 95 % of its draws lie; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def intervals(counts: Counts, categories: Categories, rounds: int = ROUNDS, seed: int = 0) -> dict[str, Interval]:
    """PQ of `all`, `things`, `stuff` and of each class (its index as text), with their intervals."""
    draws = _draws(len(counts.names), rounds, seed)
    samples = np.stack([_figures(counts.table(len(categories)), weights, categories) for weights in draws])
    return _intervals(samples, categories)


def differences(
    first: Counts, second: Counts, categories: Categories, rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Interval]:
    """PQ of `second` minus PQ of `first`, as `intervals` gives them.

    Raises:
        ValueError: they are of different images.
    """
    if first.names != second.names:
        raise ValueError("the two models were judged on different images; judge both on the same split")
    draws = _draws(len(first.names), rounds, seed)
    tables = [counts.table(len(categories)) for counts in (first, second)]
    pairs = [[_figures(table, weights, categories) for table in tables] for weights in draws]
    samples = np.array(pairs)
    return _intervals(samples[:, 1] - samples[:, 0], categories)


def beyond_noise(difference: Mapping[str, Interval]) -> bool:
    """Whether the second model is better by more than the draws vary."""
    return difference["all"].low > 0


def _draws(images: int, rounds: int, seed: int) -> list[np.ndarray]:
    """How often each image is taken: once in the first draw (the figure itself), then by chance."""
    rng = np.random.default_rng(seed)
    chance = [np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(rounds)]
    return [np.ones(images), *chance]


def _figures(table: sparse.csr_array, weights: np.ndarray, categories: Categories) -> np.ndarray:
    """float64 [3 + C]: PQ of all, things, stuff and each class."""
    iou, tp, fp, fn = (table @ weights).reshape(4, len(categories))
    weight = tp + 0.5 * fp + 0.5 * fn
    pq = np.divide(100 * iou, weight, out=np.full(len(categories), np.nan), where=weight > 0)
    groups = [_mean(pq), _mean(pq[list(categories.things)]), _mean(pq[list(categories.stuff)])]
    return np.concatenate([groups, pq])


def _intervals(samples: np.ndarray, categories: Categories) -> dict[str, Interval]:
    names = ["all", "things", "stuff", *map(str, range(len(categories)))]
    found = {}
    for name, column in zip(names, samples.T, strict=True):
        drawn = column[1:][~np.isnan(column[1:])]
        edges = (50 - LEVEL / 2, 50 + LEVEL / 2)
        low, high = np.percentile(drawn, edges) if drawn.size else (np.nan, np.nan)
        found[name] = Interval(float(column[0]), float(low), float(high))
    return found


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
