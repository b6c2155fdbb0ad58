"""Masks of queries."""

from __future__ import annotations

import torch

from panoptic.models.mask_transformer.masks import mask_logits, mask_products


def test_masks_in_place_of_the_products() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = {
        "embeddings": torch.randn(1, 6, 4, generator=draw),
        "features": torch.randn(1, 4, 5, 7, generator=draw),
    }
    queries = torch.tensor([4, 1])
    logits = mask_products(outputs["embeddings"], outputs["features"])
    torch.testing.assert_close(mask_logits(outputs, 0, queries), logits[0, queries])
    assert torch.equal(mask_logits({**outputs, "masks": logits}, 0, queries), logits[0, queries])
    whole = {**outputs, "masks": logits > 0}
    assert set(mask_logits(whole, 0, queries).unique().tolist()) == {-30.0, 30.0}
