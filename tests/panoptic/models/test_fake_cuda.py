"""Every network on CUDA tensors without values: no operation meets two devices, and dtypes fit under autocast.

`FakeTensorMode` computes shapes, dtypes and devices alone, by rules that PyTorch keeps, so that this needs no GPU.
Losses and maps, where values decide about shapes, are those of `test_claimed_cuda`.
"""

from __future__ import annotations

import typing
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from panoptic import models
from panoptic.models import PanopticDeepLabConfig
from panoptic.models.base import full_precision
from panoptic.segmentation import Frame
from panoptic.training.device import Engine, autocast
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]

CUDA = torch.device("cuda", 0)


def precision_of(images: Tensor, engine: Engine) -> AbstractContextManager[object]:
    """`autocast`, which would leave out what it is asked for where there is no GPU."""
    if engine.precision == "float32":
        return nullcontext()
    with mock.patch.multiple(
        torch.cuda, is_available=lambda: True, is_bf16_supported=lambda *_, **__: True, current_device=lambda: 0
    ):
        return autocast(images, engine)


def batch(device: torch.device) -> tuple[Tensor, Frame]:
    """Two images, the second padded; sizes lie on the CPU."""
    sizes = torch.tensor([[64, 96], [50, 71]], device="cpu")
    return torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device=device), Frame((64, 96), sizes, sizes)


@pytest.mark.parametrize("config", CASES)
@pytest.mark.usefixtures("half_precision")
def test_networks_stay_on_the_device(config, small_categories, monkeypatch) -> None:
    for module in ("vision_transformer", "eva"):  # timm reads values of a tensor while it builds
        monkeypatch.setattr(f"timm.models.{module}.calculate_drop_path_rates", lambda rate, depth: [rate] * depth)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            model = config.build(small_categories).train()
        images, frame = batch(CUDA)
        with precision_of(images, Engine("bfloat16")):
            outputs = model.network(images, frame)
        assert outputs and {value.device for value in outputs.values()} == {CUDA}
        single = full_precision(outputs)
        assert {value.dtype for value in single.values()} <= {torch.float32, torch.int64, torch.bool}


def test_a_tensor_of_another_device_is_refused(small_categories) -> None:
    """The check sees what it is made for."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            model = SMALL[PanopticDeepLabConfig]["standalone"].build(small_categories)
        images, _ = batch(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="device"):
            model.network(images)
