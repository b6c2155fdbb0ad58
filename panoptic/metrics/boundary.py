"""Boundary PQ: PQ whose IoU is the smaller one of the masks' and of their boundaries'.

Cheng et al., "Boundary IoU", CVPR 2021; equal to the authors' boundary_iou_api. The boundary of a segment consists of
its pixels at a (chessboard) distance of at most d from any pixel that is not in the segment, where all around the image
counts as such; d is 2 % of the image's diagonal.

All boundaries of a map are computed at once: a pixel is inside its segment, not on the boundary, where the least and
the largest segment number within d are the same. These two filters are separable, so they cost little.

Shapes: H x W pixels, T true and P predicted segments.
"""

from __future__ import annotations

import cv2
import numpy as np

from panoptic.metrics.semantic import runs, tabulate
from panoptic.segmentation import VOID, Segmentation

DILATION = 0.02
"""d as a share of the diagonal: COCO's. Cityscapes takes 0.005."""


def boundary_overlaps(truth: Segmentation, prediction: Segmentation, dilation: float = DILATION) -> np.ndarray:
    """The pixels that the boundaries of segments share, int64 [T + 2, P + 2], for `panoptic_quality.pair`.

    Row and column 0 are void (all of it), the last ones the inner pixels of all segments.

    Args:
        truth, prediction: of one size.
        dilation: d as a share of the diagonal.
    """
    sizes = len(truth.labels) + 2, len(prediction.labels) + 2
    maps = [_hollow(m.segments, size - 1, dilation) for m, size in zip((truth, prediction), sizes, strict=True)]
    return tabulate(*runs(*maps), *sizes)


def _hollow(segments: np.ndarray, inner: int, dilation: float) -> np.ndarray:
    """The map with the number `inner` in place of the pixels of segments that are not on their boundary."""
    distance = max(1, round(dilation * float(np.hypot(*segments.shape))))
    # a frame of a number that no segment has, so that the border of the image is a boundary; float32 is exact to 2^24
    numbers = np.pad(segments.astype(np.uint16 if inner < 65535 else np.float32), 1, constant_values=inner)
    # least and largest number within the distance
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    same = (cv2.erode(numbers, kernel) == cv2.dilate(numbers, kernel))[1:-1, 1:-1]
    return np.where(same & (segments != VOID), inner, segments)
