"""Run-length encodings against pycocotools' own of the whole masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from panoptic.rle import bounding_boxes, encode_masks, encode_segments, encode_window, overlaps

SIZES = [(1, 1), (1, 9), (9, 1), (17, 23)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def reference(mask: np.ndarray) -> Any:
    """pycocotools' encoding of bool [H, W]."""
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def drawn(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """bool [count, H, W]: nothing, everything, and masks of few to many pixels."""
    masks = rng.random((count, *size)) < rng.random((count, 1, 1))
    masks[0], masks[1] = False, True
    return masks


def assert_same_mask(encoded: Any, mask: np.ndarray) -> None:
    """Equal pixels, and equal bytes where the last pixel is outside."""
    assert tuple(encoded["size"]) == mask.shape
    np.testing.assert_array_equal(coco.decode(encoded), mask)
    if not mask[-1, -1]:
        assert encoded["counts"] == reference(mask)["counts"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [np.bool_, np.uint8])
def test_masks_are_encoded_as_by_pycocotools(rng: np.random.Generator, size: tuple[int, int], kind: type) -> None:
    masks = drawn(rng, 6, size)
    assert encode_masks(masks.astype(kind)) == [reference(mask) for mask in masks]
    assert encode_masks(np.asfortranarray(masks[2])[None]) == [reference(masks[2])]


def test_no_mask_is_no_encoding() -> None:
    assert encode_masks(np.zeros((0, 5, 7), bool)) == []
    assert encode_segments(np.ones((5, 7), np.int32), np.zeros(0, np.int64)) == []
    assert bounding_boxes([]).shape == (0, 4)


@pytest.mark.parametrize("size", SIZES)
def test_segments_are_encoded_without_their_masks(rng: np.random.Generator, size: tuple[int, int]) -> None:
    segments = rng.integers(0, 5, size).astype(np.int32)
    numbers = np.array([4, 1, 9, 2])  # in any order; 9 has no pixel
    for number, encoded in zip(numbers, encode_segments(segments, numbers), strict=True):
        assert_same_mask(encoded, segments == number)


def test_a_window_is_encoded_as_its_whole_mask(rng: np.random.Generator) -> None:
    size = (17, 23)
    for _ in range(50):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)).tolist() for side in size)
        window = rng.random((bottom - top, right - left)) < rng.random()
        whole = np.zeros(size, bool)
        whole[top:bottom, left:right] = window
        assert_same_mask(encode_window(window, top, left, size), whole)


@pytest.mark.parametrize("last", [False, True])
def test_a_window_may_reach_all_corners(last: bool) -> None:
    window = np.ones((3, 4), bool)
    window[-1, -1] = last
    assert_same_mask(encode_window(window, 0, 0, (3, 4)), window)


def test_boxes_are_half_open() -> None:
    mask = np.zeros((6, 9), bool)
    mask[1:3, 4] = mask[2, 4:8] = True
    boxes = bounding_boxes(encode_masks(np.stack([mask, np.ones_like(mask), np.zeros_like(mask)])))
    assert boxes.dtype == np.float64
    assert boxes.tolist() == [[4, 1, 8, 3], [0, 0, 9, 6], [0, 0, 0, 0]]


def test_overlaps_are_intersection_over_union_and_over_the_prediction_for_a_crowd(rng: np.random.Generator) -> None:
    predictions, truths = drawn(rng, 4, (8, 9)), drawn(rng, 3, (8, 9))[1:]
    shared = np.array([[(p & t).sum() for t in truths] for p in predictions])
    area, other = predictions.sum((1, 2))[:, None], truths.sum((1, 2))
    table = overlaps(encode_masks(predictions), encode_masks(truths), np.array([False, True]))
    np.testing.assert_allclose(table[1:, 0], (shared / (area + other - shared))[1:, 0])
    np.testing.assert_allclose(table[1:, 1], (shared / np.maximum(area, 1))[1:, 1])
    assert table[0].tolist() == [0, 0]  # the empty prediction
    assert overlaps([], encode_masks(truths), np.zeros(2, bool)).shape == (0, 2)
    assert overlaps(encode_masks(truths), [], np.zeros(0, bool)).shape == (2, 0)
