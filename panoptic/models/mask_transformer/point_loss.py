"""Mask2Former's loss: masks are compared at points (Cheng et al., arXiv 2112.01527, section 3.3).

For the matching, at points that all queries and segments of an image share; for the loss, at points of each matched
mask, most of them where it is least certain. Random numbers are drawn layer by layer, the last one first: points for
the cost of each image, candidates, points that may be anywhere.

Shapes: B images, L layers, Q queries, K classes, D mask channels, h x w stride-4 maps, N segments (padded), P points,
M matches of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panoptic import losses
from panoptic.distributed import world_mean
from panoptic.matcher import Matches, class_cost, cross_entropy_cost, dice_cost, hungarian
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer import point_sampling
from panoptic.models.mask_transformer.config import MaskClassificationConfig
from panoptic.models.mask_transformer.loss import class_losses, mask_losses, trained_layers, weighted_terms
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.targets import segment_counts, target_segments
from panoptic.segmentation import Targets


def point_loss(
    outputs: Outputs,
    targets: Targets,
    config: MaskClassificationConfig,
    *,
    points: int = 12544,
    oversample: float = 3.0,
    importance: float = 0.75,
) -> dict[str, Tensor]:
    """The terms "classes", "masks" (cross-entropy) and "dice"; of prediction i but the last with the suffix `_i`.

    Prediction 0 is that of the initial queries.

    Args:
        outputs: of the network.
        targets: of the batch.
        config: has the weights.
        points: P.
        oversample: candidates drawn for each point of a matched mask.
        importance: share of those points that are the least certain candidates; the others are uniform.

    Where outputs are not finite no term is, and a warning names the images.
    """
    images = len(outputs["classes"])
    chosen = target_segments(targets)
    normaliser = world_mean(chosen.sum().float()).clamp(min=1)
    trained = trained_layers(outputs)
    classes, embeddings = trained.classes, trained.embeddings
    # the matches of a layer are as many whatever they are, so that points can be drawn before them
    count = sum(min(segments, classes.shape[1]) for segments in segment_counts(targets, chosen))
    layer_masks, costs, drawn, layer_points = [], [], [], []
    with torch.no_grad():
        parts = zip(classes.split(images), embeddings.split(images), strict=True)
        for layer, (logits, vectors) in enumerate(parts):
            layer_masks.append(mask_products(vectors, trained.features_of(layer)))
            costs.append(matching_cost(logits, layer_masks[-1], targets, config, points))
            drawn.append(point_sampling.draw_candidates(count, points, oversample, importance, classes.device))
        # one matching for all layers: the device waits for the host once
        matches = hungarian(torch.cat(costs), chosen, targets.names)
        for layer, (masks, candidates) in enumerate(zip(layer_masks, drawn, strict=True)):
            part = slice(layer * count, (layer + 1) * count)
            matched = masks[matches.groups[part] - layer * images, matches.queries[part]]
            layer_points.append(point_sampling.uncertain_points(matched, *candidates))
    class_terms = class_losses(classes, matches, targets, config.no_object_weight)
    mask_terms = _cross_entropy_and_dice(embeddings, trained.features, torch.cat(layer_points), targets, matches)
    return matches.learnable(weighted_terms(config, trained.suffixes, class_terms, mask_terms, normaliser))


@torch.no_grad()
def matching_cost(
    classes: Tensor, masks: Tensor, targets: Targets, config: MaskClassificationConfig, points: int
) -> Tensor:
    """The cost of each pair of query and segment, [B, Q, N], at points that are drawn here.

    Args:
        classes: [B, Q, K + 1] logits.
        masks: [B, Q, h, w] logits.
        targets: of the batch.
        config: has the weights.
        points: P.
    """
    # image by image, in the order in which the reference draws them
    positions = torch.cat([torch.rand(1, points, 2, device=masks.device) for _ in range(len(classes))])
    logits = point_sampling.sample(masks, positions)
    truths = point_sampling.every_mask_at(targets.segments, positions, targets.labels.shape[1])
    cost = config.class_weight * class_cost(classes, targets.labels)
    cost += config.mask_weight * cross_entropy_cost(logits, truths)
    return cost + config.dice_weight * dice_cost(logits, truths)


def _cross_entropy_and_dice(
    embeddings: Tensor, features: Sequence[Tensor], points: Tensor, targets: Targets, matches: Matches
) -> Tensor:
    """Sums of cross-entropy and dice losses over the matches of each layer, float [L, 2].

    `points` is [M, P, 2], those at which each match is compared.
    """
    images = matches.groups % len(targets.labels)

    def compare(logits: Tensor, part: Tensor) -> Tensor:
        truths = point_sampling.masks_at(targets.segments, images[part], matches.targets[part], points[part])
        sampled = point_sampling.sample(logits[:, None], points[part])[:, 0]
        return torch.stack(losses.cross_entropy_and_dice(sampled, truths), 1)

    return mask_losses(embeddings, features, matches, compare)
