"""A study's table in every form, and what it claims."""

from __future__ import annotations

import math

from pipelines.studies import STUDIES
from pipelines.studies.statistics import Cell
from pipelines.studies.table import plot, table_of, verdict


def cells(*groups: tuple[float, ...], paper: str = "") -> list[Cell]:
    given = paper.split() or ("-",) * len(groups)
    return [Cell(p, group) for p, group in zip(given, groups, strict=True)]


def test_differences_are_claimed_beyond_the_noise_only():
    lines = verdict(["a", "b", "c"], cells((10.0, 12.0), (20.0, 20.0), (11.0, 12.0), paper="1.0 3.0 2.0"), "PQ")
    text = "\n".join(lines)
    assert "Noise of one run: PQ ± 0.91 (3 degrees of freedom)." in text
    assert "Beyond the noise (all of these together with 95% confidence): b over a by 9.00; b over c by 8.50." in text
    assert "Within it: c over a by 0.50." in text and "seed by seed" not in text
    assert "The order of the means is the paper's: b > c > a." in text
    one = verdict(["a", "b"], cells((10.0,), (20.0,)), "PQ")
    assert one == ["One seed: its noise is unknown, so no difference is claimed (--seeds 2 or more)."]
    assert "nothing to compare" in verdict(["a", "b"], cells((10.0,), (math.nan,)), "PQ")[0]
    other = verdict(["a", "b"], cells((10.0, 11.0), (20.0, 21.0), paper="3.0 1.0"), "PQ")
    assert "Order of the means: b > a; the paper's: a > b." in other[-1]


def test_what_is_unknown_is_not_claimed():
    lost = verdict(["a", "b"], cells((10.0, math.nan), (math.nan, 20.0)), "PQ")
    assert lost == ["No row has the figures of two seeds: the noise is unknown, so no difference is claimed."]
    alike = verdict(["a", "b"], cells((10.0, 10.0), (12.0, 12.0)), "PQ")
    assert alike == ["All seeds of a row gave the same figure: the noise is unknown, so no difference is claimed."]
    nought = "\n".join(verdict(["a", "b"], cells((10.0, 10.001), (10.0, 10.001)), "PQ"))
    assert "confidence): no difference." in nought and "Within it: a over b by 0.00." in nought


def test_a_table_in_every_form():
    definition = STUDIES["aspp"]
    body = [[Cell(p, (float(p) + 1, float(p) + 1.2)) for p in row.figures(3)] for row in definition.rows]
    made = table_of("aspp", definition, body, "40 steps, 2 seeds")
    assert "40 steps, 2 seeds" in made.text and "dual ASPP" in made.text and "19.484" in made.text
    assert "20.58 ± 0.14" in made.text and made.markdown.count("\n| ") >= 3
    assert made.csv.splitlines()[0].startswith("row,PQ paper,PQ mean,PQ deviation,PQ seeds,things paper")
    assert made.rows[0]["PQ paper"] == "19.484" and made.plot.startswith("<svg") and made.plot.endswith("</svg>")
    empty = plot("<none>", ["a"], [Cell("-", ())], "PQ")
    assert "&lt;none&gt;" in empty and "nan" not in empty
