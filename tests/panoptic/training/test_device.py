"""A model and its batches on their device, the precision of the network, and seeds."""

from __future__ import annotations

import itertools

import pytest
import torch

from panoptic.training.device import Engine, autocast, prepare, seed_torch, to_device, unwrap
from tests.support.tiny import TinyConfig, tiny_batch, tiny_categories


@pytest.mark.parametrize("channels_last", [False, True])
def test_model_and_batch_have_one_memory_format(channels_last: bool) -> None:
    engine = Engine(channels_last=channels_last)
    model = prepare(TinyConfig().build(tiny_categories()), "cpu", engine)
    images, targets = to_device(model, *tiny_batch(0), engine)
    for tensor in (model.backbone[0].weight, images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert targets.segments.device == images.device


def test_the_model_is_found_inside_its_wrappers() -> None:
    model = TinyConfig().build(tiny_categories())
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model


@pytest.mark.parametrize(("precision", "kind"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_network_runs_in_the_precision_of_the_engine(precision, kind: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(x, Engine(precision=precision)):
        assert (x @ x).dtype == kind


def test_every_micro_batch_of_every_worker_draws_its_own_numbers_again() -> None:
    def draw(*place: int) -> float:
        seed_torch(*place)
        return float(torch.rand(()))

    places = list(itertools.product(range(2), repeat=4))
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn == [draw(*place) for place in places]
