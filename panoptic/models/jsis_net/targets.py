"""The outputs of JSIS-Net that the truth can stand for; its other targets are those of every two-stage detector.

Shapes: B images, C classes, H x W canvas, N segments, M side of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panoptic.models.base import CERTAIN
from panoptic.rcnn.mask_rcnn import true_detections
from panoptic.segmentation import IGNORE, Categories, Targets
from panoptic.targets.dense import is_thing, semantic_map


def true_outputs(targets: Targets, categories: Categories, mask_side: int) -> dict[str, Tensor]:
    """The "semantic", "detections" and "masks" of the truth, crowds included; void is the first class of stuff.

    Returns:
        logits [B, C, H, W], rows [B, N, 6] and probabilities [B, N, M, M], where M is `mask_side`.
    """
    semantic = semantic_map(targets)
    void = (categories.stuff or categories.things)[0]
    classes = torch.where(semantic == IGNORE, void, semantic)[:, None]
    logits = torch.zeros(len(classes), len(categories), *targets.frame.canvas, device=classes.device)
    detections = true_detections(targets, is_thing(targets, categories), mask_side)
    return {"semantic": logits.scatter_(1, classes, CERTAIN), **detections}
