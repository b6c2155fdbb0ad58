"""Recall of region proposals against counting by hand."""

from __future__ import annotations

import numpy as np

from panoptic.metrics.recall import count_recall
from panoptic.segmentation import Segmentation


def truth(categories) -> Segmentation:
    """Two persons, a car, a crowd of dogs, and a dog that has no pixel left; sky around them."""
    segments = np.ones((20, 30), np.int32)
    segments[2:6, 2:12] = 2
    segments[10:14, 2:12] = 3
    segments[2:6, 20:24] = 4
    segments[12:18, 20:28] = 5
    person, sky, car, _, dog = range(5)
    assert categories.names[person] == "person" and categories.names[dog] == "dog"
    labels = np.array([sky, person, person, car, dog, dog])
    return Segmentation(segments, labels, np.array([False, False, False, False, True, False]))


def test_a_thing_is_covered_from_one_half_on(small_categories) -> None:
    boxes = np.array(
        [
            [2, 2, 7, 6],  # exactly half of the first person
            [2, 10, 6, 14],  # less than half of the second
            [20, 2, 24, 6],
            [20, 2, 24, 6],  # the car twice counts once
            [20, 12, 28, 18],  # a crowd is not counted
        ],
        np.float32,
    )
    counts = count_recall(truth(small_categories), boxes, small_categories)
    assert counts.covered.tolist() == [1, 0, 1, 0, 0]
    assert counts.total.tolist() == [2, 0, 1, 0, 0]


def test_one_proposal_may_cover_several_things(small_categories) -> None:
    segments = np.array([[1, 2, 1, 2], [1, 2, 1, 2]], np.int32)
    interleaved = Segmentation(segments, np.array([0, 2]))
    counts = count_recall(interleaved, np.array([[0, 0, 4, 2.0]]), small_categories)
    assert counts.covered.tolist() == [1, 0, 1, 0, 0]


def test_nothing_to_cover_and_nothing_proposed(small_categories) -> None:
    empty = Segmentation(np.zeros((4, 5), np.int32), np.zeros(0, np.int64))
    counts = count_recall(empty, np.array([[0, 0, 2, 2]]), small_categories)
    assert counts.total.tolist() == counts.covered.tolist() == [0] * 5
    counts = count_recall(truth(small_categories), np.zeros((0, 4)), small_categories)
    assert counts.covered.sum() == 0 and counts.total.sum() == 3


def test_the_overlap_can_be_chosen(small_categories) -> None:
    boxes = np.array([[2, 2, 7, 6.0]])
    assert count_recall(truth(small_categories), boxes, small_categories, 0.51).covered.sum() == 0
    assert count_recall(truth(small_categories), boxes, small_categories, 0.3).covered.sum() == 1
