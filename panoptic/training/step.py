"""One training step, without a framework around it, and the means that are logged of many.

Ray Train's loop and a plain `for` call the same function. A step is a whole global batch: with W workers and A
micro-batches of b images each, W * A * b images, one update.

Torch is seeded from (seed, step, micro-batch, rank) before every micro-batch, so that a run that is continued draws
what it would have drawn and no generator state needs saving.

The host runs ahead of a GPU: the device itself decides whether an update is made, copies of the batch lie on a stream
of their own, and the only value that a step reads is the verdict on the step before (`SkipCounter`).

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from panoptic.distributed import one_of, world_size
from panoptic.segmentation import Targets
from panoptic.training.config import Engine, Optim
from panoptic.training.device import autocast, seed_torch, to_device, unwrap
from panoptic.training.loss_scale import follow, loss_scale, unscale
from panoptic.training.memory import StepDoesNotFit, allocation_failed
from panoptic.training.optim import learning_rate_factor, masked_step, set_learning_rate, update_ema
from panoptic.training.phases import Phases, mean_seconds

LISTS: Any = torch
"""torch with its operations on lists of tensors, a few kernels for all, which it does not list by name."""

ONE_VALUE = "Expected more than 1 value per channel"
"""The beginning of torch's message where a batch norm has nothing to take a variance of.

Both `torch.nn.functional` and `SyncBatchNorm` raise a bare ValueError for it, as layers do for any other fault.
"""

MADE, SCALED, BROKEN = 0, 1, 2
"""Verdicts on a step: the update was made; it was left out because the factor on a float16 loss was too large, which
halves it; it was left out because something was not finite."""


class BrokenSteps(FloatingPointError):
    """Too many steps in a row had a loss or a gradient that is not finite."""

    def __init__(self, message: str, step: int) -> None:
        """An error of the last broken step, an iteration from 0."""
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses processes
        return BrokenSteps, (str(self), self.step)


@dataclass
class Verdict:
    """The outcome of a step, on its way from the device."""

    step: int
    names: list[str]
    """Names of the step's images on this worker."""
    losses: dict[str, Tensor]
    norm: Tensor
    """The norm of the whole gradient before clipping."""
    value: Tensor
    """uint8 scalar on the CPU: `MADE`, `SCALED` or `BROKEN`; to be read after `copied`."""
    copied: torch.cuda.Event | None
    """The event that follows the copy of `value` to the CPU; None where the step ran there."""


@dataclass
class SkipCounter:
    """The updates that were skipped because something was not finite; outlives the steps.

    A step on a GPU is counted while the next one runs, or by `settle`; one on a CPU at its end.
    """

    skipped: int = 0
    """Updates skipped so far."""
    in_a_row: int = 0
    """Skipped updates since the last one that was made, but for those that a smaller factor on the loss cures."""
    waiting: Verdict | None = field(default=None, compare=False, repr=False)
    """On the newest step, where it is not counted yet."""

    def settle(self, most: int) -> None:
        """Count the step that waits for it, if one does; waits until the device has done that step.

        Raises:
            BrokenSteps: it is the `most`-th in a row that was broken; names the images.
        """
        verdict, self.waiting = self.waiting, None
        if verdict is None:
            return
        if verdict.copied is not None:
            verdict.copied.synchronize()
        value = int(verdict.value)
        self.skipped += value != MADE
        if value == MADE:
            self.in_a_row = 0
        elif value == BROKEN:
            self.in_a_row += 1
            if self.in_a_row >= most:
                raise BrokenSteps(_too_many(verdict, self.in_a_row), verdict.step)


