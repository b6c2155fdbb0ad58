"""Tables, metrics and rows of one evaluation, as a tracker, a console and a spreadsheet get to see them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from panoptic.metrics.panoptic_quality import QualityCounts, quality
from panoptic.metrics.report import Evaluation, class_rows, class_table, metrics, table
from panoptic.metrics.semantic import mean_iou
from panoptic.metrics.text import markdown_table, metric_name, text_table
from panoptic.segmentation import Categories


@pytest.fixture
def evaluation(small_categories: Categories) -> Evaluation:
    """person PQ 60, sky 40, car 0 (only misses), road and dog absent."""
    counts = QualityCounts(
        np.array([1.2, 0.8, 0, 0, 0]), np.array([1, 1, 0, 0, 0]), np.array([1, 2, 0, 0, 0]), np.array([1, 0, 3, 0, 0])
    )
    confusion = np.zeros((5, 6), np.int64)
    confusion[0, 0], confusion[0, 1], confusion[1, 1], confusion[2, 5] = 6, 2, 8, 4
    return Evaluation(
        quality(counts, small_categories),
        mean_iou(confusion),
        losses={"semantic": 1.5, "centre": 0.5},
        timings={"merge": 0.25},
        images=7,
    )


@pytest.fixture
def stuff_only() -> Evaluation:
    categories = Categories(("sky", "road"), (False, False), (1, 2), ((0, 0, 0), (1, 1, 1)))
    counts = QualityCounts(np.array([0.9, 0]), np.array([1, 0]), np.array([0, 0]), np.array([0, 0]))
    return Evaluation(quality(counts, categories))


def test_each_of_few_classes_has_a_metric_of_its_own(evaluation: Evaluation) -> None:
    own = {name: value for name, value in metrics(evaluation).items() if "class_pq" in name}
    assert own == {f"val/class_pq/{name}": pytest.approx(pq) for name, pq in (("person", 60), ("sky", 40), ("car", 0))}
    names = tuple(f"class {number}" for number in range(33))
    many = Categories(names, (True,) * 33, tuple(range(1, 34)), ((0, 0, 0),) * 33)
    counts = QualityCounts(np.ones(33), np.ones(33, int), np.zeros(33, int), np.zeros(33, int))
    assert not [name for name in metrics(Evaluation(quality(counts, many))) if "class_pq" in name]


def test_metrics_are_flat_in_percent_and_complete(evaluation: Evaluation) -> None:
    flat = metrics(evaluation)
    assert flat["val/pq_things"] == pytest.approx((60 + 0) / 2)
    assert flat["val/pq_stuff"] == pytest.approx(40)
    assert flat["val/pq"] == pytest.approx(100 / 3)
    assert flat["val/sq"] == pytest.approx((120 + 80 + 0) / 3)
    assert flat["val/rq_stuff"] == pytest.approx(50)
    assert flat["val/miou"] == pytest.approx((75 + 80 + 0) / 3)
    assert flat["val/miou_stuff"] == pytest.approx(80)
    assert flat["val/pixel_accuracy"] == pytest.approx(70)
    assert flat["val/loss/total"] == 2
    assert flat["val/loss/centre"] == 0.5
    assert flat["val/time/merge"] == 0.25
    assert flat["val/images"] == 7
    assert all(type(value) is float for value in flat.values())


def test_a_given_total_and_prefix_are_kept(evaluation: Evaluation) -> None:
    flat = metrics(Evaluation(evaluation.quality, losses={"total": 9.0, "a": 1.0}), prefix="novel")
    assert flat["novel/loss/total"] == 9
    assert "novel/miou" not in flat
    assert "novel/loss/total" not in metrics(Evaluation(evaluation.quality), prefix="novel")


def test_names_hold_only_what_a_tracker_admits(evaluation: Evaluation) -> None:
    flat = metrics(Evaluation(evaluation.quality, losses={"mask (dice)": 1.0, "grösse": 2.0}))
    assert "val/loss/mask _dice_" in flat
    assert all(re.fullmatch(r"[A-Za-z0-9_\-. :/]+", name) for name in flat)
    assert metric_name("val/pq_things-a.b c:d") == "val/pq_things-a.b c:d"


def test_a_group_without_a_class_is_nan_and_shown_as_a_dash(stuff_only: Evaluation) -> None:
    flat = metrics(stuff_only)
    assert math.isnan(flat["val/pq_things"])
    assert flat["val/pq"] == flat["val/pq_stuff"] == pytest.approx(90)
    lines = [line.split() for line in table(stuff_only).splitlines()]
    assert lines == [
        ["PQ", "SQ", "RQ", "classes"],
        ["all", "90.00", "90.00", "100.00", "1"],
        ["things", "-", "-", "-", "0"],
        ["stuff", "90.00", "90.00", "100.00", "1"],
    ]


def test_table_shows_mean_iou_where_it_was_counted(evaluation: Evaluation) -> None:
    lines = [line.split() for line in table(evaluation).splitlines()]
    assert lines[0] == ["PQ", "SQ", "RQ", "classes", "mIoU"]
    assert lines[1] == ["all", "33.33", "66.67", "33.33", "3", "51.67"]
    assert [line[0] for line in lines[1:]] == ["all", "things", "stuff"]
    assert len({len(line) for line in table(evaluation).splitlines()}) == 1  # columns line up


def test_class_rows_hold_every_class_and_count(evaluation: Evaluation) -> None:
    rows = class_rows(evaluation)
    assert [row["class"] for row in rows] == ["person", "sky", "car", "road", "dog"]
    first = rows[0]
    assert list(first) == ["class", "kind", "pq", "sq", "rq", "tp", "fp", "fn", "iou"]
    assert (first["kind"], rows[1]["kind"]) == ("thing", "stuff")
    assert (first["tp"], first["fp"], first["fn"]) == (1, 1, 1)
    assert first["pq"] == pytest.approx(60)
    assert first["iou"] == pytest.approx(75)
    assert rows[2]["pq"] == 0
    assert np.isnan(rows[3]["pq"])


def test_worst_classes_come_first_and_absent_ones_not_at_all(evaluation: Evaluation) -> None:
    every = class_table(evaluation).splitlines()
    assert len(every) == 6
    assert every[0].split() == ["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN", "IoU"]
    assert every[4].split() == ["road", "stuff", "-", "-", "-", "0", "0", "0", "-"]
    worst = [line.split()[0] for line in class_table(evaluation, worst=2).splitlines()[1:]]
    assert worst == ["car", "sky"]
    assert [line.split()[0] for line in class_table(evaluation, worst=9).splitlines()[1:]] == ["car", "sky", "person"]


def test_text_tables_align_words_left_and_figures_right() -> None:
    rows = [("image", "n", "fault"), ("a.jpg", "12", "is cut"), ("a long name", "3", "is a folder")]
    table = text_table(rows, words=("fault",)).splitlines()
    assert table == ["image         n  fault", "a.jpg        12  is cut", "a long name   3  is a folder"]
    table = text_table(rows, words=("fault",), widest=5).splitlines()
    assert table == ["image   n  fault", "a.jpg  12  is cut", "a long name   3  is a folder"]


def test_markdown_tables_are_straight_in_plain_text_too() -> None:
    told = markdown_table([("", "PQ"), ("a long name", "1")]).splitlines()
    assert told == ["|             | PQ  |", "| ----------- | --- |", "| a long name | 1   |"]
