"""The ground truth as outputs of a mask-classification model."""

from __future__ import annotations

import torch

from panoptic.matcher import class_cost, dice_cost, hungarian
from panoptic.models.base import CERTAIN, Outputs
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.targets import coarse_masks, present
from panoptic.segmentation import Targets


def truth(targets: Targets, outputs: Outputs) -> Outputs:
    """ "classes" and "masks" (bool, at canvas resolution) of the ground truth.

    Each segment takes the place of the query that is nearest to it by class and mask, so that either of the two
    alone makes sense beside the network's other outputs. With more segments than queries, those that no query
    matches stay away. Other queries are "no object" with an empty mask.
    """
    classes, embeddings, features = outputs["classes"], outputs["embeddings"], outputs["features"]
    wanted = present(targets)
    logits = mask_products(embeddings, features)
    masks = coarse_masks(targets, wanted, (logits.shape[-2], logits.shape[-1]))
    cost = class_cost(classes, targets.labels) + dice_cost(logits.flatten(2), masks)
    matches = hungarian(cost, wanted, targets.names)
    named = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    named[matches.groups, matches.queries] = targets.labels[matches.groups, matches.targets]
    found = torch.zeros(*classes.shape[:2], *targets.frame.canvas, dtype=torch.bool, device=classes.device)
    for b, q, k in zip(*(x.tolist() for x in (matches.groups, matches.queries, matches.targets)), strict=True):
        found[b, q] = targets.segments[b] == k + 1
    return {"classes": torch.zeros_like(classes).scatter_(2, named[:, :, None], CERTAIN), "masks": found}
