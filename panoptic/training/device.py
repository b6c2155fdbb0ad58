"""The device side of a step: precision and memory format, the model and its batches on their device, seeds.

Training and evaluation steps share it. Nothing here changes what is learnt but by rounding.

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from panoptic.layers import precision
from panoptic.layers.depthwise import keep_depthwise_in_float32
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Targets
from panoptic.training.config import Engine


def prepare(model: PanopticModel, device: torch.device | str, engine: Engine) -> PanopticModel:
    """The model on its device and in its memory format, before optimiser and DDP take hold of it.

    On a GPU it also sets what of this process is computed in TF32; for bfloat16 on a CPU, what is faster in float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        set_tf32(engine)
    if kind == "cpu" and engine.precision == "bfloat16" and precision.multiplies(kind, torch.bfloat16):
        keep_depthwise_in_float32(model)
    memory = torch.channels_last if engine.channels_last else torch.preserve_format
    return model.to(device=device, memory_format=memory)  # type: ignore[call-overload]


def set_tf32(engine: Engine) -> None:
    """Compute in TF32 what the engine says, in all of this process."""
    torch.backends.cuda.matmul.allow_tf32 = engine.tf32 == "all"
    torch.backends.cudnn.allow_tf32 = engine.tf32 != "none"


def unwrap(model: nn.Module) -> PanopticModel:
    """The model inside DDP and `torch.compile` wrappers."""
    while not isinstance(model, PanopticModel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    return model


def seed_torch(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch's generators for one micro-batch, so that a continued run draws what it would have drawn.

    They are those of the CPU and of NVIDIA's GPUs. `torch.manual_seed` also asks for devices of other makers and, where
    there are none, writes down the call's stack for each, which takes 1 ms of a step.

    Args:
        seed: of the run.
        step: iteration, from 0.
        micro: micro-batch of the step, from 0.
        rank: of the worker.
    """
    state = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    number = int(state[0] >> 1)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def to_device(model: nn.Module, images: Tensor, targets: Targets, engine: Engine) -> tuple[Tensor, Targets]:
    """The batch on the model's device, in the memory format of its weights.

    What lies in pinned memory (`pinned`) is copied to a GPU on a stream of its own, so beside what the GPU still
    computes of the step before.
    """
    device = next(model.parameters()).device
    memory = torch.channels_last if engine.channels_last else torch.contiguous_format
    if device.type != "cuda" or not images.is_pinned():
        return images.to(device, non_blocking=True).contiguous(memory_format=memory), targets.to(device)
    computing, copying = torch.cuda.current_stream(device), _copying_stream(device)
    with torch.cuda.stream(copying):
        images, targets = images.to(device, non_blocking=True), targets.to(device)
    computing.wait_stream(copying)
    for tensor in (images, targets.segments, targets.labels, targets.crowd, *(targets.features or {}).values()):
        tensor.record_stream(computing)  # its memory is given to nobody else before the step has used it
    return images.contiguous(memory_format=memory), targets


def precision_note(device: torch.device, engine: Engine) -> str:
    """The note of a run whose device does not compute in the engine's precision; "" where it does."""
    if engine.precision == "float32" or precision.multiplies(device.type, precision.TYPES[engine.precision]):
        return ""
    name = "this CPU" if device.type == "cpu" else "this GPU"
    return f"engine.precision {engine.precision}: {name} has no instructions for it, so it computes in float32"


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are copied."""
    return torch.cuda.Stream(device)


def pinned(images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """A batch in memory from which a GPU copies by itself; copying into it takes time, so call it in a thread."""
    return images.pin_memory(), targets.pin_memory()


def autocast(images: Tensor, engine: Engine) -> torch.autocast:
    """The context in which the network runs: the engine's precision, or float32 on a device that is slower in that."""
    return precision.autocast(images.device, engine.precision)
