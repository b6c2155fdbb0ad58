"""One training step, without a framework around it, and the means that are logged of many.

Ray Train's loop and a plain `for` call the same function. A step is a whole global batch: with W workers and A
micro-batches of b images each, W * A * b images, one update.

Torch is seeded from (seed, step, micro-batch, rank) before every micro-batch, so that a run that is continued draws
what it would have drawn and no generator state needs saving.

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from panoptic.distributed import world_size
from panoptic.segmentation import Targets
from panoptic.training.device import Engine, autocast, seed_torch, to_device, unwrap
from panoptic.training.optim import Optim, learning_rate_factor, set_learning_rate

ONE_VALUE = "Expected more than 1 value per channel"
"""The beginning of torch's message where a batch norm has nothing to take a variance of."""


@dataclass
class SkipCounter:
    """The updates that were skipped because something was not finite; outlives the steps."""

    skipped: int = 0
    """All of them."""
    in_a_row: int = 0
    """Skipped updates since the last one that was made."""


@dataclass(frozen=True)
class StepResult:
    """Losses, rate and times of one step.

    Losses and gradient norm stay on the device: `Meter` reads them when they are logged.
    """

    losses: dict[str, Tensor]
    """Scalars of this worker, means over its micro-batches, with their sum as `total`."""
    grad_norm: Tensor
    """The norm of the whole gradient before clipping, over all workers."""
    lr: float
    """The learning rate of this step, before the factor of each parameter group."""
    skipped: bool
    """The update was left out, because a loss or the gradient was not finite."""
    images: int
    """This worker's images."""
    wait: float
    """Seconds spent waiting for data."""
    seconds: float
    """Seconds of the whole step, waiting included."""


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


def _take(source: Iterator[tuple[Tensor, Targets]], step: int, micro: int, accumulation: int) -> tuple[Tensor, Targets]:
    """The next micro-batch."""
    batch = next(source, None)
    if batch is None:
        raise ValueError(f"train_step: the data ended at step {step} after {micro} of {accumulation} micro-batches")
    return batch


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of all terms."""
    return torch.stack(list(losses.values())).sum()


def _backward(
    model: nn.Module, images: Tensor, targets: Targets, engine: Engine, accumulation: int, last: bool
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; returns its share of the losses, detached.

    Backward runs whatever the loss is, because the other workers wait for this one's gradients. Gradients are exchanged
    with the last micro-batch only.
    """
    images, targets = to_device(model, images, targets, engine)
    alone = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
        try:
            with autocast(images, engine):
                losses, _ = model(images, targets)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise ValueError(_too_few_values(images, targets)) from error
        loss = total(losses) / accumulation
        loss.backward()
    return {name: value.detach() / accumulation for name, value in losses.items()} | {"total": loss.detach()}


def _too_few_values(images: Tensor, targets: Targets) -> str:
    """The message where a batch norm meets a map of one pixel of one image."""
    size = "x".join(map(str, images.shape[-2:]))
    return (
        f"{', '.join(targets.names)}: a batch norm in training needs more than one value of each channel, and "
        f"{len(images)} image of {size} pixels leaves one at the smallest map. Give a worker two images at least at a "
        "time (larger train.batch or train.micro_batch, fewer train.workers), a larger augment.crop, or a norm without "
        "statistics of the batch (model.norm group, say)"
    )


def _all_finite(loss: Tensor, norm: Tensor) -> bool:
    """Loss and gradient are finite on every worker. The one point at which a step waits for the GPU.

    The reduced gradient, which all workers share, does not show a loss that is not finite where its gradient is zero.
    Workers that disagree about an update would drift apart for ever, so they ask each other.
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
    health: SkipCounter, engine: Engine, step: int, names: list[str], losses: dict[str, Tensor], norm: Tensor
) -> None:
    """Count a skipped update, and stop the run at the last one that it may skip."""
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
    """Sums over the counted steps."""
    grad_norm: Tensor | None = None
    """The sum over the counted steps."""
    steps: int = 0
    """All steps."""
    counted: int = 0
    """Steps whose update was made."""
    images: int = 0
    """This worker's images in all steps."""
    wait: float = 0.0
    """Seconds spent waiting for data."""
    seconds: float = 0.0
    """Seconds of all steps."""
    lr: float = 0.0
    """The newest step's."""

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
