"""Every architecture on CUDA tensors without data: no operation meets two devices, and dtypes fit under autocast.

`FakeTensorMode` computes shapes, dtypes and devices alone, so that this needs no GPU. What depends on values (losses
that sample regions or count) needs tensors with values; networks do not, nor do the losses of Panoptic-DeepLab and,
with their matching given, those of DETR, MaskFormer, Mask2Former and EoMT.
"""

from __future__ import annotations

import typing
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from panoptic import models
from panoptic.matcher import Matches
from panoptic.models import DETRConfig, EoMTConfig, Mask2FormerConfig, MaskFormerConfig, PanopticDeepLabConfig
from panoptic.models.base import full_precision
from panoptic.segmentation import Frame, Targets
from panoptic.training.device import Engine, autocast
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]

CUDA = torch.device("cuda", 0)

COUNTABLE = torch.zeros(2, 3, dtype=torch.int64)
"""Labels of the segments of two images that queries learn, with values: in a training they lie on the CPU, too."""


def precision_of(images: Tensor, engine: Engine) -> AbstractContextManager[object]:
    """`autocast`, which would leave out what it is asked for where there is no GPU."""
    if engine.precision == "float32":
        return nullcontext()
    with mock.patch.multiple(
        torch.cuda, is_available=lambda: True, is_bf16_supported=lambda *_, **__: True, current_device=lambda: 0
    ):
        return autocast(images, engine)


def batch(device: torch.device) -> tuple[Tensor, Targets]:
    """Two images, the second padded; sizes lie on the CPU."""
    sizes = torch.tensor([[64, 96], [50, 71]], device="cpu")
    with torch.device(device):
        segments = torch.ones(2, 64, 96, dtype=torch.int32)
        labels, crowd = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)
        images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    return images, Targets(segments, labels, crowd, Frame((64, 96), sizes, sizes), ("a", "b"), countable=COUNTABLE)


def first_pairs(cost: Tensor, valid: Tensor, names: tuple[str, ...]) -> Matches:
    """In place of the matching, whose costs have no values here: query k of each group takes target k."""
    groups = torch.arange(len(cost), device=cost.device).repeat_interleave(valid.shape[1])
    numbers = torch.arange(valid.shape[1], device=cost.device).repeat(len(cost))
    return Matches(groups, numbers, numbers, np.arange(len(cost)).repeat(valid.shape[1]))


@pytest.mark.parametrize("config", CASES)
@pytest.mark.usefixtures("half_precision")
def test_networks_and_losses_stay_on_the_device(config, small_categories, monkeypatch) -> None:
    for module in ("maskformer.loss", "detr.loss", "mask_transformer.point_loss"):
        monkeypatch.setattr(f"panoptic.models.{module}.hungarian", first_pairs)
    for module in ("vision_transformer", "eva"):  # timm reads values of a tensor while it builds
        monkeypatch.setattr(f"timm.models.{module}.calculate_drop_path_rates", lambda rate, depth: [rate] * depth)
    whole = DETRConfig, EoMTConfig, Mask2FormerConfig, MaskFormerConfig, PanopticDeepLabConfig
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            model = config.build(small_categories).train()
        images, targets = batch(CUDA)
        with precision_of(images, Engine("bfloat16")):
            outputs = model.network(images, targets.frame)
        assert outputs and {value.device for value in outputs.values()} == {CUDA}
        single = full_precision(outputs)
        assert {value.dtype for value in single.values()} <= {torch.float32, torch.int64, torch.bool}
        try:
            losses = model.loss(single, targets)
        except (DataDependentOutputException, DynamicOutputShapeException):
            # values decide about shapes from here on: only what came before is known to fit
            assert not isinstance(config, whole)
            return
        assert {value.device for value in losses.values()} == {CUDA}
        assert {value.dtype for value in losses.values()} == {torch.float32}


def test_a_tensor_of_another_device_is_refused(small_categories) -> None:
    """The check sees what it is made for."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            model = SMALL[PanopticDeepLabConfig]["standalone"].build(small_categories)
        images, _ = batch(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="device"):
            model.network(images)
