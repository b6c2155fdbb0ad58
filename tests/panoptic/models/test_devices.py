"""Every architecture computes on a CUDA device as on the CPU.

Nothing here runs without such a device. Float32 throughout, with TF32 off; losses draw the same numbers on both.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic import models
from panoptic.evaluation.step import evaluation_step
from panoptic.metrics.panoptic_quality import count, quality
from panoptic.models.base import Outputs, PanopticModel
from panoptic.segmentation import Categories, Sample, Segmentation, Targets, collate
from panoptic.training.device import Engine, prepare
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from tests.panoptic.models.test_contract import EVERYTHING
from tests.support.small import SMALL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]

Batch = tuple[Tensor, Targets]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float32 as it is, and random numbers that do not depend on the device."""
    rand, randperm = torch.rand, torch.randperm
    monkeypatch.setattr(torch, "rand", lambda *size, device=None, **o: rand(*size, **o).to(device or "cpu"))
    monkeypatch.setattr(torch, "randperm", lambda n, device=None, **o: randperm(n, **o).to(device or "cpu"))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # matrix products are exact unless somebody asks
    yield
    torch.backends.cudnn.allow_tf32 = before


def built(config, categories: Categories) -> PanopticModel:
    torch.manual_seed(0)
    return config.build(categories)


def batch(model: PanopticModel, categories: Categories, draw) -> Batch:
    rng = np.random.default_rng(5)
    truths = [draw(rng, 90, 97, categories, crowd=True), draw(rng, 70, 61, categories)]
    images = [rng.integers(0, 256, (*truth.size, 3), np.uint8) for truth in truths]
    return collate([Sample(i, t, f"{k}") for k, (i, t) in enumerate(zip(images, truths, strict=True))], model.divisor)


def distance(here: Tensor, there: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((there.cpu().double() - here.double()).abs().max() / here.double().abs().max().clamp(min=1e-6))


def moved(outputs: Outputs) -> Outputs:
    return {name: value.cuda() for name, value in outputs.items()}


def agreement(here: list[Segmentation], there: list[Segmentation], categories: Categories) -> float:
    """PQ of the maps of one device with those of the other as truth; NaN where both are empty."""
    counts = [count(a, b, categories) for a, b in zip(here, there, strict=True)]
    return quality(sum(counts[1:], counts[0]), categories).all.pq


@pytest.mark.parametrize("config", CASES)
def test_outputs_and_losses_agree(config, small_categories, random_segmentation) -> None:
    model = built(config, small_categories).eval()
    images, targets = batch(model, small_categories, random_segmentation)
    other, there = copy.deepcopy(model).cuda(), targets.to("cuda")
    with torch.no_grad():
        outputs, outputs_there = model.network(images, targets.frame), other.network(images.cuda(), there.frame)
        apart = {name: distance(value, outputs_there[name]) for name, value in outputs.items()}
        losses = []
        for m, o, t in ((model, outputs, targets), (other, moved(outputs), there)):
            torch.manual_seed(1)
            losses.append(m.loss(o, t))
    assert max(apart.values()) < 1e-3, apart
    assert all(value.is_cuda for value in losses[1].values())
    here, there = ({name: float(value) for name, value in terms.items()} for terms in losses)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("config", CASES)
def test_the_same_outputs_give_the_same_maps(config, small_categories, random_segmentation) -> None:
    model = built(config, small_categories).eval()
    images, targets = batch(model, small_categories, random_segmentation)
    frame = targets.frame
    with torch.no_grad():
        outputs = model.network(images, frame)
    other, outputs_there = copy.deepcopy(model).cuda(), moved(outputs)
    here, there = model.postprocess(outputs, frame, EVERYTHING), other.postprocess(outputs_there, frame, EVERYTHING)
    same = np.mean([(a.segments == b.segments).mean() for a, b in zip(here.maps, there.maps, strict=True)])
    pq = agreement(here.maps, there.maps, small_categories)
    print(f"{type(config).__name__}: PQ {pq:.2f}, {100 * same:.2f} % of the pixels")
    assert same > 0.99 or pq > 99, (same, pq)
    assert np.mean([(a == b).mean() for a, b in zip(here.semantics, there.semantics, strict=True)]) > 0.99
    for a, b in zip(here.instances, there.instances, strict=True):
        # an untrained model's scores nearly tie: their order, and which peak is the highest, is left to rounding
        alike = min(len(a.scores), len(b.scores))
        assert alike > 0.9 * max(len(a.scores), len(b.scores)) or max(len(a.scores), len(b.scores)) < 3
        best = [np.sort(instances.scores)[::-1][:alike] for instances in (a, b)]
        np.testing.assert_allclose(*best, atol=1e-3)
    assert (here.proposals is None) == (there.proposals is None)
    for a, b in zip(here.proposals or [], there.proposals or [], strict=True):
        assert a.shape == b.shape
    truth, truth_there = model.truth(targets, outputs), other.truth(targets.to("cuda"), outputs_there)
    for name, value in truth.items():
        assert distance(value, truth_there[name]) < 1e-3, name
    maps = model.postprocess(outputs | truth, frame).maps, other.postprocess(outputs_there | truth_there, frame).maps
    assert not agreement(*maps, small_categories) < 99


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CASES)
def test_a_step_and_an_evaluation(config, precision, channels_last, small_categories, random_segmentation) -> None:
    """The batch comes from the CPU; every parameter gets a gradient that is finite."""
    engine = Engine(precision=precision, channels_last=channels_last)
    model = prepare(built(config, small_categories), "cuda", engine).train()
    optim = Optim(optimiser="adamw", lr=1e-4, clip_norm=1.0)
    images, targets = batch(model, small_categories, random_segmentation)
    optimiser, health = build_optimiser(model, optim), SkipCounter()
    result = train_step(
        model, optimiser, [(images, targets)], step=0, total=9, optim=optim, engine=engine, health=health
    )
    assert not result.skipped, result
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    result = evaluation_step(model.eval(), images, targets, engine, EVERYTHING)
    assert [m.size for m in result.prediction.maps] == [(90, 97), (70, 61)]
    assert torch.isfinite(result.losses["total"])


@pytest.mark.parametrize("config", CASES)
def test_the_network_waits_for_nothing(config, small_categories, random_segmentation) -> None:
    model = built(config, small_categories).cuda().train()
    images, targets = batch(model, small_categories, random_segmentation)
    images = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = model.network(images, targets.frame)
        torch.stack([value.float().mean() for value in outputs.values()]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", CASES)
def test_float16(config, small_categories, random_segmentation) -> None:
    model = built(config, small_categories).cuda().train()
    images, targets = batch(model, small_categories, random_segmentation)
    with torch.autocast("cuda", torch.float16):
        losses, _ = model(images.cuda(), targets.to("cuda"))
    assert losses and all(torch.isfinite(value) for value in losses.values()), losses
    sum(losses.values()).backward()