@dataclass(frozen=True)
class StepResult:
    """Losses, rate and times of one step.

    Losses, gradient norm and `finite` stay on the device: `Meter` reads them when they are logged.
    """

    losses: dict[str, Tensor]
    """Scalars of this worker, means over its micro-batches, with their sum as `total`."""
    grad_norm: Tensor
    """The norm of the whole gradient before clipping, over all workers."""
    lr: float
    """The learning rate of this step, before the factor of each parameter group."""
    finite: Tensor
    """bool scalar: the update was made; False where it was left out, because a loss or the gradient was not finite."""
    images: int
    """Images of this worker in the step."""
    wait: float
    """Seconds spent waiting for data."""
    seconds: float
    """Seconds of the whole step, waiting included."""
    phases: Phases | None = None
    """Times at which forward, backward and optimiser began and ended; None where they are not measured."""

    @property
    def skipped(self) -> bool:
        """The update was left out; asking waits for the device."""
        return not bool(self.finite)


def train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Targets]],
    *,
    step: int,
    total: int,
    optim: Optim,
    engine: Engine,
    health: SkipCounter,
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
        optim: learning rate, its schedule and clipping.
        engine: precision and memory format.
        health: the run's count of skipped updates, updated in place.
        accumulation: micro-batches of this worker.
        ema: averaged weights, updated in place.
        seed: of the run; with step, micro-batch and rank it seeds torch.
        rank: of this worker.
        lr: rate for the global batch; `optim.lr` by default.

    Raises:
        ValueError: `batches` ended early.
        StepDoesNotFit: memory ran out in the forward or backward pass of a micro-batch. Weights, statistics and health
            are those before the step, so that it can be taken again with smaller micro-batches.
        BrokenSteps: a loss or gradient was not finite in `engine.max_skipped` steps in a row;
            names the images. On a GPU this is known in the step after, before its update.
    """
    start = time.perf_counter()
    largest = optim.lr if lr is None else lr
    rate = largest * learning_rate_factor(step, total, optim)
    set_learning_rate(optimiser, rate, largest * learning_rate_factor(step, total, optim, backbone=True))
    unwrap(model).begin_step(step, total)
    optimiser.zero_grad(set_to_none=True)
    restore = _running_statistics(model)
    source, wait, images_seen, names = iter(batches), 0.0, 0, []
    terms: list[str] = []
    sums: Tensor | None = None
    device = _device_of(optimiser)
    scale = loss_scale(optimiser, device) if engine.precision == "float16" else None
    phases = Phases(device)
    for micro in range(accumulation):
        waiting = time.perf_counter()
        images, targets = _take(source, step, micro, accumulation)
        wait += time.perf_counter() - waiting
        images_seen += len(images)
        names.extend(targets.names)
        seed_torch(seed, step, micro, rank)
        phases.begin()
        last = micro == accumulation - 1
        try:
            terms, values = forward_backward(model, images, targets, engine, accumulation, last, scale, phases)
        except Exception as error:
            if not allocation_failed(error):
                raise
            restore(torch.zeros((), dtype=torch.bool, device=device))
            optimiser.zero_grad(set_to_none=True)
            raise StepDoesNotFit(step, len(images), targets.frame.canvas, targets.names) from error
        sums = values if sums is None else values + sums
    assert sums is not None
    losses = dict(zip(terms, sums.unbind(), strict=True))
    if scale is not None:
        unscale(optimiser, scale)
    norm = clip_gradients(optimiser, optim.clip_norm, optim.clip_value)
    verdict = _judge(losses["total"], norm, scale)
    finite = verdict == MADE
    health.settle(engine.max_skipped)
    restore(finite)
    masked_step(optimiser, finite)
    if ema is not None:
        update_ema(ema, unwrap(model), optim.ema, finite)
    if scale is not None:
        follow(optimiser, verdict == SCALED, finite)
    phases.end("optimiser")
    health.waiting = Verdict(step, names, losses, norm, *_on_its_way(verdict))
    if verdict.device.type == "cpu":
        health.settle(engine.max_skipped)
    return StepResult(losses, norm, rate, finite, images_seen, wait, time.perf_counter() - start, phases)


def clip_gradients(optimiser: torch.optim.Optimizer, largest: float, entry: float = 0.0) -> Tensor:
    """Cut every entry of the gradient, then scale all of it.

    Args:
        optimiser: of the parameters.
        largest: norm of the whole gradient; 0 = not scaled.
        entry: absolute value of an entry; 0 = not cut.

    Returns:
        the norm before both.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = left = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if entry > 0:
        torch.nn.utils.clip_grad_value_(parameters, entry)
        left = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, left)
    return norm


