"""The boxes that DETR learns."""

from __future__ import annotations

import numpy as np

from panoptic.models.detr.targets import box_targets
from panoptic.segmentation import Segmentation, collate
from tests.panoptic.models.test_contract import as_sample


def test_segments_that_the_crop_left_without_a_pixel_are_no_targets(small_categories) -> None:
    segments = np.full((40, 50), 2, np.int32)
    segments[7, 9] = 3
    truth = Segmentation(segments, np.array([small_categories.things[0], small_categories.stuff[0], 4]))
    _, targets = collate([as_sample(truth)])
    present, boxes = box_targets(targets)
    assert present.tolist() == [[False, True, True]]
    # the last pixel is part of the box, so a segment of one pixel has no width
    np.testing.assert_allclose(boxes[0, 1], [24.5 / 50, 19.5 / 40, 49 / 50, 39 / 40], atol=1e-6)
    np.testing.assert_allclose(boxes[0, 2], [9 / 50, 7 / 40, 0, 0], atol=1e-6)
