"""Losses, maps and true outputs of every architecture on tensors that say they lie on a GPU.

No operation may meet two devices, also where values decide about shapes, and the figures are those of the CPU. Networks
are those of `test_fake_cuda`. Nothing is differentiated: PyTorch's engine wants a real GPU for that.
"""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from panoptic import models
from panoptic.models import PanopticDeepLabConfig
from panoptic.segmentation import Sample, collate
from tests.panoptic.models.test_contract import EVERYTHING
from tests.support.claimed_cuda import CUDA, ClaimedCuda, claimed_cuda
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]


def batch(model, categories, draw):
    rng = np.random.default_rng(5)
    truths = [draw(rng, 60, 65, categories, crowd=True), draw(rng, 50, 41, categories)]
    images = [rng.integers(0, 256, (*truth.size, 3), np.uint8) for truth in truths]
    return collate([Sample(i, t, f"{k}") for k, (i, t) in enumerate(zip(images, truths, strict=True))], model.divisor)


@pytest.mark.parametrize("config", CASES)
def test_losses_and_maps_stay_on_the_device(config, small_categories, random_segmentation) -> None:
    torch.manual_seed(0)
    model = config.build(small_categories).eval()
    images, targets = batch(model, small_categories, random_segmentation)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
        torch.manual_seed(1)
        losses = model.loss(outputs, targets)
        prediction = model.postprocess(outputs, targets.frame, EVERYTHING)
        with claimed_cuda():
            there, moved = model.to(CUDA), targets.to(CUDA)
            outputs = {name: value.to(CUDA) for name, value in outputs.items()}
            torch.manual_seed(1)
            losses_there = there.loss(outputs, moved)
            prediction_there = there.postprocess(outputs, moved.frame, EVERYTHING)
            truth = there.truth(moved, outputs)
            with_truth = there.postprocess(outputs | truth, moved.frame).maps
            assert {value.device for value in [*losses_there.values(), *truth.values()]} == {CUDA}
            figures = {name: float(value) for name, value in losses_there.items()}
    assert figures == pytest.approx({name: float(value) for name, value in losses.items()}, rel=1e-5)
    for a, b in zip(prediction.maps, prediction_there.maps, strict=True):
        assert np.array_equal(a.segments, b.segments) and np.array_equal(a.labels, b.labels)
    assert [m.size for m in with_truth] == [m.size for m in prediction.maps]


def test_a_tensor_of_another_device_is_refused(small_categories) -> None:
    """The check sees what it is made for."""
    with claimed_cuda():
        a = torch.ones(3, device=CUDA)
        assert isinstance(a, ClaimedCuda) and a.device == CUDA and (a + 1).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="more than one device"):
            torch.add(a, torch.ones(3))
        with pytest.raises(RuntimeError, match="more than one device"):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=CUDA)]
        model = SMALL[PanopticDeepLabConfig]["standalone"].build(small_categories).to(CUDA)
        with pytest.raises(RuntimeError, match="device"):
            model.network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
