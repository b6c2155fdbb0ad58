"""The losses of Panoptic FPN (arXiv 1901.02446, section 3): those of Mask R-CNN and one of the semantic branch.

Shapes: B images, H x W canvas, S stuff classes, h x w the map of the semantic branch.
"""

from __future__ import annotations

from torch import Tensor

from panoptic import losses
from panoptic.layers.resize import resize
from panoptic.models.base import Outputs
from panoptic.models.panoptic_fpn.targets import semantic_targets
from panoptic.rcnn.canvas import padded_canvas
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.segmentation import Categories, Targets

INSTANCE_TERMS = ("class", "box", "mask")
"""Terms of the box head and the mask head, which share a weight; those of the proposals have weight 1."""


def weighted_losses(
    outputs: Outputs,
    targets: Targets,
    detector: Detector,
    categories: Categories,
    *,
    semantic_weight: float,
    instance_weight: float,
) -> dict[str, Tensor]:
    """Terms "semantic", "objectness", "region", "class", "box" and "mask".

    Args:
        outputs: of `PanopticFPN.network`.
        targets: the batch.
        detector: of the model.
        categories: tell things from stuff.
        semantic_weight: factor of the semantic loss.
        instance_weight: factor of `INSTANCE_TERMS`.
    """
    terms = {"semantic": semantic_weight * semantic_loss(outputs["semantic"], targets, categories)}
    for name, value in detector.losses(outputs, targets).items():
        terms[name] = value * (instance_weight if name in INSTANCE_TERMS else 1.0)
    return terms


def semantic_loss(logits: Tensor, targets: Targets, categories: Categories) -> Tensor:
    """Mean cross-entropy over the labelled pixels of logits [B, 1 + S, h, w] that are upsampled to the canvas."""
    height, width = targets.frame.canvas
    upsampled = resize(logits, padded_canvas(targets.frame), False)[:, :, :height, :width]
    return losses.cross_entropy(upsampled, semantic_targets(targets, categories))
