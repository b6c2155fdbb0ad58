"""The greedy merge against detectron2's arrays, and its rule in hard cases."""

from __future__ import annotations

import numpy as np
import pytest

from panoptic.layers.greedy_merge import CroppedMask, class_map, merge_by_score
from panoptic.segmentation import IGNORE
from tests.panoptic.rcnn.test_paste_masks import unpacked

COCO_LABELS = (IGNORE, *range(80, 133))
"""Of detectron2's map of stuff, whose class 0 stands for things."""

LABELS = (IGNORE, 0, 2)
"""Two classes of stuff."""


@pytest.mark.parametrize("case", range(4))
def test_merging_agrees_with_detectron2(fixture_arrays, case: int) -> None:
    arrays, meta = fixture_arrays("pfpn_units")
    given, rule = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"comb{case}/")}, meta["comb"][case]
    merged = merge_by_score(
        [CroppedMask(0, 0, mask) for mask in unpacked(given["masks"], rule["w"])],
        given["classes"].tolist(),
        given["scores"].tolist(),
        given["sem"],
        COCO_LABELS,
        confidence=rule["score"],
        overlap=rule["overlap"],
        stuff_area=rule["stuff"],
    )
    np.testing.assert_array_equal(merged.segments, given["pan"])
    assert merged.labels.tolist() == [s["category_id"] + (0 if s["isthing"] else 79) for s in rule["segments"]]
    np.testing.assert_allclose(merged.scores, [s.get("score", 1.0) for s in rule["segments"]])
    areas = merged.areas()
    assert all(areas[k] == s["area"] for k, s in enumerate(rule["segments"]) if not s["isthing"])


def test_an_instance_keeps_what_is_free_however_little_it_is() -> None:
    masks = [
        CroppedMask(0, 0, np.ones((2, 5), bool)),
        CroppedMask(0, 4, np.ones((2, 2), bool)),
        CroppedMask(0, 3, np.ones((1, 3), bool)),
    ]
    stuff = np.full((2, 8), 2)
    merged = merge_by_score(masks, [1, 1, 1], [0.9, 0.8, 0.7], stuff, LABELS, stuff_area=1)
    # the second loses half of itself, which is not more than half; the third all of its pixels
    assert merged.segments.tolist() == [[1, 1, 1, 1, 1, 2, 3, 3]] * 2
    assert merged.labels.tolist() == [1, 1, 2]
    np.testing.assert_allclose(merged.scores, [0.9, 0.8, 1.0])


def test_equal_scores_keep_their_order_and_low_ones_stay_out() -> None:
    masks = [CroppedMask(0, k, np.ones((1, 2), bool)) for k in range(3)]
    merged = merge_by_score(masks, [1] * 3, [0.5, 0.5, 0.49], np.zeros((1, 4), np.uint8), LABELS)
    assert merged.segments.tolist() == [[1, 1, 2, 0]]


def test_nothing_to_merge_is_void() -> None:
    merged = merge_by_score([], [], [], np.zeros((3, 4), np.uint8), LABELS)
    assert not merged.segments.any() and len(merged.labels) == 0 and merged.segments.dtype == np.int32


def test_small_stuff_is_void_and_counted_where_it_is_free() -> None:
    stuff = np.array([[1, 1, 1, 1, 2, 2]])
    masks = [CroppedMask(0, 0, np.ones((1, 3), bool))]
    merged = merge_by_score(masks, [1], [1.0], stuff, LABELS, stuff_area=2)
    assert merged.segments.tolist() == [[1, 1, 1, 0, 2, 2]]
    assert merged.labels.tolist() == [1, 2]


def test_stuff_without_a_class_is_void_and_scores_are_those_given() -> None:
    stuff = np.array([[0, 1, 1, 2, 2, 3]])
    merged = merge_by_score([], [], [], stuff, (IGNORE, IGNORE, 5, 4), (0, 0, 0.25, 0.5), stuff_area=1)
    assert merged.segments.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert merged.labels.tolist() == [5, 4] and merged.scores.tolist() == [0.25, 0.5]


def test_an_instance_without_a_free_pixel_is_no_segment() -> None:
    masks = [CroppedMask(0, 0, np.ones((1, 2), bool)), CroppedMask(0, 1, np.ones((1, 1), bool))]
    merged = merge_by_score(masks, [1, 1], [0.9, 0.8], np.zeros((1, 3), np.uint8), LABELS, overlap=1.0)
    assert merged.segments.tolist() == [[1, 1, 0]] and merged.labels.tolist() == [1]


def test_the_merged_map_names_the_things_of_a_class_map() -> None:
    labels = (IGNORE, IGNORE, 0, 2)  # value 1 stands for all things
    stuff = np.array([[1, 1, 2], [1, 3, 2], [1, 2, 2], [0, 3, 3]])
    merged = merge_by_score([CroppedMask(0, 0, np.ones((2, 3), bool))], [1], [1.0], stuff, labels, stuff_area=1)
    classes = class_map(stuff, labels, merged, (False, True, False))
    assert classes.tolist() == [[1, 1, 0], [1, 2, 0], [-1, 0, 0], [-1, 2, 2]] and classes.dtype == np.int32
