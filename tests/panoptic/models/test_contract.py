"""The contract of every architecture, run over `panoptic.models.Architecture`."""

from __future__ import annotations

import copy
import io
import typing
from typing import Any

import numpy as np
import pytest
import torch

from panoptic import models
from panoptic.evaluation.step import evaluation_step
from panoptic.models.base import PanopticModel, Wanted
from panoptic.segmentation import Categories, Frame, Sample, Segmentation, collate
from panoptic.training.checkpoint import build_model, load, save
from panoptic.training.device import Engine
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from tests.support.small import NOT_YET, ORACLE, SMALL, VITS

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

EVERYTHING: tuple[Wanted, ...] = ("maps", "instances", "semantics", "proposals")

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]


def build(config: Any, categories: Categories) -> PanopticModel:
    torch.manual_seed(0)
    return config.build(categories)


@pytest.fixture(scope="module", params=CASES)
def config(request: pytest.FixtureRequest) -> Any:
    """The options of a small model. All tests of one model follow each other, so that it is built once."""
    return request.param


@pytest.fixture(scope="module")
def built(config: Any, small_categories: Categories) -> tuple[PanopticModel, torch.Tensor]:
    """The model, and where torch's random numbers stand after its weights were drawn, which takes half of a test."""
    return build(config, small_categories), torch.get_rng_state()


@pytest.fixture
def model(built: tuple[PanopticModel, torch.Tensor]) -> PanopticModel:
    """A copy of it, as if it were just built."""
    fresh, state = built
    torch.set_rng_state(state)
    return copy.deepcopy(fresh)


def as_sample(truth: Segmentation, seed: int = 0) -> Sample:
    image = np.random.default_rng(seed).integers(0, 256, (*truth.size, 3), np.uint8)
    return Sample(image, truth, f"sample {seed}")