def _device_of(optimiser: torch.optim.Optimizer) -> torch.device:
    """The device of the parameters."""
    return optimiser.param_groups[0]["params"][0].device


def _take(source: Iterator[tuple[Tensor, Targets]], step: int, micro: int, accumulation: int) -> tuple[Tensor, Targets]:
    """The next micro-batch."""
    batch = next(source, None)
    if batch is None:
        raise ValueError(f"train_step: the data ended at step {step} after {micro} of {accumulation} micro-batches")
    return batch


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    return torch.stack(list(losses.values())).sum()


def forward_backward(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    engine: Engine,
    accumulation: int,
    last: bool,
    scale: Tensor | None,
    phases: Phases,
) -> tuple[list[str], Tensor]:
    """Forward and backward of one micro-batch; returns its share of the losses, detached, and their sum: names, values.

    Backward runs whatever the loss is, because the other workers wait for this one's gradients. Gradients are exchanged
    with the last micro-batch only.

    Args:
        model: in training mode, wrapped in DDP where there are several workers.
        images: uint8 [B, 3, H, W], on any device.
        targets: of the images.
        engine: precision and memory format.
        accumulation: micro-batches of the step.
        last: this one is the last of them.
        scale: factor on the loss, float32 scalar; None = 1.
        phases: of the step.
    """
    images, targets = to_device(model, images, targets, engine)
    alone = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
        try:
            with autocast(images, engine), one_of(accumulation):
                losses, _ = model(images, targets)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise ValueError(_too_few_values(images, targets)) from error
        terms = torch.stack(list(losses.values()))
        loss = terms.sum() / accumulation
        phases.end("forward")
        (loss if scale is None else loss * scale).backward()
        phases.end("backward")
    return [*losses, "total"], torch.cat([terms.detach() / accumulation, loss.detach()[None]])


def _too_few_values(images: Tensor, targets: Targets) -> str:
    """The message where a batch norm meets a map of one pixel of one image."""
    size = "x".join(map(str, images.shape[-2:]))
    return (
        f"{', '.join(targets.names)}: a batch norm in training needs more than one value of each channel, and "
        f"{len(images)} image of {size} pixels leaves one at the smallest map. Give a worker two images at least at a "
        "time (larger train.batch or train.micro_batch, fewer train.workers), a larger augment.crop, or a norm without "
        "statistics of the batch (model.norm group, say)"
    )


def _judge(loss: Tensor, norm: Tensor, scale: Tensor | None) -> Tensor:
    """The verdict on a step, uint8 scalar on the device, the same on every worker.

    The reduced gradient, which all workers share, does not show a loss that is not finite where its gradient is zero.
    Workers that disagree about an update would drift apart for ever, so they ask each other.
    """
    finite = torch.stack([torch.isfinite(loss), torch.isfinite(norm)]).float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    broken = BROKEN * (1 - finite.amin())
    if scale is not None:  # a gradient that overflowed alone, under a factor that can still fall
        curable = finite[0] * (scale > 1)
        broken = broken - (BROKEN - SCALED) * curable * (1 - finite[1])
    return broken.to(torch.uint8)


