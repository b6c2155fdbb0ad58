"""Freezing by name: nothing frozen moves, norms included; dropout of frozen parts is off or on, as said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from panoptic.layers.norm import FrozenBatchNorm
from panoptic.training.freezing import freeze_parameters, training_mode
from panoptic.training.optim import Optim, build_optimiser


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
            "head": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
        }
    )


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["head"](model["encoder"](model["backbone"](x).flatten(2).transpose(1, 2)))


def test_what_is_frozen_does_not_move_and_the_rest_does() -> None:
    model, x = network(), torch.rand(2, 3, 4, 4)
    frozen = freeze_parameters(model, ("backbone.*", "encoder.self_attn.*", "head.2.bias"))
    assert frozen[0] == "backbone.0.weight" and frozen[-1] == "head.2.bias" and len(frozen) == 4 + 4 + 1
    assert isinstance(model["backbone"][1], FrozenBatchNorm)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = build_optimiser(model, Optim(optimiser="sgd", lr=0.5))
    training_mode(model)
    run(model, x).square().mean().backward()
    optimiser.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    learning = {k for k, p in model.named_parameters() if p.requires_grad}
    assert moved == learning and not any(k.startswith("backbone.") for k in moved) and "head.2.weight" in moved
    assert set(before) == set(network().state_dict())


def test_a_norm_with_a_frozen_weight_only_still_counts() -> None:
    model = network()
    freeze_parameters(model, ("backbone.1.weight",))
    training_mode(model)
    assert type(model["backbone"][1]) is nn.BatchNorm2d
    run(model, torch.rand(2, 3, 4, 4))
    assert model["backbone"][1].num_batches_tracked == 1


@pytest.mark.parametrize("frozen_dropout", [False, True])
def test_dropout_of_frozen_parts(frozen_dropout: bool) -> None:
    model, x = network(), torch.rand(1, 16, 8)
    freeze_parameters(model, ("encoder.*", "head.0.*"))
    training_mode(model, frozen_dropout)
    first, second = model["encoder"](x), model["encoder"](x)
    assert torch.equal(first, second) != frozen_dropout
    assert model["encoder"].self_attn.training == model["encoder"].dropout1.training == frozen_dropout
    # the head learns in part, so its dropout, which no parameter is inside of, stays on
    assert model["head"][1].training and model["head"].training and model["backbone"].training


def test_everything_may_be_asked_for_and_nothing_is() -> None:
    assert freeze_parameters(network(), ()) == []
    model = network()
    assert len(freeze_parameters(model, ("*",))) == len(list(network().parameters()))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimiser(model, Optim())


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encoder", r"near: encoder\.\*"),
        ("backbon.*", r"near: backbone\.\*"),
        ("encoder.self_atn.*", r"encoder\.self_attn\.\*"),
        ("head.3.*", r"head\.[02]"),
        ("zzz", r"backbone\.\*, encoder\.\*, head\.\*"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_names(pattern: str, near: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"train.freeze: .*{near}"):
        freeze_parameters(model, ("head.*", pattern))
    assert all(p.requires_grad for p in model.parameters())