def only(height: int, width: int, labels: list[int], crowd: list[bool] | None = None) -> Segmentation:
    """Vertical bands, one of each label; void where there is none."""
    segments = np.zeros((height, width), np.int32)
    for k in range(len(labels)):
        segments[:, k * width // len(labels) : (k + 1) * width // len(labels)] = k + 1
    return Segmentation(segments, np.array(labels, np.int64), None if crowd is None else np.array(crowd))


def one_pixel(height: int, width: int, categories: Categories) -> Segmentation:
    truth = only(height, width, [categories.stuff[0]])
    segments = truth.segments.copy()
    segments[height // 2, width // 3] = 2
    return Segmentation(segments, np.array([categories.stuff[0], categories.things[0]]))


def check_partition(segmentation: Segmentation, size: tuple[int, int], categories: Categories) -> None:
    """Segments are 0..N without a gap, labels are classes, and a stuff class has at most one segment."""
    assert segmentation.size == size
    assert segmentation.segments.dtype == np.int32
    assert segmentation.labels.dtype == np.int64
    assert set(np.unique(segmentation.segments)) - {0} == set(range(1, len(segmentation.labels) + 1))
    assert all(0 <= label < len(categories) for label in segmentation.labels)
    stuff = [label for label in segmentation.labels.tolist() if label in categories.stuff]
    assert len(stuff) == len(set(stuff))


@pytest.mark.parametrize("case", ["empty", "one_pixel", "stuff_only", "crowd_only", "odd", "padded"])
def test_losses_gradients_and_maps(model, case, small_categories, random_segmentation) -> None:
    c = small_categories
    rng = np.random.default_rng(5)
    truths = {
        "empty": [only(64, 96, [])],
        "one_pixel": [one_pixel(64, 96, c)],
        "stuff_only": [only(64, 96, list(c.stuff))],
        "crowd_only": [only(64, 96, [c.things[0], c.stuff[0]], [True, False])],
        "odd": [random_segmentation(rng, 65, 97, c, crowd=True)],
        "padded": [random_segmentation(rng, 50, 97, c), random_segmentation(rng, 70, 61, c)],
    }[case]
    # batch norm over one image of a few pixels is no statistic: two images, as in training
    truths = truths * (2 if len(truths) == 1 else 1)
    model.train()
    images, targets = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    losses, maps = model(images, targets, segment=True)
    assert losses and maps and len(maps) == len(truths)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for truth, merged in zip(truths, maps, strict=True):
        check_partition(merged, truth.size, c)


def test_a_loss_that_learns_reaches_every_parameter(config, model, small_categories, random_segmentation) -> None:
    model.train()
    truths = [random_segmentation(np.random.default_rng(k), 64, 96, small_categories) for k in (1, 2)]
    losses, _ = model(*collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor))
    sum(losses.values()).backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert set(still) <= set(NOT_YET.get(type(config), ()))


@pytest.mark.parametrize("kind", VITS, ids=lambda kind: kind.__name__)
def test_a_plain_vit_under_every_architecture(kind, small_categories, random_segmentation) -> None:
    """Losses reach every parameter that is not frozen, the pyramid's among them, at sizes that fit no patch."""
    model = build(VITS[kind], small_categories).train()
    truths = [random_segmentation(np.random.default_rng(k), 65, 97, small_categories) for k in (1, 2)]
    images, targets = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    losses, maps = model(images, targets, segment=True)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert maps is not None
    for merged in maps:
        check_partition(merged, (65, 97), small_categories)
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    still = {name for name, grad in learning.items() if grad is None or not grad.abs().sum() > 0}
    assert still <= set(NOT_YET.get(kind, ()))
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    file = io.BytesIO()
    save(file, config=VITS[kind], model=model.eval())
    file.seek(0)
    again = build_model(load(file))
    with torch.no_grad():
        first, second = model.network(images), again.network(images)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_losses_do_not_depend_on_the_mode(model, small_categories, random_segmentation) -> None:
    truth = random_segmentation(np.random.default_rng(3), 64, 64, small_categories)
    images, targets = collate([as_sample(truth)], model.divisor)
    outputs = model.eval().network(images, targets.frame)
    torch.manual_seed(1)  # some losses sample
    evaluated = model.loss(outputs, targets)
    model.train()
    for module in model.modules():  # all that may depend on it, where a head runs within the loss
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout):
            module.eval()
    torch.manual_seed(1)
    trained = model.loss(outputs, targets)
    assert {k: v.item() for k, v in evaluated.items()} == {k: v.item() for k, v in trained.items()}


def test_bfloat16(model, small_categories, random_segmentation) -> None:
    model.train()
    truths = [random_segmentation(np.random.default_rng(k), 64, 96, small_categories) for k in (3, 4)]
    images, targets = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, maps = model(images, targets, segment=True)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    for truth, merged in zip(truths, maps, strict=True):
        check_partition(merged, truth.size, small_categories)


def test_save_and_load(config, model, small_categories) -> None:
    model.eval()
    file = io.BytesIO()
    save(file, config=config, model=model)
    file.seek(0)
    again = build_model(load(file))
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        first, second = model.network(images), again.network(images)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("output", [(65, 97), (40, 131), (7, 5)])
def test_maps_come_at_the_output_size(model, output, small_categories) -> None:
    model.eval()
    images = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    frame = Frame((65, 97), torch.tensor([[65, 97], [33, 50]]), torch.tensor([output, output]))
    with torch.no_grad():
        outputs = model.network(images, frame)
    for merged in model.postprocess(outputs, frame).maps:
        check_partition(merged, output, small_categories)
    assert [m.shape for m in model.postprocess(outputs, frame, ["semantics"]).semantics] == [output, output]
    for instances in model.postprocess(outputs, frame, ["instances"]).instances:
        assert len(instances.labels) == len(instances.scores) == len(instances.boxes) == len(instances.masks)
        assert all(tuple(mask["size"]) == output for mask in instances.masks)


