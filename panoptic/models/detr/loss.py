"""DETR's set prediction loss (Carion et al., arXiv 2005.12872, section 3.1 and appendix A.2).

Predictions and segments are matched one to one, at the lowest cost of class and box, in each decoder layer by
itself. Matched queries learn class, box and (in the last layer) mask of their segment, all others "no object".

Shapes: B images, L decoder layers, G = L B groups (layers outermost), Q queries, N segments (padded), K + 1 logits,
M matches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from panoptic import losses
from panoptic.distributed import world_mean
from panoptic.matcher import Matches, class_cost, hungarian
from panoptic.models.detr.class_space import ClassSpace
from panoptic.models.detr.targets import BoxTargets, box_targets
from panoptic.segmentation import Targets

PIXELS = 1 << 24
"""Mask pixels compared at once; with more, they are computed again for the gradient."""

QueryMasks = Callable[[int, Tensor], Tensor]
"""The mask logits [n, h, w] over the canvas of some queries, int64 [n], of one image."""


@dataclass(frozen=True)
class LossWeights:
    """The factors of the loss terms; those of class, box and generalised IoU are also factors in the matching cost."""

    classes: float
    boxes: float
    giou: float
    masks: float
    dice: float
    no_object: float
    """The weight of queries without a segment in the cross-entropy, where others weigh 1."""


def set_prediction_loss(
    outputs: Mapping[str, Tensor],
    targets: Targets,
    classes: ClassSpace,
    weights: LossWeights,
    query_masks: QueryMasks | None = None,
) -> dict[str, Tensor]:
    """Weighted terms "class", "box", "giou", "mask" and "dice"; those of earlier layers are "class_0" and so on.

    Boxes and masks are summed over the matches and divided by the number of segments, the mean over the workers.

    Args:
        outputs: of `DETR.network`.
        targets: of the batch.
        classes: of the logits.
        weights: of the terms.
        query_masks: None for a model without masks, whose terms "mask" and "dice" are absent.

    Where outputs are not finite no term is, and a warning names the images.
    """
    images = len(targets.labels)
    truth = box_targets(targets)
    logits, boxes = _all_layers(outputs)
    matches = match(logits, boxes, targets, truth, classes, weights)
    count = world_mean(truth.present.sum().float()).clamp(min=1)
    layers = len(logits) // images
    class_terms = _class_losses(logits, targets, matches, classes, weights.no_object)
    box_terms, giou_terms = (terms / count for terms in _box_losses(boxes, truth, matches))
    terms: dict[str, Tensor] = {}
    for i in (layers - 1, *range(layers - 1)):
        suffix = "" if i == layers - 1 else f"_{i}"
        terms[f"class{suffix}"] = weights.classes * class_terms[i]
        terms[f"box{suffix}"] = weights.boxes * box_terms[i]
        terms[f"giou{suffix}"] = weights.giou * giou_terms[i]
    if query_masks is not None:
        focal, dice = _mask_losses(query_masks, targets, matches.of((layers - 1) * images, images))
        terms["mask"] = weights.masks * focal / count
        terms["dice"] = weights.dice * dice / count
    return matches.learnable(terms)


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, targets: Targets, truth: BoxTargets, classes: ClassSpace, weights: LossWeights
) -> Matches:
    """The assignment of lowest cost of each layer and image, by class and box; masks have no say.

    Args:
        logits: [G, Q, K + 1].
        boxes: [G, Q, 4], centre and size.
        targets: of the B images.
        truth: their boxes.
        classes: of the logits.
        weights: of the terms of the cost.
    """
    layers = len(logits) // len(targets.labels)
    target_boxes = truth.boxes.repeat(layers, 1, 1)
    cost = weights.classes * class_cost(logits, classes.to_logits(targets.labels).repeat(layers, 1))
    cost += weights.boxes * torch.cdist(boxes, target_boxes, p=1)
    cost -= weights.giou * losses.generalised_iou(
        losses.box_corners(boxes)[:, :, None], losses.box_corners(target_boxes)[:, None]
    )
    return hungarian(cost, truth.present, targets.names)


def _all_layers(outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [G, Q, K + 1] and boxes [G, Q, 4] of all layers that are trained, the last layer last."""
    if "auxiliary_logits" not in outputs:
        return outputs["logits"], outputs["boxes"]
    earlier = outputs["auxiliary_logits"].flatten(0, 1), outputs["auxiliary_boxes"].flatten(0, 1)
    return torch.cat([earlier[0], outputs["logits"]]), torch.cat([earlier[1], outputs["boxes"]])


def _class_losses(
    logits: Tensor, targets: Targets, matches: Matches, classes: ClassSpace, no_object_weight: float
) -> Tensor:
    """The cross-entropy of each layer, [L], the queries of all images in one weighted mean."""
    images = len(targets.labels)
    target_logits = torch.full(logits.shape[:2], classes.logits, device=logits.device)
    matched = classes.to_logits(targets.labels)[matches.groups % images, matches.targets]
    target_logits[matches.groups, matches.queries] = matched
    layers = logits.view(len(logits) // images, -1, logits.shape[-1])
    return losses.query_cross_entropy(layers, target_logits.view(len(layers), -1), no_object_weight)


def _box_losses(boxes: Tensor, truth: BoxTargets, matches: Matches) -> tuple[Tensor, Tensor]:
    """The sums over the matches of each layer of the L1 distance and of 1 - generalised IoU, [L] each."""
    images = len(truth.boxes)
    matched = boxes[matches.groups, matches.queries]
    expected = truth.boxes[matches.groups % images, matches.targets]
    distance = (matched - expected).abs().sum(1)
    apart = 1 - losses.generalised_iou(losses.box_corners(matched), losses.box_corners(expected))
    layer, layers = matches.groups // images, len(boxes) // images
    return (
        distance.new_zeros(layers).index_add(0, layer, distance),
        apart.new_zeros(layers).index_add(0, layer, apart),
    )


def _mask_losses(query_masks: QueryMasks, targets: Targets, matches: Matches) -> tuple[Tensor, Tensor]:
    """Sums of focal and dice losses over the matches of the last layer, at canvas resolution, padding included."""
    frame, weight = targets.frame, 1.0
    if not len(matches.queries):  # some mask, for nothing, so that every parameter has a gradient
        nothing = torch.zeros(1, dtype=torch.int64, device=matches.queries.device)
        matches, weight = Matches(nothing, nothing, nothing, np.zeros(1, np.int64)), 0.0
    masks = []
    counts = matches.per_image(len(frame.sizes))  # the matches of one layer are ordered by image
    for b, queries in enumerate(matches.queries.split(counts)):
        if len(queries):
            masks.append(query_masks(b, queries))
    logits = torch.cat(masks)
    step = max(1, PIXELS // math.prod(frame.canvas))
    sums = logits.new_zeros(2)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        arguments = (logits[part], targets.segments, matches.groups[part], matches.targets[part])
        if len(logits) <= step:
            sums = sums + _focal_and_dice_sums(*arguments)
        else:
            sums = sums + checkpoint(_focal_and_dice_sums, *arguments, use_reentrant=False)
    return weight * sums[0], weight * sums[1]


def _focal_and_dice_sums(logits: Tensor, segments: Tensor, images: Tensor, entries: Tensor) -> Tensor:
    """The sums of focal and dice losses of masks [M, h, w] against segments `entries` of `images`, float [2]."""
    masks = segments[images] == (entries + 1)[:, None, None]
    logits = F.interpolate(logits[:, None].float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    focal, dice = losses.focal_and_dice(logits.flatten(1), masks.flatten(1))
    return torch.stack([focal.sum(), dice.sum()])
