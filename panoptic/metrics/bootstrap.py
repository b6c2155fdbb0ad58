"""Confidence intervals of PQ, and of the difference of two, by the bootstrap over images (Efron, 1979).

Images are drawn with replacement, their counts added, PQ computed; 95 % of such PQs lie in the interval. Two models are
compared on the same draws, so that images which are hard for both cancel out.

Draws of few images are nearly all alike, and of one image they are all the same: their interval has no width whatever
chance does. So nothing is certain that rests on fewer than `LEAST` images.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from panoptic.metrics.image import Sparse
from panoptic.metrics.semantic import known_mean
from panoptic.segmentation import Categories

if TYPE_CHECKING:
    from scipy import sparse

ROUNDS = 1000
"""Draws of an interval."""

LEVEL = 95.0
"""Percent of the draws that an interval holds."""

LEAST = 20
"""Images from which on an interval is believed. With fewer it is much too narrow: of n images the spread of the draws
is too small by sqrt((n - 1) / n) and its tails, which decide, rest on one or two images."""


@dataclass(frozen=True)
class Counts:
    """The PQ counts of each image of a set, to be stored and drawn from."""

    names: tuple[str, ...]
    """The names of the N images."""
    places: np.ndarray
    """int64 [K, 2], image and class of each row of `values`."""
    values: np.ndarray
    """float64 [K, 4]: iou, tp, fp, fn."""

    @classmethod
    def of(cls, names: Sequence[str], images: Sequence[Sparse]) -> Counts:
        """Join the counts of images.

        Args:
            names: of the N images.
            images: the counts of each.
        """
        places = [np.stack([np.full(len(c), k), c], 1) for k, (c, _) in enumerate(images)]
        return cls(
            tuple(names),
            np.concatenate([np.zeros((0, 2), np.int64), *places]).astype(np.int64),
            np.concatenate([np.zeros((0, 4)), *(values for _, values in images)]),
        )

    def table(self, classes: int) -> sparse.csr_array:
        """float64 [4 C, N], by kind of count and class."""
        from scipy import sparse

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
    images: int
    """The number of images it rests on: those in which the class occurs, all for the groups."""

    @property
    def certain(self) -> bool:
        """True where `LEAST` images or more leave 0 outside the interval."""
        return self.images >= LEAST and (self.low > 0 or self.high < 0)


def intervals(counts: Counts, categories: Categories, rounds: int = ROUNDS, seed: int = 0) -> dict[str, Interval]:
    """PQ of `all`, `things`, `stuff` and of each class (its index as text), with their intervals."""
    draws, table = _draws(len(counts.names), rounds, seed), counts.table(len(categories))
    samples = np.stack([_figures(table, weights, categories) for weights in draws])
    return _intervals(samples, _telling([counts], len(categories)))


def differences(
    first: Counts, second: Counts, categories: Categories, rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Interval]:
    """PQ of `second` minus PQ of `first`, as `intervals` gives them.

    Raises:
        ValueError: they are of different images.
    """
    if first.names != second.names:
        raise ValueError("the two models were evaluated on different images; evaluate both on the same split")
    draws = _draws(len(first.names), rounds, seed)
    tables = [counts.table(len(categories)) for counts in (first, second)]
    pairs = [[_figures(table, weights, categories) for table in tables] for weights in draws]
    samples = np.array(pairs)
    return _intervals(samples[:, 1] - samples[:, 0], _telling([first, second], len(categories)))


def beyond_noise(difference: Mapping[str, Interval]) -> bool:
    """True where the second model is better by more than the draws vary, on enough images to say so.

    Args:
        difference: of `differences`.
    """
    return difference["all"].certain and difference["all"].low > 0


def _telling(sets: Sequence[Counts], classes: int) -> list[int]:
    """The number of images on which the figure of each group and class rests."""
    places = np.unique(np.concatenate([counts.places for counts in sets]), axis=0)
    return [len(sets[0].names)] * 3 + np.bincount(places[:, 1], minlength=classes).tolist()


def _draws(images: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Weights [N] of each draw: each image once in the first (the figure itself), then as often as chance takes it.

    One after the other: all of them would take 8 kB an image.
    """
    rng = np.random.default_rng(seed)
    yield np.ones(images)
    for _ in range(rounds):
        yield np.bincount(rng.integers(images, size=images), minlength=images)


def _figures(table: sparse.csr_array, weights: np.ndarray, categories: Categories) -> np.ndarray:
    """float64 [3 + C]: PQ of all, things, stuff and each class."""
    iou, tp, fp, fn = (table @ weights).reshape(4, len(categories))
    weight = tp + 0.5 * fp + 0.5 * fn
    pq = np.divide(100 * iou, weight, out=np.full(len(categories), np.nan), where=weight > 0)
    groups = [known_mean(pq), known_mean(pq[list(categories.things)]), known_mean(pq[list(categories.stuff)])]
    return np.concatenate([groups, pq])


def _intervals(samples: np.ndarray, images: Sequence[int]) -> dict[str, Interval]:
    """The interval of each figure.

    Args:
        samples: float64 [1 + rounds, 3 + C], the figure itself and its draws.
        images: of each figure, as `_telling` counts them.
    """
    names = ["all", "things", "stuff", *map(str, range(len(images) - 3))]
    result = {}
    for name, column, telling in zip(names, samples.T, images, strict=True):
        drawn = column[1:][~np.isnan(column[1:])]
        edges = (50 - LEVEL / 2, 50 + LEVEL / 2)
        low, high = np.percentile(drawn, edges) if drawn.size else (np.nan, np.nan)
        result[name] = Interval(float(column[0]), float(low), float(high), telling)
    return result
