"""The losses of JSIS-Net's two branches (arXiv 1809.02110, section 2.1).

Shapes: B images, C classes, R regions of the batch, D channels, S side of the features, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from panoptic import losses
from panoptic.distributed import batch_parts
from panoptic.layers.resize import resize
from panoptic.models.base import Outputs
from panoptic.models.jsis_net.c4_head import C4Head
from panoptic.models.jsis_net.instance_branch import InstanceBranch
from panoptic.rcnn.boxes import count_labels
from panoptic.rcnn.roi_heads import Sampled, box_losses, mask_loss, match_regions, positive_rows, sample_regions
from panoptic.rcnn.rpn import match_anchors, region_losses
from panoptic.segmentation import Targets
from panoptic.targets.dense import semantic_map
from panoptic.targets.instances import instance_lists, region_masks


def semantic_loss(logits: Tensor, targets: Targets, align_corners: bool) -> Tensor:
    """Mean cross-entropy over the labelled pixels of logits [B, C, h, w] that are upsampled to the canvas."""
    return losses.cross_entropy(resize(logits, targets.frame.canvas, align_corners), semantic_map(targets))


def instance_losses(
    branch: InstanceBranch,
    outputs: Outputs,
    targets: Targets,
    weights: Mapping[str, float],
    *,
    soft_masks: bool,
    mask_reduction: Literal["sum", "mean"],
) -> dict[str, Tensor]:
    """Terms "objectness", "region", "class", "box" and "mask", weighted; draws anchors first, then regions.

    Args:
        branch: of the model.
        outputs: of `JSISNet.network`.
        targets: the batch.
        weights: factor of each term.
        soft_masks: of `region_mask_loss`.
        mask_reduction: of `region_mask_loss`.
    """
    detection, background = branch.detection, branch.head.background
    entries, true_boxes, true_classes = instance_lists(targets, branch.categories)
    logits, deltas, anchors = branch.anchor_outputs(outputs)
    matched = match_anchors(anchors, true_boxes, branch.regions)
    found = branch.candidate_boxes(outputs, targets.frame, training=True)
    proposals = branch.choose(found, targets.frame, training=True, mark=True)
    candidates = match_regions(proposals, true_boxes, detection)
    # the numbers of anchors and regions to draw from, counted in one read of the device
    amounts = count_labels([labels for _, labels in matched], [labels for _, labels in candidates[1]])
    objectness, region = region_losses(
        logits, deltas, anchors, true_boxes, branch.regions, matched=matched, amounts=amounts[0]
    )
    sampled = sample_regions(proposals, true_boxes, true_classes, background, detection, candidates, amounts=amounts[1])
    boxes = [part.boxes for part in sampled]
    features = branch.head.region_features(outputs["features"], branch.stride, boxes, branch.stage)
    class_logits, codes = branch.head.boxes(features)
    entropy, box = box_losses(class_logits, codes, sampled, true_boxes, detection)
    share = len(features) / (detection.samples * len(sampled))  # divided by the quota, not by what there was
    mask = region_mask_loss(branch.head, features, sampled, entries, targets, soft_masks, mask_reduction)
    return {
        "objectness": weights["objectness"] * objectness,
        "region": weights["region"] * region,
        "class": weights["class"] * share * entropy,
        "box": weights["box"] * share * box,
        "mask": weights["mask"] * mask,
    }


def region_mask_loss(
    head: C4Head,
    features: Tensor,
    sampled: Sequence[Sampled],
    entries: Sequence[Tensor],
    targets: Targets,
    soft: bool,
    reduction: Literal["sum", "mean"],
) -> Tensor:
    """The mask loss of each image, a mean over its positive regions, added up or averaged over the images of the batch.

    The sum is that of the whole batch, whatever part of it a worker sees at once (`batch_parts`): the same four images
    teach the same as one batch, as two micro-batches or on two workers. Earlier versions added up over a part and
    averaged over the parts, so that their masks weighed less the more parts there were; one part is as it was.

    Args:
        head: of the branch.
        features: float [R, D, S, S], of all sampled regions.
        sampled: of each image.
        entries: of each image int64 [n], of `instance_lists`.
        targets: the batch.
        soft: targets are the covered shares of the cells; else those of at least 1/2 count as 1, the others as 0.
        reduction: over the images.
    """
    classes = torch.cat([part.classes for part in sampled])
    positive = positive_rows(sampled)
    if not len(positive):  # every layer keeps its gradient
        return 0 * head.mask_logits(features[:1], torch.zeros_like(classes[:1])).sum()
    owners, boxes = [part.owners for part in sampled], [part.positives for part in sampled]
    masks = region_masks(targets, entries, boxes, owners, head.options.mask_side)
    if not soft:
        masks = (masks >= 0.5).to(masks)
    counts = [len(owner) for owner in owners]
    logits = head.mask_logits(features[positive], classes[positive])
    terms = [mask_loss(x, y) for x, y in zip(logits.split(counts), masks.split(counts), strict=True)]
    total = torch.stack(terms).sum()
    return total * batch_parts() if reduction == "sum" else total / len(sampled)
