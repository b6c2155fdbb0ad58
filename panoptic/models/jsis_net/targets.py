"""The outputs of JSIS-Net that the truth can stand for; its other targets are those of every two-stage detector.

Shapes: B images, C classes, H x W canvas, N segments, M side of a mask.
"""

from __future__ import annotations

from torch import Tensor

from panoptic.models.base import CERTAIN
from panoptic.rcnn.mask_rcnn import true_detections
from panoptic.segmentation import Categories, Targets
from panoptic.targets.dense import class_logits, is_thing


def true_outputs(targets: Targets, categories: Categories, mask_side: int) -> dict[str, Tensor]:
    """The "semantic", "detections" and "masks" of the truth, crowds included; void is the first class of stuff.

    Returns:
        logits [B, C, H, W], rows [B, N, 6] and probabilities [B, N, M, M], where M is `mask_side`.
    """
    detections = true_detections(targets, is_thing(targets, categories), mask_side)
    return {"semantic": class_logits(targets, categories, CERTAIN), **detections}
