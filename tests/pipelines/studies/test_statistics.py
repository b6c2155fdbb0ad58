"""Means, deviations and tests of the figures that a study compares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipelines.studies.statistics import Cell, compare, holm, pooled_deviation
from pipelines.studies.table import verdict
from tests.pipelines.studies.test_table import cells


def test_means_and_deviations():
    cell = Cell("6.35", (10.0, 12.0, math.nan))
    assert cell.mean == 11.0 and cell.deviation == pytest.approx(math.sqrt(2)) and cell.text() == "11.00 ± 1.41"
    assert Cell("-", (5.0,)).text() == "5.00" and Cell("-", (math.nan,)).text() == "-" == Cell("-", ()).text()
    deviation, freedom = pooled_deviation(cells((10.0, 12.0), (20.0, 20.0)))
    assert (deviation, freedom) == (pytest.approx(1.0), 2)
    a, b = cells((10.0, 12.0), (15.302653, 15.302653))
    comparison = compare(("a", a), ("b", b), deviation, freedom)
    assert comparison.text == "b over a by 4.30" and comparison.p_value == pytest.approx(
        0.05, rel=1e-5
    )  # t of 2 degrees


def test_claims_hold_together():
    """Holm: the k-th smallest chance of m is held against 5 % / (m - k + 1), and the first that exceeds it ends it."""
    assert holm([0.04, 0.01, 0.02]) == [True, True, True]
    assert holm([0.04, 0.02, 0.03]) == [False, False, False]
    assert holm([0.04, 0.01, 0.03]) == [False, True, False] and holm([]) == []
    alone = verdict(["a", "b"], cells((10.0, 10.2), (11.0, 11.2)), "PQ")
    assert "b over a by 1.00" in alone[1]
    several = verdict(list("abcd"), cells((10.0, 10.2), (10.5, 10.7), (10.2, 10.4), (10.3, 10.5)), "PQ")
    assert "no difference" in several[1]  # 0.50 alone would be beyond it: t of 4 degrees is 2.78, x 0.14 = 0.39


def test_rows_of_one_training_count_once_and_are_compared_seed_by_seed():
    seeds = ("first", "second", "third")
    rows = [Cell("-", (10.0 + k, 12.0 + k, 17.0 + k), seeds) for k in (0.0, 0.01, 1.0)]
    rows[1] = replace(rows[1], ours=(10.5, 12.7, 17.6))
    assert pooled_deviation(rows)[1] == 2 and pooled_deviation([replace(row, trainings=()) for row in rows])[1] == 6
    lines = verdict(["a", "b", "c"], rows, "PQ")
    assert "b over a by 0.60" in lines[1] and "compared seed by seed" in lines[3]  # ± 0.1, where runs differ by 3.6
    apart = [replace(row, trainings=()) for row in rows]
    assert "no difference" in verdict(["a", "b", "c"], apart, "PQ")[1]
    single = Cell("-", (5.0, 6.0, 7.0), ("joint 1", "joint 2", "joint 3"))
    merged = verdict(["joint", "semantic", "instances"], [single, rows[0], rows[0]], "PQ")
    assert "semantic over instances" not in "".join(merged[:-1]) and "4 degrees" in merged[0]
