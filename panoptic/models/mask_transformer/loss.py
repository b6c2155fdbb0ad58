"""What the mask-classification models share (MaskFormer, Mask2Former): queries with a class and a mask each.

Such a network has outputs "classes" [B, Q, K + 1] ("no object" last), "embeddings" [B, Q, D] and "features"
[B, D, h, w]; the mask logits of a query are the product of its embedding with the features. Masks are made only
of the queries that are asked for. "auxiliary_classes" [L - 1, B, Q, K + 1] and "auxiliary_embeddings" [L - 1, B, Q, D]
are those of the earlier layers. In place of the products, "masks" [B, Q, h, w] is taken where it is given:
logits of any resolution, or bool.

Shapes: B images, Q queries, K classes, D mask channels, h x w stride-4 maps, N targets (padded), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from panoptic import losses
from panoptic.matcher import Matches, class_cost, dice_cost, hungarian
from panoptic.models.mask_transformer.mask_resampler import Extent
from panoptic.models.mask_transformer.postprocess import merge_queries, query_instances, query_semantics
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation, Targets

Outputs = dict[str, Tensor]
"""Of `models.interface`, which stands above this module."""

CERTAIN = 30.0
"""Logit of what is true, minus that of what is not: probability 1 in float32."""

CHUNK = 32
"""Masks compared at once."""

KEPT = 320
"""With more pairs than this in all layers, what is between masks and losses is computed again for the gradient, chunk
by chunk, so that the memory of a loss does not grow with the number of targets."""


def trained_layers(outputs: Outputs) -> tuple[list[str], Tensor, Tensor]:
    """Of all layers that are trained, the last one first: suffixes of the loss terms (L), class logits
    [L B, Q, K + 1] and embeddings [L B, Q, D]."""
    classes, embeddings = outputs["classes"], outputs["embeddings"]
    if "auxiliary_classes" not in outputs:
        return [""], classes, embeddings
    earlier, vectors = outputs["auxiliary_classes"], outputs["auxiliary_embeddings"]
    suffixes = ["", *(f"_{layer}" for layer in range(len(earlier)))]
    return suffixes, torch.cat([classes, *earlier]), torch.cat([embeddings, *vectors])


def learnt(targets: Targets) -> Tensor:
    """bool [B, N], the segments that queries learn: with a pixel, and no crowd."""
    return present(targets) & ~targets.crowd


def present(targets: Targets) -> Tensor:
    """bool [B, N], the segments that have a pixel."""
    images, count = targets.labels.shape
    offsets = torch.arange(images, device=targets.segments.device)[:, None, None] * (count + 1)
    found = torch.zeros(images * (count + 1), dtype=torch.bool, device=targets.segments.device)
    found[(targets.segments + offsets).view(-1)] = True
    return found.view(images, count + 1)[:, 1:] & (targets.labels != IGNORE)


def coarse_masks(targets: Targets, wanted: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [B, N, h w], the masks of the wanted segments (bool [B, N]) by nearest neighbour; 0 for others."""
    segments = targets.segments
    # as floats, which hold every segment number: nearest neighbour has no integer form
    small = functional.interpolate(segments[:, None].float(), size=size, mode="nearest")
    numbers = torch.arange(1, wanted.shape[1] + 1, device=segments.device)
    return ((small.flatten(2) == numbers[:, None]) & wanted[:, :, None]).float()


def class_losses(classes: Tensor, matches: Matches, targets: Targets, no_object_weight: float) -> Tensor:
    """[L], the cross-entropy of all queries of each layer, [L B, Q, K + 1]; those without a target say "no object"."""
    images = len(targets.labels)
    wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    wanted[matches.groups, matches.queries] = targets.labels[matches.groups % images, matches.targets]
    layers = classes.float().unflatten(0, (-1, images)).flatten(1, 2)
    return losses.query_cross_entropy(layers, wanted.view(len(layers), -1), no_object_weight)


def mask_products(embeddings: Tensor, features: Tensor) -> Tensor:
    """[..., Q, D] and [..., D, h, w] to [..., Q, h, w], in float32 under autocast too."""
    with torch.autocast(features.device.type, enabled=False):
        return (embeddings.float() @ features.float().flatten(-2)).unflatten(-1, features.shape[-2:])


def compared_masks(
    embeddings: Tensor, features: Tensor, matches: Matches, compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The sums over the pairs of each layer of what `compare` says of their masks, float [L, 2], in bounded memory.

    Args:
        embeddings: [L B, Q, D].
        features: [B, D, h, w].
        matches: of all layers.
        compare: mask logits [m, h, w] of some pairs, int64 [m], to two losses of each, float [m, 2].
    """
    images = len(features)
    layers = len(embeddings) // images
    if not len(matches.queries):  # the graph to all that makes masks is kept
        return (0 * (embeddings.sum() + features.sum())).expand(layers, 2)
    chosen = embeddings[matches.groups, matches.queries]
    owner = matches.groups % images
    order = owner.argsort(stable=True)
    found = []
    # taken apart once: the gradient of each selection would be as large as all features
    for maps, pairs in zip(
        features.unbind(), order.split(torch.bincount(owner, minlength=images).tolist()), strict=True
    ):
        for part in pairs.split(CHUNK) if len(pairs) else ():

            def values(vectors: Tensor, maps: Tensor, part: Tensor = part) -> Tensor:
                return compare(mask_products(vectors, maps), part)

            if len(chosen) > KEPT:
                found.append(checkpoint(values, chosen[part], maps, use_reentrant=False))
            else:
                found.append(values(chosen[part], maps))
    layer = torch.div(matches.groups[order], images, rounding_mode="floor")
    return features.new_zeros(layers, 2).index_add(0, layer, torch.cat(found))


def segment(
    outputs: Outputs, frame: Frame, categories: Categories, *, threshold: float, overlap: float, inside: bool
) -> list[Segmentation]:
    """Merged maps at `frame.output_sizes`; the options are those of `merge_queries`."""
    return [
        merge_queries(classes, masks, extent, categories, threshold=threshold, overlap=overlap, inside=inside)
        for classes, masks, extent in _images(outputs, frame)
    ]


def instances(outputs: Outputs, frame: Frame, categories: Categories, top: int) -> list[Instances]:
    """Scored things at `frame.output_sizes`, by `query_instances`."""
    return [
        query_instances(classes, masks, extent, categories, top=top)
        for classes, masks, extent in _images(outputs, frame)
    ]


def semantics(outputs: Outputs, frame: Frame) -> list[np.ndarray]:
    """int32 class maps at `frame.output_sizes`, by `query_semantics`."""
    return [query_semantics(classes, masks, extent) for classes, masks, extent in _images(outputs, frame)]


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


def mask_logits(outputs: Outputs, image: int, queries: Tensor) -> Tensor:
    """float32 [n, h, w] of some queries, int64 [n]."""
    if "masks" not in outputs:
        return mask_products(outputs["embeddings"][image, queries], outputs["features"][image])
    masks = outputs["masks"][image, queries]
    return masks.float() * (2 * CERTAIN) - CERTAIN if masks.dtype == torch.bool else masks.float()


def _images(outputs: Outputs, frame: Frame) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor], Extent]]:
    """Class logits, masks and extent of each image."""
    for b, (size, output) in enumerate(zip(frame.sizes.tolist(), frame.output_sizes.tolist(), strict=True)):

        def masks(queries: Tensor, b: int = b) -> Tensor:
            return mask_logits(outputs, b, queries)

        yield outputs["classes"][b], masks, Extent(frame.canvas, (size[0], size[1]), (output[0], output[1]))
