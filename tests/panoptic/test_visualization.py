"""Pictures: the right pixels change, and every size works."""

from __future__ import annotations

import numpy as np
import pytest

from panoptic import visualization
from panoptic.segmentation import Categories, Segmentation


@pytest.fixture
def grey() -> np.ndarray:
    return np.full((60, 80, 3), 120, np.uint8)


def test_overlay_tints_each_class_towards_its_colour(grey, small_categories):
    segments = np.zeros((60, 80), np.int32)
    segments[10:30, 10:70], segments[30:55, 10:70] = 1, 2
    drawn = visualization.overlay(grey, Segmentation(segments, np.array([0, 1])), small_categories, names=False)
    assert drawn.dtype == np.uint8 and drawn.shape == grey.shape
    for row, label in ((20, 0), (40, 1)):
        expected = np.array(small_categories.colours[label])
        pixel = drawn[row, 40].astype(int)
        assert np.abs(pixel - expected).sum() < np.abs(120 - expected).sum()
        assert np.argmax(pixel) == np.argmax(expected)
    assert drawn[:8].mean() < 100, "void is dark"
    assert len(np.unique(drawn[:8].reshape(-1, 3), axis=0)) == 2, "and hatched"
    assert drawn[10, 40].min() > 200, "the thing has a white border"
    assert drawn[54, 40].max() < 200, "stuff has none"


def test_the_image_is_left_alone(grey, small_categories, random_segmentation):
    before = grey.copy()
    truth = random_segmentation(np.random.default_rng(0), 60, 80, small_categories, crowd=True)
    first = visualization.overlay(grey, truth, small_categories)
    assert np.array_equal(grey, before)
    assert np.array_equal(first, visualization.overlay(grey, truth, small_categories))


def test_instances_differ_and_the_first_has_the_class_colour(small_categories):
    labels = np.array([0, 1, 0, 0, 2, 0])
    colours = visualization.segment_colours(Segmentation(np.zeros((2, 2), np.int32), labels), small_categories)
    assert colours.shape == (7, 3)
    for first in (1, 2, 5):
        np.testing.assert_array_equal(colours[first], small_categories.colours[labels[first - 1]])
    people = colours[1:][labels == 0]
    distances = np.abs(people[:, None] - people[None]).sum(-1)[np.triu_indices(4, 1)]
    assert distances.min() > 10


def test_large_segments_are_named_small_ones_not(small_categories):
    image = np.full((200, 300, 3), 120, np.uint8)
    segments = np.zeros((200, 300), np.int32)
    segments[20:180, 20:200], segments[5:8, 290:294] = 1, 2
    truth = Segmentation(segments, np.array([0, 2]))
    changed = (
        visualization.overlay(image, truth, small_categories)
        != visualization.overlay(image, truth, small_categories, names=False)
    ).any(-1)
    assert changed[segments == 1].any()
    assert not changed[segments != 1].any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 200), (1201, 7)])
def test_any_size(size, small_categories, random_segmentation):
    image = np.zeros((*size, 3), np.uint8)
    truth = random_segmentation(np.random.default_rng(1), *size, small_categories, crowd=True)
    assert visualization.overlay(image, truth, small_categories).shape == image.shape
    empty = Segmentation(np.zeros(size, np.int32), np.zeros(0, np.int64))
    row = visualization.side_by_side(image, truth, empty, small_categories)
    assert row.shape[1] > 3 * size[1] and row.dtype == np.uint8


def test_side_by_side_leaves_out_what_is_missing(grey, small_categories, random_segmentation):
    truth = random_segmentation(np.random.default_rng(2), 60, 80, small_categories)
    widths = [
        visualization.side_by_side(grey, a, b, small_categories).shape[1]
        for a, b in ((truth, truth), (truth, None), (None, None))
    ]
    assert widths[0] > widths[1] > widths[2] == 80


def test_legend_shows_the_classes_asked_for(small_categories):
    def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
        return {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()} & set(small_categories.colours)

    assert colours(visualization.legend(small_categories, 300)) == set(small_categories.colours)
    assert colours(visualization.legend(small_categories, 300, only=[1])) == {small_categories.colours[1]}
    many = Categories.from_coco([{"id": i, "name": f"class {i}", "isthing": 1} for i in range(40)])
    narrow, wide = visualization.legend(many, 120), visualization.legend(many, 1000)
    assert narrow.shape[1] == 120 and wide.shape[1] == 1000 and narrow.shape[0] > 2 * wide.shape[0]


def test_sizes_that_differ_are_refused(grey, small_categories):
    with pytest.raises(ValueError, match=r"\(60, 80\).*\(30, 40\)"):
        visualization.overlay(grey, Segmentation(np.zeros((30, 40), np.int32), np.zeros(0, np.int64)), small_categories)


def test_errors_are_told_apart():
    truth = Segmentation(np.zeros((20, 40), np.int32), np.array([0, 1, 1]))
    truth.segments[:, :20], truth.segments[:10, 20:], truth.segments[10:, 20:30] = 1, 2, 3
    prediction = Segmentation(np.zeros((20, 40), np.int32), np.array([0, 0, 1]))
    prediction.segments[:, :18], prediction.segments[:10, 20:], prediction.segments[10:12, 30:] = 1, 2, 3
    picture = visualization.errors(np.full((20, 40, 3), 128, np.uint8), truth, prediction)
    places = ((5, 5), (5, 19), (5, 30), (15, 25), (18, 35))
    right, edge, made_up, missed, void = (picture[y, x].astype(int) for y, x in places)
    assert np.ptp(void) == 0 and np.ptp(right) < 30  # hardly tinted
    assert made_up[0] > made_up[2] + 60 and missed[2] > missed[0] + 60
    assert edge[0] > edge[2] + 90 and edge[1] > edge[2] + 60
    with pytest.raises(ValueError, match="resize"):
        visualization.errors(np.zeros((9, 9, 3), np.uint8), truth, prediction)
