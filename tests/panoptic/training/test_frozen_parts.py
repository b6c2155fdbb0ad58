"""A frozen backbone in training: out of gradients, their exchange, the optimiser and the average, and in none of their
checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories, Targets
from panoptic.training.checkpoint import Snapshot, load, make_record, restore
from panoptic.training.config import Engine, Optim
from panoptic.training.freezing import training_mode
from panoptic.training.optim import build_ema, build_optimiser, update_ema
from panoptic.training.step import SkipCounter, train_step
from tests.support.small import SMALL_DEEPLAB
from tests.support.tiny import tiny_batch

OPTIM = Optim(optimiser="adamw", lr=1e-3, schedule="constant", ema=0.9)

BATCH = tiny_batch(0, side=64)


def built(categories: Categories, freeze: int) -> PanopticModel:
    torch.manual_seed(0)
    model = replace(SMALL_DEEPLAB, backbone=replace(SMALL_DEEPLAB.backbone, freeze=freeze)).build(categories)
    training_mode(model)
    return model


def step(model: Any, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Targets], ema: Any = None) -> None:
    given: Any = {"optim": OPTIM, "engine": Engine(), "health": SkipCounter(), "ema": ema}
    train_step(model, optimiser, [batch], step=0, total=10, **given)


def frozen_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_an_average_holds_the_frozen_parameters_of_the_model(small_categories: Categories) -> None:
    """Once in memory and once in a checkpoint; what learns is averaged as ever."""
    model = built(small_categories, 4)
    optimiser, ema = build_optimiser(model, OPTIM), build_ema(model, OPTIM.ema)
    assert ema is not None and frozen_names(model)
    step(model, optimiser, BATCH, ema)
    step(model, optimiser, BATCH, ema)
    averaged = dict(ema.module.named_parameters())
    shared = {name for name, p in model.named_parameters() if averaged[name].data_ptr() == p.data_ptr()}
    assert shared == frozen_names(model)
    learning = "backbone.layer4.0.conv1.weight"
    assert not torch.equal(averaged[learning], model.get_parameter(learning))

    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in optimiser.state}
    record = make_record(config=model.config, model=model, ema=ema, optimiser=optimiser, step=2)
    assert len(record["optimiser"]["state"]) == len(held)
    file = io.BytesIO()
    torch.save(Snapshot().take(record), file)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    apart = io.BytesIO()
    torch.save({**record, "ema": {key: value.clone() for key, value in record["ema"].items()}}, apart)
    assert len(apart.getvalue()) - len(file.getvalue()) == pytest.approx(frozen, rel=0.05)

    again = built(small_categories, 4)
    other = build_optimiser(again, OPTIM), build_ema(again, OPTIM.ema)
    file.seek(0)
    restore(load(file), again, *other)
    for one, two in ((model, again), (ema, other[1])):
        assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())  # type: ignore[union-attr]


def test_an_average_of_what_was_frozen_later_is_its_own(small_categories: Categories) -> None:
    """A schedule may freeze what has learned: its average differs from the weights, and goes on moving to them."""
    former = built(small_categories, 0)
    average = build_ema(former, OPTIM.ema)
    assert average is not None
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.add_(1.0)
    record = make_record(config=former.config, model=former, ema=average)
    model = built(small_categories, 5)
    ema = build_ema(model, OPTIM.ema)
    assert ema is not None
    restore(record, model, None, ema)
    key = "backbone.layer1.0.conv1.weight"
    weight, averaged = model.get_parameter(key), ema.module.get_parameter(key)
    assert torch.equal(weight, former.get_parameter(key)) and torch.equal(averaged, weight + 1)
    for _ in range(200):
        update_ema(ema, model, OPTIM.ema)
    torch.testing.assert_close(averaged, weight)
    assert torch.equal(weight, former.get_parameter(key))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("freeze", [0, 3, 5])
def test_workers_exchange_gradients_of_what_learns(freeze: int, one_rank: None, small_categories: Categories) -> None:
    """The buckets of DDP hold the learning parameters, each once, and no others."""
    model = built(small_categories, freeze)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    sent: list[int] = []

    def hook(state, bucket):  # torch wants its own names of types, or none
        sent.extend(parameter.data_ptr() for parameter in bucket.parameters())
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, hook)
    step(wrapped, build_optimiser(model, OPTIM), BATCH)
    assert sorted(sent) == sorted(p.data_ptr() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert bool(frozen_names(model)) == (freeze > 0)
