"""What exceeds the noise of the seeds: t-tests on a table's rows, held together by Holm's procedure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

MISTAKEN = 0.05
"""Chance that any of the differences that a table claims is none: of all of them together (Holm 1979)."""


ROUNDING = 1e-6
"""Deviations below it are no noise that was measured."""


@dataclass(frozen=True)
class Cell:
    """One figure of a row."""

    paper: float | None
    ours: tuple[float, ...]
    """One a seed; NaN where a run has none."""
    trainings: tuple[str, ...] = ()
    """What made each; cells with the same come from one training, evaluated in several ways. () = one of its own."""

    @property
    def values(self) -> tuple[float, ...]:
        """Those that there are."""
        return tuple(value for value in self.ours if value == value)

    @property
    def mean(self) -> float:
        """NaN without any."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Of the sample (n - 1); NaN below two."""
        if len(self.values) < 2:
            return math.nan
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def shares(self, other: Cell) -> bool:
        """Whether both come from one training a seed."""
        return bool(self.trainings) and self.trainings == other.trainings

    def text(self) -> str:
        """`42.10 ± 0.31`."""
        if not self.values:
            return "-"
        return f"{self.mean:.2f}" + (f" ± {self.deviation:.2f}" if len(self.values) > 1 else "")


def noise(cells: Sequence[Cell]) -> tuple[float, int]:
    """Deviation of a single run, pooled over all trainings, and its degrees of freedom; NaN and 0 with one seed.

    Rows of one training count once: its seeds are no more for being evaluated in several ways.
    """
    groups: dict[object, list[Cell]] = {}
    for place, cell in enumerate(cells):
        if len(cell.values) > 1:
            groups.setdefault(cell.trainings or place, []).append(cell)
    squares, freedom = 0.0, 0
    for group in groups.values():
        degrees = max(len(cell.values) for cell in group) - 1
        squares += degrees * sum(cell.deviation**2 for cell in group) / len(group)
        freedom += degrees
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


@dataclass(frozen=True)
class Comparison:
    """Two rows."""

    text: str
    """`a over b by 1.23`."""
    chance: float
    """Of a difference at least as large between rows that do not differ: Student's two-sided t; 1 where it cannot be
    told."""


def compare(a: tuple[str, Cell], b: tuple[str, Cell], deviation: float, freedom: int) -> Comparison:
    """Two rows under the pooled noise; rows of one training seed by seed, under the noise of their differences.

    Args:
        a: label and figures.
        b: the same of another row.
        deviation: pooled, of one run.
        freedom: its degrees of freedom.
    """
    (one, first), (other, second) = a, b
    difference = first.mean - second.mean
    error = deviation * math.sqrt(1 / len(first.values) + 1 / len(second.values))
    if first.shares(second):
        paired = Cell(None, tuple(x - y for x, y in zip(first.ours, second.ours, strict=True)))
        difference, freedom = paired.mean if paired.values else difference, len(paired.values) - 1
        error = paired.deviation / math.sqrt(len(paired.values)) if freedom > 0 else math.nan
    if difference < 0:
        one, other, difference = other, one, -difference
    told = error > ROUNDING and round(difference, 2) > 0
    chance = 2 * float(student.sf(difference / error, freedom)) if told else 1.0
    return Comparison(f"{one} over {other} by {difference:.2f}", chance)


def beyond_chance(chances: Sequence[float]) -> list[bool]:
    """Holm's procedure: which differences are claimed, so that all of them hold with 95 % together."""
    claimed = [False] * len(chances)
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[place] > MISTAKEN / (len(chances) - rank):
            break
        claimed[place] = True
    return claimed
