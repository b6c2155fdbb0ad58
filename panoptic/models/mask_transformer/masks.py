"""Masks of queries: the products of their embeddings with the features of every pixel.

Shapes: B images, Q queries, D mask channels, h x w stride-4 maps, n some queries of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panoptic.models.base import CERTAIN, Outputs


def mask_products(embeddings: Tensor, features: Tensor) -> Tensor:
    """Mask logits [..., Q, h, w] of embeddings [..., Q, D] and features [..., D, h, w]; float32 under autocast too."""
    with torch.autocast(features.device.type, enabled=False):
        return (embeddings.float() @ features.float().flatten(-2)).unflatten(-1, features.shape[-2:])


def mask_logits(outputs: Outputs, image: int, queries: Tensor) -> Tensor:
    """Mask logits, float32 [n, h, w], of some queries (int64 [n]) of an image.

    Args:
        outputs: of a `MaskTransformer`; "masks" [B, Q, h, w] among them, logits or bool, stand in for the products.
        image: the place in the batch.
        queries: any, in any order.
    """
    if "masks" not in outputs:
        return mask_products(outputs["embeddings"][image, queries], outputs["features"][image])
    masks = outputs["masks"][image, queries]
    return masks.float() * (2 * CERTAIN) - CERTAIN if masks.dtype == torch.bool else masks.float()
