"""Confusion matrix, mean IoU and pixel accuracy against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic.metrics import semantic
from panoptic.metrics.semantic import confusion, mean_iou, runs
from panoptic.segmentation import IGNORE, Categories

CLASSES = 4
MAPS = hnp.array_shapes(min_dims=2, max_dims=2, max_side=8).flatmap(
    lambda size: st.tuples(*[hnp.arrays(np.int32, size, elements=st.integers(IGNORE, CLASSES - 1))] * 2)
)


@settings(max_examples=50, deadline=None)
@given(maps=MAPS, block=st.integers(1, 70))
def test_runs_put_together_are_the_maps(maps: tuple[np.ndarray, np.ndarray], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic, "BLOCK", block)
        first, second, lengths = runs(*maps)
    assert (lengths > 0).all()
    np.testing.assert_array_equal(np.repeat(first, lengths), maps[0].ravel())
    np.testing.assert_array_equal(np.repeat(second, lengths), maps[1].ravel())
    assert ((first[1:] != first[:-1]) | (second[1:] != second[:-1])).all()


def test_runs_of_no_pixel_are_none() -> None:
    empty = np.zeros((0, 4), np.int32)
    assert [part.size for part in runs(empty, empty)] == [0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(maps=MAPS)
def test_confusion_counts_every_pixel_whose_truth_is_known(maps: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = maps
    expected = np.zeros((CLASSES, CLASSES + 1), np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
        if t != IGNORE:
            expected[t, p] += 1  # a void prediction, -1, lands in the last column
    counted = confusion(truth, prediction, CLASSES)
    assert counted.dtype == np.int64
    np.testing.assert_array_equal(counted, expected)


@settings(max_examples=50, deadline=None)
@given(maps=MAPS)
def test_iou_and_accuracy_are_those_of_masks(maps: tuple[np.ndarray, np.ndarray]) -> None:
    truth, prediction = maps
    known = truth != IGNORE
    result = mean_iou(confusion(truth, prediction, CLASSES))
    for c in range(CLASSES):
        both = np.sum((truth == c) & (prediction == c))
        either = np.sum(known & ((truth == c) | (prediction == c)))
        np.testing.assert_allclose(result.iou[c], 100 * both / either if either else np.nan, rtol=1e-12)
    if known.any():
        assert result.pixel_accuracy == pytest.approx(100 * np.mean(truth[known] == prediction[known]))
        assert result.mean_iou == pytest.approx(np.nanmean(result.iou))
    else:
        assert np.isnan([result.pixel_accuracy, result.mean_iou]).all()


def test_maps_of_different_types_are_compared() -> None:
    truth, prediction = np.array([[0, 1, 1]], np.int16), np.array([[0, 1, 0]], np.int64)
    assert confusion(truth, prediction, 2).tolist() == [[1, 0, 0], [1, 1, 0]]


def test_void_predictions_are_wrong_and_void_truth_is_not_asked() -> None:
    result = mean_iou(confusion(np.array([[0, 0, -1, -1]]), np.array([[0, -1, 0, 1]]), 2))
    assert result.iou[0] == 50
    assert np.isnan(result.iou[1])
    assert (result.mean_iou, result.pixel_accuracy) == (50, 50)


def test_groups_without_a_class_are_nan(small_categories: Categories) -> None:
    truth = np.array([[small_categories.things[0]] * 3])
    everything, things, stuff = mean_iou(confusion(truth, truth, len(small_categories))).by_kind(small_categories)
    assert (everything, things) == (100, 100)
    assert np.isnan(stuff)


def test_confusions_add_up() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(-1, 4, (2, 6, 10))
    parts = [confusion(truth[rows], prediction[rows], 4) for rows in (slice(0, 2), slice(2, 6))]
    np.testing.assert_array_equal(parts[0] + parts[1], confusion(truth, prediction, 4))


def test_bad_maps_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"truth is \(1, 2\) but the prediction is \(2, 1\)"):
        confusion(np.zeros((1, 2), int), np.zeros((2, 1), int), 3)
    with pytest.raises(ValueError, match=r"truth: classes run from 0 to 255, expected -1 to 2; map every other"):
        confusion(np.array([[0, 255]]), np.array([[0, 0]]), 3)
    with pytest.raises(ValueError, match="prediction: classes run from -2"):
        confusion(np.array([[0, 0]]), np.array([[0, -2]]), 3)
