"""MaskFormer's loss in bounded memory and of broken outputs; `test_model.py` has the published numbers."""

from __future__ import annotations

import pytest
import torch

from panoptic.models.mask_transformer import loss
from panoptic.segmentation import collate
from tests.panoptic.models.test_contract import as_sample, only
from tests.support.small import SMALL_MASKFORMER


def test_masks_are_compared_in_bounded_memory(small_categories, monkeypatch) -> None:
    """More targets than fit a chunk: the same losses and gradients as at once."""
    c = small_categories
    labels = [k % len(c) for k in range(18)]
    images, targets = collate([as_sample(only(64, 96, labels), k) for k in (0, 1)], 32)
    torch.manual_seed(0)
    model = SMALL_MASKFORMER.build(c).eval()
    results = []
    for kept in (1000, 5):
        monkeypatch.setattr(loss, "KEPT", kept)
        model.zero_grad()
        losses = model.loss(model.network(images), targets)
        sum(losses.values()).backward()
        results.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (whole_losses, whole_gradients), (losses, gradients) = results
    assert {k: v.item() for k, v in losses.items()} == pytest.approx({k: v.item() for k, v in whole_losses.items()})
    for whole, parts in zip(whole_gradients, gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_an_output_that_is_not_finite_names_its_image(small_categories, caplog) -> None:
    images, targets = collate([as_sample(only(64, 96, [0]), k) for k in (3, 4)], 32)
    model = SMALL_MASKFORMER.build(small_categories).eval()
    with torch.no_grad():
        outputs = model.network(images)
        outputs["classes"][1, 2, 0] = torch.nan
        assert all(term.isnan() for term in model.loss(outputs, targets).values())
    assert "not finite for sample 4;" in caplog.text
