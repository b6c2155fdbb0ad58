"""Training that another run continues under other options: weights whole, the optimiser's state by name."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from panoptic.training import checkpoint
from panoptic.training.freezing import freeze_parameters
from panoptic.training.optim import build_optimiser
from panoptic.training.transfer import COUNTER, transfer_training
from pipelines.config import flatten, override
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.preflight import STAND_IN

TINY = {
    "model.backbone.name": "resnet18",
    "model.rates": (2,),
    "model.aspp_channels": 8,
    "model.semantic_channels": 8,
    "model.instance_channels": 8,
    "model.semantic_head_channels": 8,
    "model.instance_head_channels": 8,
}

TIMM = {"model.backbone.name": "resnet10t"}
"""Whose frozen norms hold a tensor less."""


def trained(changes: dict[str, Any], steps: int) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Model, optimiser and experiment after some updates with made-up gradients."""
    experiment = override(demo(), {**TINY, **changes})
    torch.manual_seed(0)
    model = experiment.model.build(STAND_IN)
    freeze_parameters(model, experiment.train.freeze)
    optimiser = build_optimiser(model, experiment.optim)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
        optimiser.step()
    return model, optimiser, experiment


def saved(model: Any, optimiser: Any, experiment: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    checkpoint.save(
        buffer, config=experiment.model, model=model, optimiser=optimiser, step=7, experiment=flatten(experiment)
    )
    buffer.seek(0)
    return checkpoint.load(buffer)


def state_by_name(model: Any, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: optimiser.state[p]["exp_avg"] for name, p in model.named_parameters() if p in optimiser.state}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"model.backbone.freeze": 3}, {"model.backbone.freeze": 1}),
        ({"model.backbone.freeze": 0}, {"model.backbone.freeze": 4}),
        ({**TIMM, "model.backbone.freeze": 2}, {**TIMM, "model.backbone.freeze": 0}),
        ({**TIMM, "model.backbone.freeze": 0}, {**TIMM, "model.backbone.freeze": 2}),
        ({"train.freeze": ("semantic_*",)}, {"optim.lr": 1e-4, "optim.decay": "all", "optim.weight_decay": 0.3}),
    ],
)
def test_a_training_is_taken_over_with_the_optimiser_by_name(before: dict[str, Any], after: dict[str, Any]):
    old, old_optimiser, old_experiment = trained(before, 2)
    record = saved(old, old_optimiser, old_experiment)
    new, optimiser, experiment = trained(after, 0)
    carried = transfer_training(record, new, optimiser)
    tensors = new.state_dict()
    assert all(torch.equal(v, tensors[k]) for k, v in old.state_dict().items() if not k.endswith(COUNTER))
    theirs, ours = state_by_name(old, old_optimiser), state_by_name(new, optimiser)
    assert set(ours) == set(theirs) & {name for name, p in new.named_parameters() if p.requires_grad}
    assert carried == len(ours) > 10 and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {group["weight_decay"] for group in optimiser.param_groups} <= {0.0, experiment.optim.weight_decay}
    optimiser.zero_grad()
    for parameter in new.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimiser.step()  # parameters without a state begin theirs


@pytest.mark.parametrize(("before", "after", "kept"), [("sgd", "adamw", 0), ("adam", "sgd", 0), ("adam", "adamw", 1)])
def test_another_kind_of_optimiser_begins_afresh(before: str, after: str, kept: int):
    old, old_optimiser, old_experiment = trained({"optim.optimiser": before}, 2)
    new, optimiser, _ = trained({"optim.optimiser": after}, 0)
    carried = transfer_training(saved(old, old_optimiser, old_experiment), new, optimiser)
    assert (carried > 0) == bool(kept)
    for parameter in new.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()  # Adam would miss its own averages in a momentum


def test_a_checkpoint_without_an_optimiser_gives_its_weights():
    old, _, experiment = trained({}, 0)
    record = {**saved(old, None, experiment)}
    new, optimiser, _ = trained({}, 0)
    assert transfer_training(record, new, optimiser) == 0
