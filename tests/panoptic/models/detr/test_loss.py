"""DETR's loss of broken outputs and in bounded memory; `test_model.py` has the published numbers."""

from __future__ import annotations

import pytest
import torch

from panoptic.models.detr import loss
from panoptic.segmentation import collate
from tests.panoptic.models.detr.test_edge_cases import grid, sample
from tests.support.small import SMALL_DETR


def test_outputs_that_are_not_finite_name_the_image(small_categories, caplog) -> None:
    model = SMALL_DETR.build(small_categories).eval()
    images, targets = collate([sample(grid(2, small_categories), k) for k in (1, 2)])
    outputs = dict(model.network(images, targets.frame))
    outputs["boxes"] = outputs["boxes"].detach().clone()
    outputs["boxes"][1, 3] = torch.nan
    assert all(term.isnan() for term in model.loss(outputs, targets).values())
    assert "not finite for photo 2.jpg;" in caplog.text


def test_mask_losses_in_parts_are_those_in_one(small_categories, monkeypatch) -> None:
    model = SMALL_DETR.build(small_categories).eval()
    images, targets = collate([sample(grid(9, small_categories))])

    def terms() -> tuple[list[float], list[torch.Tensor]]:
        model.zero_grad()
        losses, _ = model(images, targets)
        (losses["mask"] + losses["dice"]).backward()
        gradients = [p.grad for p in model.mask_head.parameters() if p.grad is not None]
        return [losses["mask"].item(), losses["dice"].item()], gradients

    whole, gradients = terms()
    monkeypatch.setattr(loss, "PIXELS", 3 * 64 * 64)
    parts, others = terms()
    assert parts == pytest.approx(whole, rel=1e-5)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
