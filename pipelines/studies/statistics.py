"""Differences beyond the noise of the seeds: t-tests between a table's rows, held together by Holm's procedure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from pipelines.studies.study import NONE

SIGNIFICANCE = 0.05
"""Probability that any of the differences that a table claims is none: of all of them together (Holm 1979)."""


ROUNDING = 1e-6
"""Standard deviations below it are rounding and no noise that was measured."""


@dataclass(frozen=True)
class Cell:
    """One metric of a row: the paper's figure, and ours under each seed."""

    paper: str
    """The paper's figure as it prints it; "-" where it gives none."""
    ours: tuple[float, ...]
    """One value a seed; NaN where a run has none."""
    trainings: tuple[str, ...] = ()
    """Key of the training behind each value; cells with the same keys are evaluations of one training. () = its own."""
    decimals: int = 2
    """Digits behind the point of our figures."""

    @property
    def published(self) -> float | None:
        """The paper's figure as a number."""
        return None if self.paper == NONE else float(self.paper)

    @property
    def values(self) -> tuple[float, ...]:
        """The values that there are."""
        return tuple(value for value in self.ours if value == value)

    @property
    def mean(self) -> float:
        """Mean of the values; NaN without any."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample (n - 1); NaN below two values."""
        if len(self.values) < 2:
            return math.nan
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1))

    def shares(self, other: Cell) -> bool:
        """True if both are evaluations of one training a seed."""
        return bool(self.trainings) and self.trainings == other.trainings

    def text(self) -> str:
        """Mean and deviation as text: `42.10 ± 0.31`."""
        if not self.values:
            return "-"
        digits = f".{self.decimals}f"
        return f"{self.mean:{digits}}" + (f" ± {self.deviation:{digits}}" if len(self.values) > 1 else "")


def pooled_deviation(cells: Sequence[Cell]) -> tuple[float, int]:
    """Standard deviation of one run, pooled over all trainings, and its degrees of freedom; NaN and 0 with one seed.

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
    """The difference between two rows."""

    text: str
    """`a over b by 1.23`."""
    p_value: float
    """Probability of a difference at least as large between rows that do not differ, by Student's two-sided t-test; 1
    where the noise is unknown."""


def compare(a: tuple[str, Cell], b: tuple[str, Cell], deviation: float, freedom: int) -> Comparison:
    """Compare two rows under the pooled noise; rows of one training seed by seed, under the noise of their differences.

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
        paired = Cell(NONE, tuple(x - y for x, y in zip(first.ours, second.ours, strict=True)))
        difference, freedom = paired.mean if paired.values else difference, len(paired.values) - 1
        error = paired.deviation / math.sqrt(len(paired.values)) if freedom > 0 else math.nan
    if difference < 0:
        one, other, difference = other, one, -difference
    known = error > ROUNDING and round(difference, 2) > 0
    p_value = 2 * float(student.sf(difference / error, freedom)) if known else 1.0
    return Comparison(f"{one} over {other} by {difference:.2f}", p_value)


def holm(p_values: Sequence[float]) -> list[bool]:
    """True for each difference that Holm's procedure claims: all of these hold with 95 % confidence together."""
    claimed = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > SIGNIFICANCE / (len(p_values) - rank):
            break
        claimed[place] = True
    return claimed
