"""Files round trip; whatever does not fit is refused by name."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import pytest
import torch

from panoptic import models
from panoptic.segmentation import Categories
from panoptic.training import checkpoint
from panoptic.training.optim import Optim, build_ema, build_optimiser
from panoptic.training.plain import read_config
from tests.support.tiny import TinyBackbone, TinyConfig, tiny_batch, tiny_categories

CONFIG = TinyConfig(TinyBackbone(width=6, norm="group"), rates=(3, 6, 9), factor=0.5)


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    monkeypatch.setattr(models, "Architecture", TinyConfig, raising=False)


def saved(classes: int = 3, **values) -> dict:
    model = CONFIG.build(tiny_categories(classes))
    file = io.BytesIO()
    checkpoint.save(file, config=CONFIG, model=model, **values)
    file.seek(0)
    return checkpoint.load(file)


def test_round_trip_builds_the_same_model():
    model = CONFIG.build(tiny_categories())
    optimiser = build_optimiser(model, Optim())
    ema = build_ema(model, 0.9)
    file = io.BytesIO()
    experiment = {"optim.lr": 0.1, "optim.betas": (0.9, 0.99), "data.root": "x"}
    checkpoint.save(
        file,
        config=CONFIG,
        model=model,
        ema=ema,
        optimiser=optimiser,
        step=7,
        position=56,
        run_id="abc",
        experiment=experiment,
    )
    file.seek(0)
    record = checkpoint.load(file)
    assert (record["step"], record["position"], record["run_id"]) == (7, 56, "abc")
    assert record["experiment"] == {"optim.lr": 0.1, "optim.betas": [0.9, 0.99], "data.root": "x"}
    assert read_config(record["config"]) == CONFIG
    built = checkpoint.build_model(record)
    assert built.categories == model.categories and not built.training
    images, _ = tiny_batch(0)
    torch.testing.assert_close(built.network(images), model.network(images))


def test_build_prefers_the_averaged_weights():
    model = CONFIG.build(tiny_categories())
    ema = build_ema(model, 0.5)
    ema.update_parameters(model)
    torch.nn.init.zeros_(model.head.weight)
    file = io.BytesIO()
    checkpoint.save(file, config=CONFIG, model=model, ema=ema)
    file.seek(0)
    record = checkpoint.load(file)
    assert checkpoint.build_model(record).head.weight.abs().sum() > 0
    assert checkpoint.build_model(record, ema=False).head.weight.abs().sum() == 0
    other = CONFIG.build(tiny_categories())
    average = build_ema(other, 0.5)
    checkpoint.restore(record, other, ema=average)
    assert other.head.weight.abs().sum() == 0
    torch.testing.assert_close(average.module.head.weight, ema.module.head.weight)


def test_files_that_are_no_checkpoint_are_refused():
    def load(record: object) -> None:
        file = io.BytesIO()
        torch.save(record, file)
        file.seek(0)
        checkpoint.load(file, "some.pt")

    with pytest.raises(ValueError, match=r"some\.pt: not a checkpoint"):
        checkpoint.load(io.BytesIO(b"no zip"), "some.pt")
    with pytest.raises(ValueError, match=r"jobs/convert\.py"):
        load({"model": torch.ones(2)})
    with pytest.raises(ValueError, match="format 99"):
        load({"format": 99})
    with pytest.raises(ValueError, match="lacks config"):
        load({"format": checkpoint.FORMAT})


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(legacy):
    file = io.BytesIO()
    if legacy:
        pickle.dump({"format": Trap()}, file, protocol=2)
    else:
        torch.save({"format": Trap()}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(file)


def test_keys_that_do_not_fit_are_named():
    record = saved()
    weights = record["weights"]
    weights["stray"] = torch.ones(1)
    weights["head.weight"] = torch.ones(2, 6, 1, 1)
    del weights["head.bias"]
    with pytest.raises(ValueError) as error:
        checkpoint.build_model(record)
    text = str(error.value)
    assert "missing: head.bias" in text
    assert "unexpected: stray" in text
    assert "another shape: head.weight (file [2, 6, 1, 1], model [3, 6, 1, 1])" in text


def test_other_categories_are_named():
    model = CONFIG.build(tiny_categories(4))
    with pytest.raises(ValueError, match=r"3 classes are not the 4.*only in the data: class 3 \(thing\)"):
        checkpoint.restore(saved(), model)
    swapped = Categories.from_coco([tiny_categories().to_coco()[i] for i in (0, 2, 1)])
    with pytest.raises(ValueError, match=r"the order differs: class 2 \(stuff\) / class 1 \(thing\)"):
        checkpoint.check_categories(swapped, tiny_categories())
    renumbered = replace(tiny_categories(), ids=(5, 6, 7))
    checkpoint.check_categories(renumbered, tiny_categories())


def test_continuing_needs_an_optimiser_state():
    model = CONFIG.build(tiny_categories())
    with pytest.raises(ValueError, match="no optimiser state"):
        checkpoint.restore(saved(), model, build_optimiser(model, Optim()))