def _on_its_way(verdict: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The verdict on the CPU, and the event after which it is there; does not wait for it."""
    if verdict.device.type != "cuda":
        return verdict, None
    value = torch.empty((), dtype=verdict.dtype, pin_memory=True).copy_(verdict, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return value, copied


def _running_statistics(model: nn.Module) -> Callable[[Tensor], None]:
    """A function that puts the statistics of batch norms back as they are now, where its argument is False.

    A forward pass that is not finite poisons them for ever: training would go on with the statistics of
    its batches and every later validation would be NaN. The argument, a bool scalar, stays on the device.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    groups: dict[torch.dtype, list[Tensor]] = {}
    for norm in norms:
        for buffer in norm.buffers(recurse=False):
            groups.setdefault(buffer.dtype, []).append(buffer)
    kept = {kind: _joined(buffers) for kind, buffers in groups.items()}
    return partial(_restore, groups, kept)


def _restore(groups: dict[torch.dtype, list[Tensor]], kept: dict[torch.dtype, Tensor], finite: Tensor) -> None:
    """Give the buffers the values that were kept, where `finite` is False; a few kernels whatever their number."""
    for kind, buffers in groups.items():
        chosen = torch.where(finite, _joined(buffers), kept[kind])
        parts = chosen.split([buffer.numel() for buffer in buffers])
        LISTS._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    """The values of all tensors in one row; a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _too_many(verdict: Verdict, in_a_row: int) -> str:
    """The message where the last step that may be skipped was skipped."""
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in verdict.losses.items())
    return (
        f"step {verdict.step}: loss or gradient not finite in {in_a_row} steps in a row. On this worker: {values}, "
        f"gradient norm {float(verdict.norm):.4g}, images {', '.join(verdict.names)}. "
        "Look at these images, lower optim.lr, lengthen optim.warmup_steps or set optim.clip_norm"
    )


@dataclass
class Meter:
    """Means between two log lines. Every worker feeds its own and calls `read` at the same steps."""

    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """By the names of the losses: sums over the counted steps of the losses, the gradient norm and 1, float [T + 2]."""
    steps: int = 0
    """Steps added, skipped ones too."""
    images: int = 0
    """Images of this worker in all steps."""
    wait: float = 0.0
    """Seconds spent waiting for data."""
    seconds: float = 0.0
    """Seconds of all steps."""
    lr: float = 0.0
    """Learning rate of the newest step."""
    phases: list[Phases] = field(default_factory=list)
    """The phases of all steps."""

    def add(self, result: StepResult) -> None:
        """Count a step; does not wait for the device. Skipped ones count in time and images only."""
        self.steps += 1
        self.images += result.images
        self.wait += result.wait
        self.seconds += result.seconds
        self.lr = result.lr
        if result.phases is not None:
            self.phases.append(result.phases)
        names = tuple(result.losses)
        losses = torch.stack(list(result.losses.values()))
        values = torch.cat([losses, result.grad_norm.to(losses)[None], torch.ones_like(losses[:1])])
        values = torch.where(result.finite, values, 0.0)
        self.sums[names] = values + self.sums[names] if names in self.sums else values

    def forget_times(self) -> None:
        """Count the losses of the steps so far, but not their times."""
        self.steps = self.images = 0
        self.wait = self.seconds = 0.0
        self.phases.clear()

    def split(self) -> dict[str, float]:
        """Seconds of this worker's step since the last `read`: means of `data_wait_seconds`, `forward_seconds`, ...

        Waits for the device where it has not done the last step yet. Empty where no time counts.
        """
        if not self.steps:
            return {}
        means = {f"{phase}_seconds": seconds for phase, seconds in mean_seconds(self.phases).items()}
        return {"data_wait_seconds": self.wait / self.steps, **means}

    def read(self) -> dict[str, float]:
        """Means over steps and workers since the last call, and start again; waits for the device once.

        Returns:
            `loss/<term>`, `grad_norm`, `lr`, `images_per_second` (of all workers), `step_seconds` and
            `data_wait` (the share of the time, 0 to 1). Losses are absent when every step was skipped.
        """
        workers = world_size()
        values: dict[str, float] = {}
        sums: dict[str, float] = {}
        counted = 0.0
        for names, total in self.sums.items():
            if workers > 1:
                torch.distributed.all_reduce(total)
            *terms, norm, made = total.tolist()
            counted += made
            for name, term in zip([*(f"loss/{name}" for name in names), "grad_norm"], [*terms, norm], strict=True):
                sums[name] = sums.get(name, 0.0) + term
        if counted:
            values.update({name: value / counted for name, value in sums.items()})
        values["lr"] = self.lr
        if self.steps:
            values["images_per_second"] = workers * self.images / max(self.seconds, 1e-9)
            values["step_seconds"] = self.seconds / self.steps
            values["data_wait"] = self.wait / max(self.seconds, 1e-9)
        self.__init__()
        return values
