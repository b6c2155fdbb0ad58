"""The report of evaluations of every kind: none of them may end it, after all the work, with an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from panoptic.metrics.bootstrap import Counts, differences
from panoptic.metrics.report import Evaluation
from panoptic.segmentation import Categories, Segmentation
from pipelines.evaluation.report import charts
from pipelines.evaluation.report.examples import choose
from pipelines.evaluation.report.page import Example, Model, page
from tests.support.evaluations import Pair, evaluation_of, moved_pairs, tally_of

TIMINGS = {"network_ms": 20.0, "postprocess_ms": 5.0, "images_per_second": 3.0}


def categories_of(things: Sequence[bool], names: Sequence[str] = ("a", "b", "c", "d")) -> Categories:
    count = len(things)
    return Categories(tuple(names[:count]), tuple(things), tuple(range(1, count + 1)), ((90, 90, 90),) * count)


def model_of(title: str, pairs: Sequence[Pair], categories: Categories, timings: dict | None = None) -> Model:
    tally = tally_of(pairs, categories)
    images = [tally.images[row] for row in sorted(tally.images)]
    counts = Counts.of([image.name for image in images], [image.quality for image in images])
    evaluation = replace(evaluation_of(pairs, categories), timings=TIMINGS if timings is None else timings)
    return Model(title, evaluation, counts)


def report(pairs: Sequence[Pair], categories: Categories, **options) -> str:
    """The report of a model against another one with the same predictions."""
    one, two = (model_of(title, pairs, categories, **options) for title in ("one", "two"))
    example = Example("x.jpg", float("nan"), {"image": b"jpeg"})
    text = page(one, [two], [example], [], {"device": "CPU"})
    assert "<h2>Against two</h2>" in text and "<h2>Worst images</h2>" in text
    assert not re.search(r">\s*[+-]?nan|:nan|\"nan", text)  # NaN is shown as a dash, and is no coordinate
    return text


def nothing(size: tuple[int, int] = (8, 9)) -> Segmentation:
    return Segmentation(np.zeros(size, np.int32), np.zeros(0, np.int64))


def halves(labels: Sequence[int]) -> Segmentation:
    segments = np.repeat([[1] * 4 + [2] * 4], 6, 0).astype(np.int32)
    return Segmentation(segments, np.array(labels, np.int64))


@pytest.mark.parametrize("things", [(True, True), (False, False), (True,), (False,), (True, False, True, False)])
def test_kinds_of_classes(things: tuple[bool, ...], random_segmentation: Callable[..., Segmentation]) -> None:
    categories = categories_of(things)
    for count in (1, 5):
        text = report(moved_pairs(random_segmentation, categories, count), categories)
        assert f"<p>{count} images</p>" in text and text.count("<circle") == 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("things", [(True, False), (True, True), (False, False)])
def test_images_without_a_segment(count: int, things: tuple[bool, bool]) -> None:
    text = report([(nothing(), nothing())] * count, categories_of(things))
    assert "nothing to compare" in text and "<circle" not in text


def test_truths_of_void_alone() -> None:
    categories = categories_of((True, False))
    text = report([(nothing((6, 8)), halves([0, 1]))] * 2, categories)  # void forgives what is predicted on it
    assert "nothing to compare" in text
    assert "nothing to compare" not in report([(halves([0, 1]), nothing((6, 8)))] * 2, categories)


def test_a_pq_that_only_one_of_two_has() -> None:
    categories = categories_of((True, False))
    there = model_of("there", [(nothing((6, 8)), halves([0, 1])), (halves([0, 1]), halves([0, 1]))], categories)
    counts = Counts(there.counts.names, there.counts.places[:0], there.counts.values[:0])
    absent = Model("absent", evaluation_of([(nothing(), nothing())] * 2, categories), counts)
    for pair in ((there, absent), (absent, there)):
        text = page(pair[0], [pair[1]], [], [], {})
        assert "nothing to compare" in text and "<circle" not in text


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf")])
def test_times_that_say_nothing(value: float, random_segmentation: Callable[..., Segmentation]) -> None:
    categories = categories_of((True, False))
    pairs = moved_pairs(random_segmentation, categories, 2)
    text = report(pairs, categories, timings=dict.fromkeys(TIMINGS, value))
    assert text.count("<circle") == (2 if value == 0 else 0)
    assert "Speed" in report(pairs, categories, timings={}) and "Speed" in report(
        pairs, categories, timings={"network_ms": 3.0}
    )


def test_the_header_says_what_was_evaluated_and_when(small_categories: Categories, random_segmentation) -> None:
    model = model_of("one", moved_pairs(random_segmentation, small_categories, 2), small_categories)
    example = Example("x.jpg", 3.0, {"image": b"jpeg"}, "Lost: <car>, 3.0 % of the image.")
    facts = {"data": "2 images of val, /shards/street", "date": "30 November 2026, 06:55"}
    cells = [["centres", "PQ"], ["", "12.3"], ["x", "45.6"]]
    text = page(model, [], [example], [], facts, cells)
    assert "<p>2 images of val, /shards/street. 30 November 2026, 06:55</p>" in text
    assert '<p class="sentence">Lost: &lt;car&gt;, 3.0 % of the image.</p>' in text
    assert "<h2>Oracle</h2>" in text and "<td>45.6</td>" in text
    assert "<h2>Oracle</h2>" not in page(model, [], [], [], facts)


def test_labels_of_the_speed_plot_stay_inside_it() -> None:
    names = ["mask2former-swin-large-coco/step_000100", "x" * 200, "detr"]
    drawing = charts.speed_plot(
        [(name, ms, pq) for name, ms, pq in zip(names, (990.0, 20.0, 500.0), (50, 40, 30), strict=True)]
    )
    labels = re.findall(r'<text (text-anchor="end" )?x="([\d.]+)" y="[\d.]+">([^<]+)', drawing)[-3:]
    assert len(labels) == 3 and labels[0][2] == names[0] and "…" in labels[1][2] and labels[2][2] == "detr"
    for end, x, shown in labels:
        left = float(x) - charts.LETTER * len(shown) if end else float(x)
        assert left >= 0 and left + charts.LETTER * len(shown) <= 760


def test_few_images_tell_nothing(small_categories: Categories, random_segmentation) -> None:
    pairs = moved_pairs(random_segmentation, small_categories, 24)
    assert "Fewer than 20 images cannot tell" in report(pairs[:5], small_categories)
    assert "within chance" in report(pairs, small_categories)


def test_an_evaluation_of_nothing_but_pq(small_categories: Categories, random_segmentation) -> None:
    model = model_of("one", moved_pairs(random_segmentation, small_categories, 2), small_categories)
    bare = replace(model, evaluation=Evaluation(model.evaluation.quality))
    assert "Size of segments" in page(bare, [bare], [], [], {})


def test_names_are_text_wherever_they_stand(random_segmentation: Callable[..., Segmentation]) -> None:
    bad = ['<b>"a"</b>', "b & 'c'", "</title><script>", '"><img src=x>']
    categories = categories_of((True, False, True, False), bad)
    one, two = (model_of(title, moved_pairs(random_segmentation, categories, 3), categories) for title in bad[:2])
    worst = [Example(bad[3], 1.0, {bad[2]: b"jpeg"})]
    text = page(one, [two], worst, worst, {bad[0]: bad[2], "model": bad[3]})
    assert not re.search(r"<script|<b>\"|<img src=x|& '", text) and text.count("</title>") == 1
    assert "&lt;script&gt;" in text and "b &amp; &#x27;c&#x27;" in text


def test_intervals_without_edges_are_dashes() -> None:
    categories = categories_of((True,))
    model = model_of("one", [(nothing(), nothing())], categories)
    found = {
        name: replace(interval, value=5.0, low=float("nan"), high=float("nan"))
        for name, interval in differences(model.counts, model.counts, categories).items()
    }
    text = charts.difference_bars(found, categories)
    assert "– … –" in text and "+5.0" in text and "nan" not in text


@pytest.mark.parametrize("number", [0, 1, 2, 12])
def test_typical_images_lie_around_the_median(number: int) -> None:
    for count in range(60):
        values = [float(k) for k in np.random.default_rng(count).permutation(count)]
        images = {row: SimpleNamespace(pq=lambda _, value=value: value) for row, value in enumerate(values)}
        images[count] = SimpleNamespace(pq=lambda _: float("nan"))  # no segment: neither good nor bad
        worst, typical = ([values[row] for row in rows] for rows in choose(SimpleNamespace(images=images), 3, number))  # type: ignore[arg-type]
        assert worst == sorted(values)[: len(worst)] and not set(worst) & set(typical)
        assert len(worst) == min(number, max(len(typical), 1), count) and len(typical) == min(number, count // 3)
        if typical:
            assert abs(np.mean(typical) - np.median(values)) <= 0.5
