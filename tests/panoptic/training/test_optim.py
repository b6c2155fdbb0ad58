"""Schedules against the references, parameter groups, weight averaging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from panoptic.training.optim import (
    Optim,
    build_ema,
    build_optimiser,
    learning_rate_factor,
    parameter_groups,
    scaled_learning_rate,
    set_learning_rate,
    update_ema,
)


def factors(total: int, optim: Optim, count: int = 100) -> np.ndarray:
    return np.array([learning_rate_factor(step, total, optim) for step in range(count)])


@pytest.mark.parametrize(
    ("name", "total", "optim"),
    [
        ("poly_nowarm_90k", 90_000, Optim()),
        ("poly_warm_100", 100, Optim(warmup_steps=10)),
        ("poly_constend", 100, Optim(final=0.1)),
        ("multistep", 100, Optim(schedule="multistep", milestones=(60, 80), warmup_steps=10)),
    ],
)
def test_schedules_equal_the_references(shared, name, total, optim):
    with np.load(shared("fixtures/pixels") / "lr_schedules.npz") as arrays:
        np.testing.assert_allclose(0.01 * factors(total, optim), arrays[name], rtol=0, atol=1e-9)


def test_schedules_without_fixtures():
    warm = Optim(warmup_steps=10, warmup_factor=0.001)
    assert learning_rate_factor(0, 100, warm) == pytest.approx(0.001)
    assert learning_rate_factor(1, 100, warm) == pytest.approx((0.001 * 0.9 + 0.1) * 0.99**0.9)
    assert learning_rate_factor(50, 100, warm) == pytest.approx(0.5**0.9)
    cosine = Optim(schedule="cosine", final=0.1)
    assert [learning_rate_factor(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
    steps = Optim(schedule="multistep", milestones=(3, 5))
    assert [round(f, 6) for f in factors(9, steps, 7)] == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert set(factors(9, Optim(schedule="constant"), 7)) == {1.0}


def test_a_step_beyond_the_end_is_no_error():
    for schedule in ("poly", "cosine", "multistep", "constant"):
        optim = Optim(schedule=schedule, milestones=(5,))
        assert learning_rate_factor(150, 100, optim) == pytest.approx(learning_rate_factor(100, 100, optim))


def test_learning_rate_follows_the_batch_only_when_asked():
    assert scaled_learning_rate(Optim(lr=1.0), 64) == 1.0
    assert scaled_learning_rate(Optim(lr=1.0, lr_batch=16, scale_lr="linear"), 64) == 4.0
    assert scaled_learning_rate(Optim(lr=1.0, lr_batch=16, scale_lr="sqrt"), 64) == 2.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
        self.queries = nn.Embedding(5, 4)
        self.register_buffer("index", torch.tensor([7, 3, 250]))


def group_of(model: nn.Module, optim: Optim) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (g["lr_factor"], g["weight_decay"]) for g in parameter_groups(model, optim) for p in g["params"]
    }


def test_parameter_groups():
    model = Net()
    groups = group_of(model, Optim(weight_decay=0.05, backbone_lr=0.1))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups["backbone.0.weight"] == (0.1, 0.05)
    assert groups["backbone.0.bias"] == (0.1, 0.0)
    assert groups["backbone.1.weight"] == (0.1, 0.0)
    assert groups["head.0.weight"] == (1.0, 0.05)
    assert groups["head.1.bias"] == (1.0, 0.0)
    assert groups["queries.weight"] == (1.0, 0.0)
    groups = group_of(model, Optim(weight_decay=0.05, decay="weights_and_biases"))
    assert groups["head.0.bias"] == (1.0, 0.05)
    assert groups["head.1.bias"] == (1.0, 0.0)
    assert all(decay == 0.05 for _, decay in group_of(model, Optim(weight_decay=0.05, decay="all")).values())


def test_frozen_parameters_are_left_out():
    model = Net()
    model.backbone.requires_grad_(False)
    assert not any(name.startswith("backbone.") for name in group_of(model, Optim()))
    with pytest.raises(ValueError, match="frozen"):
        parameter_groups(model.requires_grad_(False), Optim())


@pytest.mark.parametrize("rule", ["adam", "adamw", "sgd"])
def test_each_group_gets_its_rate_and_moves(rule):
    model = Net()
    optimiser = build_optimiser(model, Optim(optimiser=rule, backbone_lr=0.1))
    set_learning_rate(optimiser, 0.5)
    assert {group["lr"] for group in optimiser.param_groups} == {0.5 * 0.1, 0.5}
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert all((old != new).all() for old, new in zip(before, model.parameters(), strict=True))


def test_ema_follows_weights_and_statistics_and_keeps_integers():
    model = Net()
    ema = build_ema(model, 0.9)
    assert ema is not None and build_ema(model, 0.0) is None
    update_ema(ema, model, 0.9)
    assert int(ema.n_averaged) == 1
    start = model.head[0].weight.detach().clone()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(1.0)
    for _ in range(100):
        update_ema(ema, model, 0.9)
    moved = 1 - math.prod(min(0.9, (1 + done) / (10 + done)) for done in range(1, 101))
    torch.testing.assert_close(ema.module.head[0].weight, start + moved)
    assert ema.module.backbone[1].running_mean[0].item() == pytest.approx(moved, rel=1e-5)
    assert ema.module.index.tolist() == [7, 3, 250]
    assert math.isfinite(float(ema.module.backbone[1].running_var.sum()))


def test_averages_are_those_of_torch_to_the_last_bit_and_rest_where_told():
    model, moved = Net(), Net()
    ema = build_ema(model, 0.9)
    assert ema is not None
    update_ema(ema, model, 0.9)
    assert all(torch.equal(value, ema.module.state_dict()[key]) for key, value in model.state_dict().items())
    update_ema(ema, moved, 0.9, torch.tensor(False))
    assert all(torch.equal(value, ema.module.state_dict()[key]) for key, value in model.state_dict().items())
    assert int(ema.n_averaged) == 1
    update_ema(ema, moved, 0.9, torch.tensor(True))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    get_ema_multi_avg_fn(2 / 11)(expected, list(moved.parameters()), 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, ema.module.parameters(), strict=True))


def test_adam_penalises_weights_and_adamw_shrinks_them():
    """Without a gradient, Adam's decay becomes a step of the whole rate, AdamW's a factor of 1 - rate * decay."""
    ends = {}
    for rule in ("adam", "adamw"):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, 2.0)
        optimiser = build_optimiser(layer, Optim(optimiser=rule, lr=0.1, weight_decay=0.5))
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimiser.step()
        ends[rule] = layer.weight.item()
    assert ends["adam"] == pytest.approx(2.0 - 0.1) and ends["adamw"] == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_tables_of_positions_are_not_decayed():
    from panoptic.backbones.swin import WindowAttention

    attention = WindowAttention(8, 2, 3)
    for decay, undecayed in (("weights_and_biases", 1), ("weights", 3), ("all", 0)):
        groups = parameter_groups(attention, Optim(decay=decay, weight_decay=0.1))
        free = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
        assert len(free) == undecayed and (not free or any(p is attention.relative_position_bias_table for p in free))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny", "vgg16_bn", "efficientps_b0", "tf_efficientnet_lite0"])
def test_rates_fall_from_stage_to_stage_towards_the_stem(name: str) -> None:
    from panoptic.backbones import Backbone

    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": Backbone(name).build(), "head": nn.Linear(2, 2)})
    groups = parameter_groups(model, Optim(backbone_lr=0.5, stage_decay=0.1))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    factors = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    assert set(factors) == {key for key, _ in model.named_parameters()}
    assert factors["head.weight"] == 1
    ordered = [factors[key] for key, _ in model.named_parameters() if key.startswith("backbone.") and "norm" not in key]
    assert ordered == sorted(ordered)
    assert sorted(set(factors.values())) == pytest.approx([0.5 * 0.1**k for k in (4, 3, 2, 1, 0)] + [1])
    for stage in range(1, 6):  # what is frozen first has the smallest rates
        with torch.device("meta"):
            frozen = Backbone(name, freeze=stage).build()
        learns = {f"backbone.{key}" for key, p in frozen.named_parameters() if p.requires_grad}
        assert {key for key, factor in factors.items() if factor > 0.5 * 0.1 ** (5 - stage) * 1.5} >= learns


def test_equal_rates_make_the_groups_of_old() -> None:
    from panoptic.backbones import Backbone

    model = nn.ModuleDict({"backbone": Backbone("resnet18").build(), "head": nn.Linear(2, 2)})
    groups = parameter_groups(model, Optim(backbone_lr=0.1, weight_decay=1e-2))
    assert [(group["lr_factor"], group["weight_decay"]) for group in groups] == [
        (1, 0),
        (1, 1e-2),
        (0.1, 0),
        (0.1, 1e-2),
    ]
