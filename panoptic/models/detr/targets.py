"""The boxes that DETR learns, from the maps of segments.

Shapes: B images, N segments (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from panoptic.segmentation import IGNORE, Targets
from panoptic.targets.instances import boxes as segment_boxes


class BoxTargets(NamedTuple):
    """The boxes of a batch's segments, things and stuff alike."""

    present: Tensor
    """bool [B, N], the segments that have a pixel; others are no targets."""
    boxes: Tensor
    """float32 [B, N, 4], centre x, centre y, width and height as shares of the image without padding."""


def box_targets(targets: Targets) -> BoxTargets:
    """The box of each segment, which ends at its last pixel, not after it, as in the reference."""
    corners = segment_boxes(targets)
    present = (targets.labels != IGNORE) & (corners[:, :, 2] > corners[:, :, 0])
    low, high = corners[:, :, :2], corners[:, :, 2:] - 1
    boxes = torch.cat([(low + high) / 2, high - low], 2)
    sizes = targets.frame.sizes.to(boxes.device, non_blocking=True).flip(1).repeat(1, 2)
    return BoxTargets(present, boxes / sizes[:, None])
