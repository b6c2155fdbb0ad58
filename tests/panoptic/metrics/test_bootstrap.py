"""Bootstrap: the figure is PQ itself, intervals cover what chance does, a model does not differ from itself."""

from __future__ import annotations

import numpy as np
import pytest

from panoptic.metrics.bootstrap import LEAST, Counts, beyond_noise, differences, intervals
from panoptic.metrics.panoptic_quality import QualityCounts, quality
from panoptic.segmentation import Categories


def drawn(seed: int, images: int, hits: float, classes: int = 5) -> Counts:
    """Images of two segments each, found with the probability `hits`."""
    rng = np.random.default_rng(seed)
    sparse = []
    for _ in range(images):
        matched = rng.random(2) < hits
        values = np.stack([0.8 * matched, matched, ~matched, ~matched], 1).astype(float)
        sparse.append((np.sort(rng.choice(classes - 1, 2, replace=False)), values))  # the last class never occurs
    return Counts.of([f"{k}.jpg" for k in range(images)], sparse)


def test_the_figure_is_pq_and_lies_in_its_interval(small_categories: Categories) -> None:
    counts = drawn(0, 60, 0.7)
    figures = intervals(counts, small_categories, rounds=200)
    total = QualityCounts.from_nonzero(counts.places[:, 1], counts.values, 5)
    expected = quality(total, small_categories)
    for name, group in (("all", expected.all), ("things", expected.things), ("stuff", expected.stuff)):
        assert figures[name].value == pytest.approx(group.pq) and figures[name].low < group.pq < figures[name].high
    assert [figures[str(c)].value for c in range(4)] == pytest.approx(expected.pq[:4].tolist())
    assert np.isnan([figures["4"].value, figures["4"].low]).all()


def test_more_images_are_surer(small_categories: Categories) -> None:
    few, many = (intervals(drawn(1, n, 0.7), small_categories, rounds=200)["all"] for n in (30, 480))
    # sixteen times the images: a quarter of the width, give or take
    assert 2 < (few.high - few.low) / (many.high - many.low) < 8


def test_differences(small_categories: Categories) -> None:
    one, worse = drawn(2, 80, 0.9), drawn(3, 80, 0.3)
    same = differences(one, one, small_categories, rounds=50)
    assert same["all"].value == same["all"].low == same["all"].high == 0 and not same["all"].certain
    gain = differences(worse, one, small_categories, rounds=100)
    assert gain["all"].value > 0 and gain["all"].certain and beyond_noise(gain)
    back = differences(one, worse, small_categories, rounds=100)
    assert back["all"].value == pytest.approx(-gain["all"].value) and not beyond_noise(back)
    with pytest.raises(ValueError, match="different images"):
        differences(one, drawn(2, 79, 0.9), small_categories)


@pytest.mark.parametrize("images", [1, 3, LEAST - 1, LEAST])
def test_few_images_are_never_certain(small_categories: Categories, images: int) -> None:
    """The draws of one image are all alike: an interval without width, however small the gain."""
    gain = differences(drawn(0, images, 0.0), drawn(0, images, 1.0), small_categories, rounds=50)["all"]
    assert gain.low > 0 and gain.images == images
    assert gain.certain == beyond_noise({"all": gain}) == (images == LEAST)


def test_a_class_is_certain_where_enough_images_have_it(small_categories: Categories) -> None:
    few, many = np.array([[1.0, 1, 0, 0]]), np.array([[0.6, 1, 0, 0]])

    def counts(values: np.ndarray) -> Counts:
        both = (np.array([0, 1]), np.concatenate([values, values]))
        return Counts.of([str(k) for k in range(40)], [both if k < 5 else (np.array([0]), values) for k in range(40)])

    gain = differences(counts(many), counts(few), small_categories, rounds=50)
    assert (gain["0"].images, gain["1"].images, gain["2"].images) == (40, 5, 0)
    assert gain["0"].certain and gain["1"].low > 0 and not gain["1"].certain
