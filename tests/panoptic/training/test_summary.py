"""Figures of models: parameters, multiply-accumulates, memory."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from panoptic import models
from panoptic.models import DETRConfig, PanopticDeepLabConfig
from panoptic.training.freezing import freeze_parameters
from panoptic.training.summary import count_macs, summarise_model, summary_text
from tests.support.small import SMALL, VITS

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_parts_of_every_architecture_add_up(kind, small_categories) -> None:
    model = VITS.get(kind, next(iter(SMALL[kind].values()))).build(small_categories)
    summary = summarise_model(model, (60, 90), slots=2)
    assert summary.size == tuple(-(-side // model.divisor) * model.divisor for side in (60, 90))
    direct = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    assert sum(part.parameters for part in summary.parts) + direct == summary.whole.parameters
    assert summary.whole.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = next(part for part in summary.parts if part.name == "backbone")
    assert 0 < backbone.macs <= sum(part.macs for part in summary.parts) <= summary.whole.macs


def test_multiply_accumulates_are_those_of_the_convolutions(small_categories) -> None:
    """By hand, over the shapes that a real image has in the backbone."""
    model = SMALL[PanopticDeepLabConfig]["standalone"].build(small_categories).eval()
    counted = 0

    def count(layer: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output[0].numel() * layer.weight[0].numel()

    for layer in model.backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    size = (2 * model.divisor, 3 * model.divisor)
    with torch.no_grad():
        model.network(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert count_macs(model, size)["backbone"] == counted > 0


def test_what_is_frozen_is_said(small_categories) -> None:
    model = SMALL[DETRConfig]["panoptic"].build(small_categories)
    freeze_parameters(model, ["backbone.*"])
    summary = summarise_model(model, (64, 64), slots=2, averaged=True)
    text = summary_text(summary)
    (line,) = (line for line in text.splitlines() if line.startswith("backbone"))
    assert "frozen" in line and "whole model" in text and "one image of 64x64" in text
    assert summary.megabytes["optimiser"] == 2 * summary.megabytes["gradients"] < 2 * summary.megabytes["weights"]
    frozen = sum(p.nbytes for p in model.backbone.parameters()) / 1e6  # which the average does not hold once more
    assert summary.megabytes["average"] == pytest.approx(summary.megabytes["weights"] - frozen)
