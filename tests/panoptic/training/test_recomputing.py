"""Activation checkpointing changes no number: one configuration of every architecture, bit for bit."""

from __future__ import annotations

import copy
import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from panoptic import models
from panoptic.backbones.config import Backbone
from panoptic.segmentation import Sample, collate
from panoptic.training.device import Engine, seed_torch
from panoptic.training.recomputing import blocks, recompute_blocks, recomputes
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture)
CASES = [pytest.param(c, id=f"{kind.__name__}-{n}") for kind in ARCHITECTURES for n, c in list(SMALL[kind].items())[:1]]


def pass_of(model: Any, images: torch.Tensor, targets: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Losses, gradients and buffers after a forward and backward pass; and bytes that lie between the two."""
    model.zero_grad()
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seed_torch(0, 0, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        outputs = model.network(images, targets.frame)
    losses = model.loss(outputs, targets)
    torch.stack(list(losses.values())).sum().backward()
    found = {f"loss {name}": value.detach() for name, value in losses.items()}
    found |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}, sum(held.values())


@pytest.mark.parametrize("config", CASES)
def test_losses_gradients_and_statistics_are_the_same(config, small_categories, random_segmentation) -> None:
    torch.manual_seed(0)
    model = config.build(small_categories).train()
    rng = np.random.default_rng(0)
    truths = [random_segmentation(rng, 64, 96, small_categories) for _ in range(2)]
    batch = collate([Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), t, "a") for t in truths], model.divisor)
    twin = copy.deepcopy(model)
    names = list(model.state_dict())
    assert recompute_blocks(model) and recomputes(model) and not recomputes(twin)
    (found, less), (expected, more) = pass_of(model, *batch), pass_of(twin, *batch)
    assert list(model.state_dict()) == names
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert less < more


class Droppy(nn.Module):
    """A block with a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x)).sin()


def test_a_copy_computes_with_its_own_weights_and_nothing_is_kept_without_gradients() -> None:
    """The average of the weights is such a copy."""
    model = nn.Sequential(Droppy(), Droppy())
    assert recompute_blocks(model) == 2
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        other[0].norm.weight.zero_()  # type: ignore[union-attr]
        other[0].norm.bias.zero_()  # type: ignore[union-attr]
        assert not other(torch.ones(3, 4)).any() and recomputes(other)
    x = torch.randn(8, 4, requires_grad=True)
    torch.manual_seed(1)
    model(x).sum().backward()
    norm = model[0].norm
    assert norm.num_batches_tracked == 1  # type: ignore[union-attr]
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean(0))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "count"), [("resnet50", 16), ("swin_tiny", 12), ("convnext_atto", 12), ("res2net50_26w_4s", 16)]
)
def test_backbones_have_their_blocks(name: str, count: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(name=name).build(("res2", "res3", "res4", "res5"))
    assert sum(1 for _ in blocks(backbone)) == count


def test_it_is_off_unless_asked_for() -> None:
    assert Engine().activation_checkpointing is False
