"""One training step and one evaluation step, without a framework around them.

Ray Train's loop and a plain `for` call the same two functions. A step is a whole global batch: with
W workers and A micro-batches of b images each, W * A * b images, one update.

Torch is seeded from (seed, step, micro-step, rank) before every micro-batch, so that a run that is
continued draws what it would have drawn and no generator state needs saving.

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from panoptic.distributed import alone, world_size
from panoptic.evaluation.oracle import swap
from panoptic.models.base import PanopticModel, full_precision
from panoptic.segmentation import Instances, Segmentation, Targets
from panoptic.training.optim import Optim, learning_rate_factor, set_learning_rate


@dataclass(frozen=True)
class Engine:
    """How a step computes; nothing here changes what is learnt but by rounding."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network, by autocast; losses and merging always run in float32."""
    channels_last: bool = False
    """Memory format of images and weights; usually faster on a GPU."""
    max_skipped: int = 5
    """Steps in a row with a loss or gradient that is not finite before training stops."""


@dataclass
class Health:
    """What outlives a step: how often the update was skipped because something was not finite."""

    skipped: int = 0
    """In all."""
    in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one step did. Losses and gradient norm stay on the device: `Meter` reads them when they are logged."""

    losses: dict[str, Tensor]
    """Scalars of this worker, means over its micro-batches, with their sum as `total`."""
    grad_norm: Tensor
    """Before clipping, over all workers."""
    lr: float
    skipped: bool
    images: int
    """Of this worker."""
    wait: float
    """Seconds spent waiting for data."""
    seconds: float
    """Of the whole step, waiting included."""


def prepare(model: PanopticModel, device: torch.device | str, engine: Engine) -> PanopticModel:
    """The model on its device and in its memory format, before optimiser and DDP take hold of it."""
    memory = torch.channels_last if engine.channels_last else torch.preserve_format
    return model.to(device=device, memory_format=memory)  # type: ignore[call-overload]


def unwrap(model: nn.Module) -> PanopticModel:
    """The model inside DDP and `torch.compile` wrappers."""
    while not isinstance(model, PanopticModel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    return model


def train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Targets]],
    *,
    step: int,
    total: int,
    optim: Optim,
    engine: Engine,
    health: Health,
    accumulation: int = 1,
    ema: AveragedModel | None = None,
    seed: int = 0,
    rank: int = 0,
    lr: float | None = None,
) -> StepResult:
    """One update from `accumulation` micro-batches.

    Args:
        model: a `PanopticModel` in training mode, wrapped in DDP when there are several workers.
        optimiser: from `build_optimiser` on the unwrapped model.
        batches: yields images uint8 [B, 3, H, W] and targets, on any device; exactly `accumulation`
            are taken. Micro-batches of one size make the mean of their losses the mean over images.
        step: iteration, from 0; the update is skipped, never repeated, when something is not finite.
        total: iterations of the whole run, for the schedule.
        health: updated in place.
        ema: averaged weights, updated in place.
        lr: rate for the global batch; `optim.lr` by default.

    Raises:
        ValueError: `batches` ended early.
        FloatingPointError: a loss or gradient was not finite in `engine.max_skipped` steps in a row;
            names the images.
    """
    start = time.perf_counter()
    rate = (optim.lr if lr is None else lr) * learning_rate_factor(step, total, optim)
    set_learning_rate(optimiser, rate)
    optimiser.zero_grad(set_to_none=True)
    restore = _running_statistics(model)
    source, wait, images_seen, names = iter(batches), 0.0, 0, []
    sums: dict[str, Tensor] = {}
    for micro in range(accumulation):
        waiting = time.perf_counter()
        images, targets = _take(source, step, micro, accumulation)
        wait += time.perf_counter() - waiting
        images_seen += len(images)
        names.extend(targets.names)
        seed_torch(seed, step, micro, rank)
        last = micro == accumulation - 1
        losses = _backward(model, images, targets, engine, accumulation, last)
        sums = {name: value + sums[name] if sums else value for name, value in losses.items()}
    norm = clip_gradients(optimiser, optim.clip_norm, optim.clip_value)
    skipped = not _all_finite(sums["total"], norm)
    if skipped:
        restore()
        _count_skip(health, engine, step, names, sums, norm)
    else:
        health.in_a_row = 0
        optimiser.step()
        if ema is not None:
            ema.update_parameters(unwrap(model))
    return StepResult(sums, norm, rate, skipped, images_seen, wait, time.perf_counter() - start)


class Judged(NamedTuple):
    """What one pass over a batch of B images gives."""

    losses: dict[str, Tensor]
    """Scalars on the device, with their sum as `total`."""
    maps: list[Segmentation]
    """Merged, for PQ."""
    semantics: list[np.ndarray]
    """int32 [H, W] class maps, for mIoU."""
    instances: list[Instances] | None
    """For AP; None where they were not wanted."""
    proposals: list[Tensor] | None
    """For recall; None where they were not wanted, and from models without region proposals."""
    seconds: dict[str, float]
    """`network`, `merge`, `loss` and `extra` (class maps, instances, proposals)."""


def evaluation_step(
    model: PanopticModel,
    images: Tensor,
    targets: Targets,
    engine: Engine,
    instances: bool = False,
    true: Sequence[str] = (),
    losses: bool = True,
) -> Judged:
    """Losses, merged maps and class maps of one batch, from one pass of the network.

    Args:
        model: unwrapped and in evaluation mode.
        images: uint8 [B, 3, H, W].
        instances: also want scored instances and region proposals.
        true: outputs that the truth takes the place of before merging (see `oracle`); not in the losses.
        losses: want the losses; there are none otherwise.

    Returns:
        everything but the losses at `targets.frame.output_sizes`.

    Raises:
        ValueError: the model is in training mode; its running statistics would learn from the validation.
    """
    if model.training:
        raise ValueError("evaluation_step: the model is in training mode; call model.eval() first")
    images, targets = _place(model, images, targets, engine)
    frame, clock = targets.frame, _Clock(images.device)
    with torch.inference_mode(), alone():
        with _autocast(images, engine):
            outputs = model.network(images, frame)
        outputs = full_precision(outputs)
        clock.lap("network")
        terms = model.loss(outputs, targets) if losses else {}
        clock.lap("loss")
        if true:
            outputs = swap(outputs, model.truth(targets, outputs), true)
        found = model.detections(outputs, frame)
        maps = model.segment(found, frame)
        clock.lap("merge")
        semantics = model.semantics(found, frame, maps)
        scored = model.instances(found, frame, maps) if instances else None
        proposals = model.proposals(found, frame) if instances else None
        clock.lap("extra")
    terms = {**terms, "total": _sum(terms)} if terms else {}
    return Judged(terms, maps, semantics, scored, proposals, clock.seconds)


class _Clock:
    """Seconds between calls of `lap`; waits for the GPU, which works behind the caller's back."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._mark = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = now - self._mark
        self._mark = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def seed_torch(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed every generator of torch for one micro-batch."""
    state = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def clip_gradients(optimiser: torch.optim.Optimizer, largest: float, entry: float = 0.0) -> Tensor:
    """Cut every entry to `entry`, then scale all to a norm of at most `largest` (0 = leave them); the norm before."""
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = left = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if entry > 0:
        torch.nn.utils.clip_grad_value_(parameters, entry)
        left = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, left)
    return norm


def _take(source: Iterator[tuple[Tensor, Targets]], step: int, micro: int, wanted: int) -> tuple[Tensor, Targets]:
    batch = next(source, None)
    if batch is None:
        raise ValueError(f"train_step: the data ended at step {step} after {micro} of {wanted} micro-batches")
    return batch


def _place(model: nn.Module, images: Tensor, targets: Targets, engine: Engine) -> tuple[Tensor, Targets]:
    """The batch on the model's device, in the memory format of its weights."""
    device = next(model.parameters()).device
    memory = torch.channels_last if engine.channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=memory), targets.to(device)


