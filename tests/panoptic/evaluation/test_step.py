"""One evaluation step: losses and predictions of a batch from one pass, and a model left as it was."""

from __future__ import annotations

import pytest
import torch

from panoptic.evaluation.step import evaluation_step
from panoptic.training.device import Engine
from tests.support.tiny import TinyConfig, tiny_batch, tiny_categories


def test_evaluation_gives_losses_and_maps_and_touches_nothing():
    model, engine = TinyConfig().build(tiny_categories()).train(), Engine()
    images, targets = tiny_batch(0)
    with pytest.raises(ValueError, match="training mode"):
        evaluation_step(model, images, targets, engine)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses, prediction, _ = evaluation_step(model.eval(), images, targets, engine)
    maps, semantics = prediction.maps, prediction.semantics
    assert set(losses) == {"semantic", "size", "total"}
    assert float(losses["total"]) == pytest.approx(float(losses["semantic"] + losses["size"]))
    assert [m.size for m in maps] == [(8, 8), (8, 8)]
    assert all((m.semantic() == s).all() for m, s in zip(maps, semantics, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_losses_may_be_left_out_and_times_are_taken():
    model = TinyConfig().build(tiny_categories()).eval()
    losses, prediction, seconds = evaluation_step(model, *tiny_batch(0), Engine(), ("instances",), losses=False)
    assert losses == {} and prediction.maps is None and len(prediction.instances) == 2
    assert seconds.keys() == {"network", "loss", "postprocess"} and all(value >= 0 for value in seconds.values())
