"""Frozen parts need weights; schedules of freezing; training that another run takes over."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.config import override
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.preflight import STAND_IN, check_continuation, check_freezing, lacking, parse_schedule

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


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, ""),
        ({"model.backbone.freeze": 2}, "backbone"),
        ({"model.backbone.freeze": 2, "model.backbone.weights": "R-18.pkl"}, ""),
        ({"model.backbone.freeze": 2, "train.weights": "runs/a/step_000010"}, ""),
        ({"train.freeze": ("backbone.*",)}, "backbone"),
        ({"train.freeze": ("*conv1*",), "model.backbone.weights": "timm"}, ""),
        ({"train.freeze": ("semantic_*",), "model.backbone.weights": "timm"}, "model"),
        ({"train.freeze": ("*",)}, "model"),
    ],
)
def test_what_is_frozen_without_weights(changes: dict[str, Any], missing: str):
    experiment = override(demo(), {"model.backbone.name": "resnet18", **changes})
    assert lacking(experiment) == missing
    if not missing:
        check_freezing(experiment)
        return
    with pytest.raises(ValueError, match="frozen noise measures nothing") as refused:
        check_freezing(experiment)
    assert "--train.weights CHECKPOINT" in str(refused.value)
    assert ("--model.backbone.weights FILE" in str(refused.value)) == (missing == "backbone")


def test_a_run_with_a_frozen_fresh_backbone_is_refused_before_anything_starts(tmp_path):
    from pipelines.training.driver import train

    frozen = replace(override(demo(), {"model.backbone.freeze": 2}), storage=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.backbone\.freeze 2: no weights were loaded"):
        train(frozen, "demo")
    assert list(tmp_path.iterdir()) == []


def test_schedules_of_freezing():
    assert parse_schedule(4) == parse_schedule("4") == [(0, 4)]
    assert parse_schedule("5 2@500 0@800") == [(0, 5), (500, 2), (800, 0)]
    for bad in ("5 2", "2@500", "5 2@500 0@400", "5 2@0", "x 2@5", "5 2@-5", "5; 2@4"):
        with pytest.raises(ValueError, match=r"schedule|number of stages"):
            parse_schedule(bad)


def trained(changes: dict[str, Any], steps: int) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Model, optimiser and experiment after some updates with made-up gradients."""
    from panoptic.training.freezing import freeze_parameters
    from panoptic.training.optim import build_optimiser

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
    from panoptic.training import checkpoint
    from pipelines.config import flatten

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
    from panoptic.training.transfer import COUNTER, transfer_training

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
    from panoptic.training.transfer import transfer_training

    old, old_optimiser, old_experiment = trained({"optim.optimiser": before}, 2)
    new, optimiser, _ = trained({"optim.optimiser": after}, 0)
    carried = transfer_training(saved(old, old_optimiser, old_experiment), new, optimiser)
    assert (carried > 0) == bool(kept)
    for parameter in new.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()  # Adam would miss its own averages in a momentum


def test_a_checkpoint_without_an_optimiser_gives_its_weights():
    from panoptic.training.transfer import transfer_training

    old, _, experiment = trained({}, 0)
    record = {**saved(old, None, experiment)}
    new, optimiser, _ = trained({}, 0)
    assert transfer_training(record, new, optimiser) == 0
