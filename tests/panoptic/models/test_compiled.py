"""`network` of every architecture is one graph for torch.compile, with and without a frame.

Dynamo traces it; nothing is made into machine code. A place at which it cannot go on is an error (`fullgraph`).
"""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pytest
import torch

from panoptic import models
from panoptic.segmentation import Frame
from panoptic.training.compiling import CompiledGraphs, compile_network
from tests.support.small import SMALL
from tests.support.tiny import TinyConfig, tiny_categories

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(next(iter(SMALL[kind].values())), id=kind.__name__) for kind in ARCHITECTURES]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow  # a second or two each
@pytest.mark.parametrize(
    "padded", [pytest.param(False, id="plain", marks=pytest.mark.nightly), pytest.param(True, id="frame")]
)
@pytest.mark.parametrize("config", CASES)
def test_the_network_is_one_graph(config, padded: bool, small_categories) -> None:
    model = config.build(small_categories).train()
    compile_network(model, backend="eager", fullgraph=True)
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    frame = None
    if padded:
        sizes = torch.tensor([[64, 96], [50, 71]])
        frame = Frame((64, 96), sizes, sizes)
    counted = CompiledGraphs()
    model.network(images, frame)
    assert counted.new() == 1
    if padded:  # sizes of images are values, which no graph is made for
        sizes = torch.tensor([[60, 90], [64, 96]])
        model.network(images, Frame((64, 96), sizes, sizes))
        assert counted.new() == 0


def test_a_graph_that_is_compiled_anew_is_counted() -> None:
    model = TinyConfig().build(tiny_categories())
    compile_network(model, backend="eager")
    counted = CompiledGraphs()
    model.network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert counted.new() == 1
    model.network(torch.ones(2, 3, 8, 8, dtype=torch.uint8))
    assert counted.new() == 0
    model.network(torch.zeros(2, 3, 8, 12, dtype=torch.uint8))  # the width becomes a variable
    assert counted.new() == 1
    model.network(torch.zeros(2, 3, 8, 16, dtype=torch.uint8))
    assert counted.new() == 0
