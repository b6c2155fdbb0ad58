"""Fine-tuning: what depends on the classes begins afresh, everything else is loaded."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from panoptic import models
from panoptic.training import checkpoint
from panoptic.training.transfer import Loaded, class_keys, counted, load_for_finetune
from tests.support.tiny import TinyBackbone, TinyConfig, tiny_categories

CONFIG = TinyConfig(TinyBackbone(width=6, norm="group"))


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    monkeypatch.setattr(models, "Architecture", TinyConfig, raising=False)


def saved(classes: int = 3, **values) -> dict:
    model = CONFIG.build(tiny_categories(classes))
    file = io.BytesIO()
    checkpoint.save(file, config=CONFIG, model=model, **values)
    file.seek(0)
    return checkpoint.load(file)


@pytest.mark.parametrize("count", [3, 5])
def test_finetuning_leaves_the_class_layer_fresh(count):
    """Also when other classes happen to be as many, which shapes would not show."""
    record = saved(3)
    names = replace(tiny_categories(count), names=tuple(f"other {i}" for i in range(count)))
    model = CONFIG.build(names)
    head = model.head.weight.detach().clone()
    assert load_for_finetune(model, record) == Loaded(("head.bias", "head.weight"))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.backbone[0].weight, record["weights"]["backbone.0.weight"])


def test_finetuning_on_the_same_classes_loads_everything():
    record = saved(3)
    model = CONFIG.build(tiny_categories(3))
    assert load_for_finetune(model, record) == Loaded()
    assert torch.equal(model.head.weight, record["weights"]["head.weight"])
    del record["weights"]["backbone.0.bias"]
    with pytest.raises(ValueError, match=r"missing: backbone\.0\.bias"):
        load_for_finetune(CONFIG.build(tiny_categories(5)), record)


def test_class_keys_are_those_of_the_class_layer():
    assert class_keys(CONFIG, tiny_categories()) == {"head.weight", "head.bias"}


def test_counters_of_norms_are_those_of_the_model():
    """A frozen norm of timm has no counter; one that learns needs its own where the checkpoint has none."""
    own = {"a.weight": 1, "a.num_batches_tracked": 2}
    assert counted({"a.weight": 5}, own) == {"a.weight": 5, "a.num_batches_tracked": 2}
    assert counted({"a.weight": 5, "a.num_batches_tracked": 7}, own) == {"a.weight": 5, "a.num_batches_tracked": 7}
    assert counted({"b.weight": 5, "b.num_batches_tracked": 7}, {"b.weight": 1}) == {"b.weight": 5}
