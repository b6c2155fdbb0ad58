"""MaskFormer's loss: masks are compared at every pixel (Cheng et al., arXiv 2107.06278, section 3.2).

Shapes: B images, L layers, Q queries, K classes, D mask channels, h x w stride-4 maps, N segments (padded), M matches
of all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic import losses
from panoptic.distributed import world_mean
from panoptic.matcher import Matches, class_cost, dice_cost, focal_cost, hungarian
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer.config import MaskTransformerConfig
from panoptic.models.mask_transformer.loss import class_losses, mask_losses, trained_layers, weighted_terms
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.targets import coarse_masks, target_segments
from panoptic.segmentation import Targets


def maskformer_loss(
    outputs: Outputs, targets: Targets, config: MaskTransformerConfig, stride: int = 1
) -> dict[str, Tensor]:
    """The terms "classes", "masks" (focal) and "dice"; of decoder layer i but the last with the suffix `_i`.

    Args:
        outputs: of the network.
        targets: of the batch.
        config: has the weights.
        stride: mask losses count every so-many-th pixel of rows and columns.

    Where outputs are not finite no term is, and a warning names the images.
    """
    chosen = target_segments(targets)
    normaliser = world_mean(chosen.sum().float()).clamp(min=1)
    suffixes, classes, embeddings, (features,) = trained_layers(outputs)
    layers = zip(classes.split(len(chosen)), embeddings.split(len(chosen)), strict=True)
    masks = coarse_masks(targets, chosen, (features.shape[-2], features.shape[-1]))
    cost = torch.cat(
        [
            matching_cost(logits, mask_products(vectors, features), targets.labels, masks, config)
            for logits, vectors in layers
        ]
    )
    matches = hungarian(cost, chosen, targets.names)
    class_terms = class_losses(classes, matches, targets, config.no_object_weight)
    mask_terms = _focal_and_dice(embeddings, features, targets, matches, stride)
    return matches.learnable(weighted_terms(config, suffixes, class_terms, mask_terms, normaliser))


@torch.no_grad()
def matching_cost(
    classes: Tensor, masks: Tensor, labels: Tensor, target_masks: Tensor, config: MaskTransformerConfig
) -> Tensor:
    """The cost of each pair of query and segment, [B, Q, N]; masks are compared at their own resolution.

    Args:
        classes: [B, Q, K + 1] logits.
        masks: [B, Q, h, w] logits.
        labels: int64 [B, N].
        target_masks: float [B, N, h w], of `coarse_masks`.
        config: has the weights.
    """
    masks = masks.flatten(2)
    cost = config.class_weight * class_cost(classes, labels)
    cost += config.mask_weight * focal_cost(masks, target_masks)
    return cost + config.dice_weight * dice_cost(masks, target_masks)


def _focal_and_dice(embeddings: Tensor, features: Tensor, targets: Targets, matches: Matches, stride: int) -> Tensor:
    """Sums of focal and dice losses over the matches of each layer, float [L, 2], at canvas resolution."""
    segments = targets.segments[:, stride // 2 :: stride, stride // 2 :: stride]
    images = matches.groups % len(segments)

    def compare(logits: Tensor, part: Tensor) -> Tensor:
        masks = segments[images[part]] == (matches.targets[part] + 1)[:, None, None]
        logits = F.interpolate(logits[:, None], size=masks.shape[1:], mode="bilinear", align_corners=False)
        return torch.stack(losses.focal_and_dice(logits.flatten(1), masks.flatten(1)), 1)

    return mask_losses(embeddings, [features], matches, compare)
