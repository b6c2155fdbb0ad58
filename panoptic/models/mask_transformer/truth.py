"""The ground truth as outputs of a mask-classification model, for the oracle.

Shapes: B images, Q queries, K classes, H x W the canvas.
"""

from __future__ import annotations

import torch

from panoptic.matcher import class_cost, dice_cost, hungarian
from panoptic.models.base import CERTAIN, Outputs
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.targets import coarse_masks, visible_segments
from panoptic.segmentation import Targets


def truth_outputs(targets: Targets, outputs: Outputs) -> Outputs:
    """The outputs "classes" [B, Q, K + 1] and "masks" (bool [B, Q, H, W]) of the ground truth.

    Each segment takes the place of the query that is nearest to it by class and mask, so that either of the two
    alone makes sense beside the network's other outputs. With more segments than queries, those that no query
    matches stay away. Other queries are "no object" with an empty mask.
    """
    classes, embeddings, features = outputs["classes"], outputs["embeddings"], outputs["features"]
    visible = visible_segments(targets)
    logits = mask_products(embeddings, features)
    target_masks = coarse_masks(targets, visible, (logits.shape[-2], logits.shape[-1]))
    cost = class_cost(classes, targets.labels) + dice_cost(logits.flatten(2), target_masks)
    matches = hungarian(cost, visible, targets.names)
    labels = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    labels[matches.groups, matches.queries] = targets.labels[matches.groups, matches.targets]
    masks = torch.zeros(*classes.shape[:2], *targets.frame.canvas, dtype=torch.bool, device=classes.device)
    for b, q, k in zip(*(x.tolist() for x in (matches.groups, matches.queries, matches.targets)), strict=True):
        masks[b, q] = targets.segments[b] == k + 1
    return {"classes": torch.zeros_like(classes).scatter_(2, labels[:, :, None], CERTAIN), "masks": masks}