def _autocast(images: Tensor, engine: Engine) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=engine.precision == "bfloat16")


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _backward(
    model: nn.Module, images: Tensor, targets: Targets, engine: Engine, accumulation: int, last: bool
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; its share of the losses, detached.

    Backward runs whatever the loss is: the other workers are waiting for this one's gradients. They
    are exchanged with the last micro-batch only.
    """
    images, targets = _place(model, images, targets, engine)
    alone = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
        with _autocast(images, engine):
            losses, _ = model(images, targets)
        loss = _sum(losses) / accumulation
        loss.backward()
    return {name: value.detach() / accumulation for name, value in losses.items()} | {"total": loss.detach()}


def _all_finite(loss: Tensor, norm: Tensor) -> bool:
    """Whether loss and gradient are finite on every worker; the one point at which a step waits for the GPU.

    Reduced gradients tell most of it, but not a loss that is not finite where its gradient is zero; and
    workers that disagree would drift apart for ever. So the workers ask each other.
    """
    finite = (torch.isfinite(loss) & torch.isfinite(norm)).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite.item())


def _running_statistics(model: nn.Module) -> Callable[[], None]:
    """A function that puts the statistics of batch norms back as they are now.

    A forward pass that is not finite poisons them for ever: training would go on with the statistics of
    its batches and every later validation would be NaN. (0.4 ms for a ResNet-50 on a CPU.)
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    def restore() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return restore


def _count_skip(
    health: Health, engine: Engine, step: int, names: list[str], losses: dict[str, Tensor], norm: Tensor
) -> None:
    health.skipped += 1
    health.in_a_row += 1
    if health.in_a_row >= engine.max_skipped:
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        raise FloatingPointError(
            f"step {step}: loss or gradient not finite in {health.in_a_row} steps in a row. On this worker: {values}, "
            f"gradient norm {float(norm):.4g}, images {', '.join(names)}. "
            "Look at these images, lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm"
        )


@dataclass
class Meter:
    """Means between two log lines. Every worker feeds its own and calls `read` at the same steps."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    steps: int = 0
    counted: int = 0
    images: int = 0
    wait: float = 0.0
    seconds: float = 0.0
    lr: float = 0.0

    def add(self, result: StepResult) -> None:
        """Count a step. Skipped ones count in time and images only."""
        self.steps += 1
        self.images += result.images
        self.wait += result.wait
        self.seconds += result.seconds
        self.lr = result.lr
        if result.skipped:
            return
        self.counted += 1
        self.losses = {n: v + self.losses[n] if n in self.losses else v for n, v in result.losses.items()}
        self.grad_norm = result.grad_norm if self.grad_norm is None else self.grad_norm + result.grad_norm

    def read(self) -> dict[str, float]:
        """Means over steps and workers since the last call, and start again.

        Returns:
            `loss/<term>`, `grad_norm`, `lr`, `images_per_second` (of all workers), `step_seconds` and
            `data_wait` (the share of the time, 0 to 1). Losses are absent when every step was skipped.
        """
        workers = world_size()
        values: dict[str, float] = {}
        if self.counted and self.grad_norm is not None:
            names = [*(f"loss/{name}" for name in self.losses), "grad_norm"]
            means = torch.stack([*self.losses.values(), self.grad_norm.to(self.losses["total"])]) / self.counted
            if workers > 1:
                torch.distributed.all_reduce(means)
                means /= workers
            values.update(zip(names, means.tolist(), strict=True))
        values["lr"] = self.lr
        if self.steps:
            values["images_per_second"] = workers * self.images / max(self.seconds, 1e-9)
            values["step_seconds"] = self.seconds / self.steps
            values["data_wait"] = self.wait / max(self.seconds, 1e-9)
        self.__init__()
        return values
