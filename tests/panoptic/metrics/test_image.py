"""The counts of one image: boundaries mask by mask, sizes, confusion of classes, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from panoptic.metrics.average_precision import InstanceMatches
from panoptic.metrics.boundary import boundary_overlaps
from panoptic.metrics.image import SIZES, ImageCounts, ImageRecords, count_image
from panoptic.metrics.panoptic_quality import QualityCounts
from panoptic.segmentation import Categories, Segmentation

Draw = Callable[..., Segmentation]


def dense(counts: tuple[np.ndarray, np.ndarray] | None, classes: int) -> np.ndarray:
    assert counts is not None
    return QualityCounts.from_nonzero(*counts, classes).to_array()


def scene(segments: list[list[int]], labels: list[int]) -> Segmentation:
    return Segmentation(np.array(segments, np.int32), np.array(labels, np.int64))


def boundary_of(mask: np.ndarray, dilation: float) -> np.ndarray:
    """As the paper words it: the mask without what is left when it is eroded d times by a 3x3 square."""
    distance = max(1, round(dilation * float(np.hypot(*mask.shape))))
    padded = np.pad(mask.astype(np.uint8), 1)
    return mask & (cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1] == 0)


@pytest.mark.parametrize("dilation", [0.001, 0.02, 0.1])
def test_boundaries_of_all_segments_at_once_are_those_of_each_mask(
    small_categories: Categories, random_segmentation: Draw, dilation: float
) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth, prediction = (random_segmentation(rng, 40, 60, small_categories, things=6) for _ in range(2))
        table = boundary_overlaps(truth, prediction, dilation)
        assert table.sum() == 40 * 60
        edges = [
            [boundary_of(m.segments == k + 1, dilation) for k in range(len(m.labels))] for m in (truth, prediction)
        ]
        expected = [[int((a & b).sum()) for b in edges[1]] for a in edges[0]]
        assert table[1:-1, 1:-1].tolist() == expected
        assert table[0, 1:-1].tolist() == [int((b & (truth.segments == 0)).sum()) for b in edges[1]]


def test_a_perfect_prediction_is_perfect_in_everything(small_categories: Categories, random_segmentation: Draw) -> None:
    truth = random_segmentation(np.random.default_rng(3), 120, 160, small_categories, things=8)
    counts = count_image(truth, truth, 5, boundary=True)
    whole = dense(counts.quality, 5)
    assert counts.pq(5) == 100 and whole[:, 0].tolist() == whole[:, 1].tolist() and whole[:, 2:].sum() == 0
    assert (dense(counts.boundary, 5) == whole).all()
    assert (sum(dense(part, 5) for part in counts.sizes) == whole).all()
    assert (counts.confusion[:, 0] == counts.confusion[:, 1]).all()
    assert counts.confusion[:, 2].sum() == len(truth.labels)


def test_numbering_changes_nothing_and_parts_add_up(small_categories: Categories, random_segmentation: Draw) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, prediction = (
            random_segmentation(rng, 90, 110, small_categories, things=9, crowd=True) for _ in range(2)
        )
        order = rng.permutation(len(prediction.labels))
        table = np.concatenate([[0], np.argsort(order) + 1]).astype(np.int32)
        again = Segmentation(table[prediction.segments], prediction.labels[order])
        one, two = (count_image(truth, m, 5, boundary=True) for m in (prediction, again))
        for part in ("quality", "boundary"):
            np.testing.assert_allclose(dense(getattr(one, part), 5), dense(getattr(two, part), 5), atol=1e-12)
        assert (one.confusion == two.confusion).all()
        np.testing.assert_allclose(sum(dense(part, 5) for part in one.sizes), dense(one.quality, 5), atol=1e-12)
        # the boundary can only take matches away
        assert (dense(one.boundary, 5)[:, :2] <= dense(one.quality, 5)[:, :2]).all()


def test_sizes_are_those_of_the_truth() -> None:
    truth = Segmentation(np.zeros((100, 200), np.int32), np.array([0, 0, 1]))
    truth.segments[:, :100], truth.segments[:10, 100:110], truth.segments[:40, 150:190] = 1, 2, 3
    prediction = Segmentation(np.where(truth.segments == 2, 0, truth.segments).astype(np.int32), truth.labels)
    prediction.segments[60:64, 100:104] = 2  # a false alarm of class 0 on void
    small, medium, large = (dense(part, 2)[:, 1:].tolist() for part in count_image(truth, prediction, 2).sizes)
    assert list(SIZES) == ["small", "medium", "large"]
    assert small == [[0, 0, 1], [0, 0, 0]]  # missed; on void nobody is made up
    assert medium == [[0, 0, 0], [1, 0, 0]] and large == [[1, 0, 0], [0, 0, 0]]


def test_confusion_says_what_was_found_as_what() -> None:
    truth = scene([[1] * 4, [2] * 4, [3, 3, 0, 0]], [0, 1, 1])
    prediction = scene([[1] * 4, [2, 2, 2, 3], [3, 0, 0, 0]], [1, 1, 0])
    table = {(int(a), int(b)): int(n) for a, b, n in count_image(truth, prediction, 2).confusion}
    # 1 of class 0 was taken for class 1, one of class 1 was found, one missed, and one of class 0 was made up
    assert table == {(0, 1): 1, (1, 1): 1, (1, 2): 1, (2, 0): 1}


def test_an_image_of_void_is_no_image() -> None:
    empty = scene([[0, 0]], [])
    assert np.isnan(count_image(empty, empty, 3).pq(3))
    prediction = scene([[1, 1]], [2])
    counts = count_image(empty, prediction, 3, boundary=True)
    assert np.isnan(counts.pq(3)) and len(counts.quality[0]) == 0 and len(counts.confusion) == 0
    with pytest.raises(ValueError, match="labels run from 2 to 2, expected 0 to 1"):
        count_image(empty, prediction, 2)


def test_packed_records_come_back_to_the_last_bit(small_categories: Categories, random_segmentation: Draw) -> None:
    rng, things = np.random.default_rng(8), list(small_categories.things)
    empty = np.zeros(0)
    images = {}
    for row in range(12):
        truth, prediction = (random_segmentation(rng, 40, 60, small_categories, things=6, crowd=True) for _ in range(2))
        labels = np.sort(rng.choice(things, 9))
        scores = rng.random(9) if row % 2 else rng.random(9).astype(np.float32).astype(np.float64)
        taken, crowd = rng.integers(0, 1024, (2, 9)).astype(np.uint16)
        scored = InstanceMatches(labels, scores, taken, crowd, np.sort(rng.choice(things, 3)))
        images[row] = count_image(
            truth, prediction, 5, row > 3, scored if row > 5 else None, f"bild {row} ü.jpg", (2, row)
        )
    few = np.zeros(0, np.int64), np.zeros((0, 4))
    none = InstanceMatches(few[0], empty, *np.zeros((2, 0), np.uint16), few[0])
    many = np.array([3, 70_000]), np.array([[0.1 + 0.2, 1, 255, 256], [1e-300, 1, 2**40, 65_536]])
    images[70_000] = ImageCounts(few, (few, many, few), np.zeros((0, 3), np.int64), few, none)
    records = ImageRecords(images)
    assert list(records) == list(images) and len(records) == 13 and 70_000 in records and 12 not in records
    for row, expected in images.items():
        found = records[row]
        assert (found.name, found.recall) == (expected.name, expected.recall)
        for one, other in zip(arrays(found), arrays(expected), strict=True):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def arrays(image: ImageCounts) -> list[np.ndarray]:
    """All arrays of a record, in one order."""
    sparse = [image.quality, *image.sizes, *([] if image.boundary is None else [image.boundary])]
    matches = [] if image.instances is None else list(vars(image.instances).values())
    return [image.confusion, *(array for counts in sparse for array in counts), *matches]
