"""Masked attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from panoptic.models.mask2former.transformer_decoder import attention_mask
from panoptic.models.mask_transformer.masks import mask_products


def test_masks_of_attention_are_resized_products() -> None:
    """As the reference makes them: masks at stride 4, resized, at least 1/2; rows of nothing see everything."""
    draw = torch.Generator().manual_seed(0)
    embeddings, features = torch.randn(2, 7, 5, generator=draw), torch.randn(2, 5, 16, 24, generator=draw)
    embeddings[0, 3] = 0
    features[1] -= 9 * embeddings[1, 2].view(5, 1, 1)  # this query is nowhere
    logits = F.interpolate(mask_products(embeddings, features), size=(4, 6), mode="bilinear")
    blocked = logits.sigmoid().flatten(2) < 0.5
    blocked[blocked.all(-1)] = False
    small = F.interpolate(features, size=(4, 6), mode="bilinear").flatten(2)
    mask = attention_mask(embeddings, small)
    assert torch.equal(mask[:, 0], ~blocked)
    assert mask[1, 0, 2].all() and mask[0, 0, 3].all()
    assert not mask.all()
