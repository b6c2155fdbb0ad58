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
from torch.utils.checkpoint import checkpoint

from panoptic import losses
from panoptic.matcher import Matches
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer.mask_resampler import Extent
from panoptic.models.mask_transformer.masks import mask_logits, mask_products
from panoptic.models.mask_transformer.postprocess import merge_queries, query_instances, query_semantics
from panoptic.segmentation import Categories, Frame, Instances, Segmentation, Targets

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


def class_losses(classes: Tensor, matches: Matches, targets: Targets, no_object_weight: float) -> Tensor:
    """[L], the cross-entropy of all queries of each layer, [L B, Q, K + 1]; those without a target say "no object"."""
    images = len(targets.labels)
    wanted = torch.full(classes.shape[:2], classes.shape[2] - 1, device=classes.device)
    wanted[matches.groups, matches.queries] = targets.labels[matches.groups % images, matches.targets]
    layers = classes.float().unflatten(0, (-1, images)).flatten(1, 2)
    return losses.query_cross_entropy(layers, wanted.view(len(layers), -1), no_object_weight)


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


def _images(outputs: Outputs, frame: Frame) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor], Extent]]:
    """Class logits, masks and extent of each image."""
    for b, (size, output) in enumerate(zip(frame.sizes.tolist(), frame.output_sizes.tolist(), strict=True)):

        def masks(queries: Tensor, b: int = b) -> Tensor:
            return mask_logits(outputs, b, queries)

        yield outputs["classes"][b], masks, Extent(frame.canvas, (size[0], size[1]), (output[0], output[1]))
