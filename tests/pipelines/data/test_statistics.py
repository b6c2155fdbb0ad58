"""Statistics: counts of a few pixels by hand, and the same from any division into shards."""

from __future__ import annotations

import numpy as np

from panoptic.segmentation import Categories, Segmentation
from pipelines.data.statistics import Segments, added, class_rows, of_images, percent, size_pairs
from tests.conftest import draw_segmentation


def test_counts_by_hand() -> None:
    segments = np.array([[0, 1, 1, 2], [3, 3, 3, 3]], np.int32)
    truth = Segmentation(segments, np.array([2, 0, 2]), np.array([False, False, True]))
    empty = Segmentation(np.zeros((4, 1), np.int32), np.zeros(0, np.int64))
    counts = of_images([Segments.of(truth), Segments.of(empty)], 3)
    assert (counts.pixels, counts.void, counts.crowd) == (12, 5, 4)
    assert counts.class_images == (1, 0, 1) and counts.class_pixels == (1, 0, 6) and counts.class_crowds == (0, 0, 1)
    assert counts.areas[0][:3] == (1, 0, 0) and counts.areas[2][:4] == (0, 1, 1, 0)
    assert counts.segments == (1, 0, 0, 1) and counts.sizes == {"2x4": 1, "4x1": 1}
    assert size_pairs(counts) == [(2, 4, 1), (4, 1, 1)]


def test_parts_add_up_to_the_whole(small_categories: Categories) -> None:
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (100, 9), (20, 30), (9, 100), (31, 31)]
    images = [Segments.of(draw_segmentation(rng, *size, small_categories, crowd=k > 2)) for k, size in enumerate(sizes)]
    classes = len(small_categories)
    whole = of_images(images, classes)
    for parts in (images[:1], images[1:]), (images[3:], [], images[:3]):
        assert added((of_images(part, classes) for part in parts), classes) == whole
    assert list(whole.sizes) == ["9x100", "20x30", "31x31", "100x9"]
    assert sum(map(sum, whole.areas)) == sum(len(image.labels) for image in images)


def test_the_table(small_categories: Categories) -> None:
    truth = draw_segmentation(np.random.default_rng(1), 40, 50, small_categories, crowd=True)
    counts = of_images([Segments.of(truth)], len(small_categories))
    rows = class_rows(small_categories, np.bincount(truth.labels, minlength=5).tolist(), counts)
    assert rows[0] == ["class", "kind", "segments", "crowds", "images", "pixels"] and len(rows) == 6
    assert rows[2][:3] == ["sky", "stuff", "1"]
    assert class_rows(small_categories, [3, 1, 0, 0, 0], None)[:2] == [rows[0][:3], [*rows[1][:2], "3"]]
    assert [percent(part, 10**6) for part in (0, 1, 123, 10**6)] == ["0.00 %", "0.0001 %", "0.01 %", "100.00 %"]