def test_an_evaluation_waits_for_no_other_worker(model, small_categories, random_segmentation, monkeypatch) -> None:
    """Workers evaluate different numbers of batches: a collective in a loss would wait for ever."""

    def collective(*_: object, **__: object) -> None:
        raise AssertionError("a collective in an evaluation")

    model.eval()
    truth = random_segmentation(np.random.default_rng(0), 64, 96, small_categories)
    images, targets = collate([Sample(np.zeros((64, 96, 3), np.uint8), truth, "a")], model.divisor)
    alone = evaluation_step(model, images, targets, Engine(), EVERYTHING).losses
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", collective)
    assert evaluation_step(model, images, targets, Engine(), EVERYTHING).losses.keys() == alone.keys()


def test_what_else_is_wanted_changes_nothing(model, small_categories) -> None:
    """Each part of a prediction is the same alone and beside all others; what was not asked for is None."""
    model.eval()
    images = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    frame = Frame((65, 97), torch.tensor([[65, 97], [33, 50]]), torch.tensor([[65, 97], [90, 80]]))
    with torch.no_grad():
        outputs = model.network(images, frame)
        before = {name: value.clone() for name, value in outputs.items()}
        every = model.postprocess(outputs, frame, EVERYTHING)
        alone = {want: model.postprocess(outputs, frame, [want]) for want in EVERYTHING}
    assert all(torch.equal(before[name], outputs[name]) for name in before)
    for want, prediction in alone.items():
        assert [getattr(prediction, other) for other in EVERYTHING if other != want] == [None, None, None]
    for a, b in zip(alone["maps"].maps, every.maps, strict=True):
        np.testing.assert_array_equal(a.segments, b.segments)
        np.testing.assert_array_equal(a.labels, b.labels)
    for a, b in zip(alone["instances"].instances, every.instances, strict=True):
        assert a.masks == b.masks
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.scores, b.scores)
    for a, b in zip(alone["semantics"].semantics, every.semantics, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(alone["proposals"].proposals or (), every.proposals or (), strict=True):
        assert torch.equal(a, b)


def test_nothing_leaks_from_the_padded_border(model, small_categories) -> None:
    model.eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    frame = Frame((64, 96), torch.tensor([[40, 70]]), torch.tensor([[40, 70]]))
    other = images.clone()
    other[:, :, 40:] = 255 - other[:, :, 40:]
    other[:, :, :, 70:] = 255 - other[:, :, :, 70:]
    with torch.no_grad():
        first, second = model.network(images, frame), model.network(other, frame)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("seed", range(4))
def test_the_truth_as_output_is_as_good_a_map_as_stated(
    config, model, seed, small_categories, random_segmentation
) -> None:
    from panoptic.metrics.panoptic_quality import count, quality

    model.eval()
    rng = np.random.default_rng(seed)
    truths = [
        random_segmentation(rng, 61, 93, small_categories, things=6, crowd=True),
        random_segmentation(rng, 48, 80, small_categories, things=6, void=False),
    ]
    images, targets = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
    before = {name: value.clone() for name, value in outputs.items()}
    swapped = outputs | model.truth(targets, outputs)
    assert all(torch.equal(before[name], outputs[name]) for name in before)
    maps = model.postprocess(swapped, targets.frame).maps
    counts = sum(
        (count(t, m, small_categories) for t, m in zip(truths[1:], maps[1:], strict=True)),
        start=count(truths[0], maps[0], small_categories),
    )
    bound = ORACLE.get(type(config), 100.0)
    assert bound - 1e-9 <= quality(counts, small_categories).all.pq <= 100 + 1e-9


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda kind: kind.__name__)
def test_a_step_of_broken_weights_is_skipped(kind, place: str, small_categories, random_segmentation) -> None:
    """Whether all outputs are not finite or one: no exception ends the run, and the next step may be a good one."""
    model = build(next(iter(SMALL[kind].values())), small_categories).train()
    optim = Optim(lr=0.1)
    optimiser = build_optimiser(model, optim)
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    with torch.no_grad():
        weights[0 if place == "first" else -1].view(-1)[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    truths = [random_segmentation(np.random.default_rng(k), 64, 96, small_categories) for k in (3, 4)]
    batch = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    arguments = {"step": 0, "total": 10, "optim": optim, "engine": Engine(), "health": SkipCounter()}
    assert train_step(model, optimiser, [batch], **arguments).skipped
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
