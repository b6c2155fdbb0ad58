"""The device side of a step: precision and memory format, the model and its batches on their device, seeds.

Training and evaluation steps share it. Nothing here changes what is learnt but by rounding.

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from panoptic.models.base import PanopticModel
from panoptic.ranges import PositiveInt
from panoptic.segmentation import Targets


@dataclass(frozen=True)
class Engine:
    """Precision and memory format of a step, and its patience with numbers that are not finite."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network, by autocast; losses and post-processing always run in float32."""
    channels_last: bool = False
    """Memory format of images and weights; usually faster on a GPU."""
    max_skipped: PositiveInt = 5
    """Steps in a row with a loss or gradient that is not finite before training stops."""


def prepare(model: PanopticModel, device: torch.device | str, engine: Engine) -> PanopticModel:
    """The model on its device and in its memory format, before optimiser and DDP take hold of it."""
    memory = torch.channels_last if engine.channels_last else torch.preserve_format
    return model.to(device=device, memory_format=memory)  # type: ignore[call-overload]


def unwrap(model: nn.Module) -> PanopticModel:
    """The model inside DDP and `torch.compile` wrappers."""
    while not isinstance(model, PanopticModel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    return model


def seed_torch(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed every generator of torch for one micro-batch, so that a continued run draws what it would have drawn.

    Args:
        seed: of the run.
        step: iteration, from 0.
        micro: micro-batch of the step, from 0.
        rank: of the worker.
    """
    state = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def to_device(model: nn.Module, images: Tensor, targets: Targets, engine: Engine) -> tuple[Tensor, Targets]:
    """The batch on the model's device, in the memory format of its weights."""
    device = next(model.parameters()).device
    memory = torch.channels_last if engine.channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=memory), targets.to(device)


def autocast(images: Tensor, engine: Engine) -> torch.autocast:
    """The context in which the network runs; float32 where the engine says so."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=engine.precision == "bfloat16")
