"""The loss of mask classification (Cheng et al., arXiv 2107.06278, section 3.2), as far as models share it.

In each layer that is trained, queries and segments are matched one to one; a matched query learns the class and the
mask of its segment, all others learn "no object". The models differ in how they compare masks.

Shapes: B images, L layers, Q queries, K classes, D mask channels, h x w stride-4 maps, N segments (padded), M matches
of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from panoptic import losses
from panoptic.matcher import Matches
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer.config import MaskClassificationConfig
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.segmentation import Targets

CHUNK = 32
"""Masks compared at once."""

KEPT = 320
"""Matches whose intermediate results are kept for the gradient.

With more in all layers, what is between masks and losses is computed again, chunk by chunk, so that the memory of a
loss does not grow with the number of targets."""


class TrainedLayers(NamedTuple):
    """The predictions that are trained, the last layer's first."""

    suffixes: list[str]
    """Suffixes of the names of the loss terms, L of them."""
    classes: Tensor
    """[L B, Q, K + 1] logits."""
    embeddings: Tensor
    """[L B, Q, D]."""
    features: list[Tensor]
    """[B, D, h, w] of each layer, or of all of them: 1 or L."""

    def features_of(self, layer: int) -> Tensor:
        """The features [B, D, h, w] that masks of a layer are products with."""
        return self.features[layer % len(self.features)]


def trained_layers(outputs: Outputs) -> TrainedLayers:
    """The layers that are trained, of the outputs of a `MaskTransformer`."""
    classes, embeddings = outputs["classes"], outputs["embeddings"]
    features = [outputs["features"].contiguous()]  # once, instead of at every product
    if "auxiliary_classes" not in outputs:
        return TrainedLayers([""], classes, embeddings, features)
    earlier_classes, earlier_embeddings = outputs["auxiliary_classes"], outputs["auxiliary_embeddings"]
    earlier = range(len(earlier_classes))
    if "features_0" in outputs:
        features += [outputs[f"features_{layer}"].contiguous() for layer in earlier]
    return TrainedLayers(
        ["", *(f"_{layer}" for layer in earlier)],
        torch.cat([classes, *earlier_classes]),
        torch.cat([embeddings, *earlier_embeddings]),
        features,
    )


def weighted_terms(
    config: MaskClassificationConfig,
    suffixes: Sequence[str],
    class_losses: Tensor,
    mask_losses: Tensor,
    normaliser: Tensor,
) -> dict[str, Tensor]:
    """The weighted terms "classes", "masks" and "dice" of each layer, with its suffix.

    Args:
        config: has the weights.
        suffixes: L of them.
        class_losses: [L], means.
        mask_losses: [L, 2], sums over the matches of the mask loss and of the dice loss.
        normaliser: scalar, the number of targets.
    """
    masks, dice = mask_losses.unbind(1)
    terms = {}
    for layer, suffix in enumerate(suffixes):
        terms[f"classes{suffix}"] = config.class_weight * class_losses[layer]
        terms[f"masks{suffix}"] = config.mask_weight * masks[layer] / normaliser
        terms[f"dice{suffix}"] = config.dice_weight * dice[layer] / normaliser
    return terms


def class_losses(classes: Tensor, matches: Matches, targets: Targets, no_object_weight: float) -> Tensor:
    """The cross-entropy of all queries of each layer, [L]; those without a target should say "no object".

    Args:
        classes: [L B, Q, K + 1] logits.
        matches: of all layers.
        targets: of the batch.
        no_object_weight: of queries without a target; others weigh 1.
    """
    images = len(targets.labels)
    labels = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    labels[matches.groups, matches.queries] = targets.labels[matches.groups % images, matches.targets]
    layers = classes.float().unflatten(0, (-1, images)).flatten(1, 2)
    return losses.query_cross_entropy(layers, labels.view(len(layers), -1), no_object_weight)


def mask_losses(
    embeddings: Tensor, features: Sequence[Tensor], matches: Matches, compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The sums over the matches of each layer of two losses of their masks, float [L, 2], in bounded memory.

    Args:
        embeddings: [L B, Q, D].
        features: [B, D, h, w] of each layer, or one of all layers.
        matches: of all layers.
        compare: gives two losses, float [m, 2], of the mask logits [m, h, w] of some matches, int64 [m].
    """
    images = len(features[0])
    layers = len(embeddings) // images
    if not len(matches.queries):  # the graph to all that makes masks is kept
        return (0 * sum((part.sum() for part in features), embeddings.sum())).expand(layers, 2)
    # taken apart once: the gradient of each selection would be as large as all features
    maps = [image for part in features for image in part.unbind()]
    matched = embeddings[matches.groups, matches.queries]
    owner = matches.groups % len(maps)
    order = owner.argsort(stable=True)
    counts = matches.per_image(len(maps))
    compared = []
    for image_features, pairs in zip(maps, order.split(counts), strict=True):
        for part in pairs.split(CHUNK) if len(pairs) else ():

            def values(vectors: Tensor, image_features: Tensor, part: Tensor = part) -> Tensor:
                return compare(mask_products(vectors, image_features), part)

            if len(matched) > KEPT:
                compared.append(checkpoint(values, matched[part], image_features, use_reentrant=False))
            else:
                compared.append(values(matched[part], image_features))
    layer = torch.div(matches.groups[order], images, rounding_mode="floor")
    return embeddings.new_zeros(layers, 2).index_add(0, layer, torch.cat(compared))
