"""`train.fit_memory`: steps of as many images at once as memory holds, whatever the options say.

Before the first step every worker tries the largest batch; where it does not fit, with activations that are computed
again (`panoptic.training.recomputing`), which changes no number, then in parts. All workers do what the one with the
least memory needs. A step that meets the end of memory later is taken again so, from the weights before it. With
several workers that would leave the others waiting for its gradients: there the workers start again from the last
checkpoint, with fewer images at once (`attempts`).

Without the option the largest batch is tried on a GPU alone, and what it takes is only told: it costs less than a step,
and the end of memory is an error there, where on a CPU the kernel would end the worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from panoptic.distributed import world_size
from panoptic.training.memory import Batch, StepDoesNotFit, fits, largest_batch, next_parts
from panoptic.training.recomputing import recompute_blocks, recomputes
from panoptic.training.step import StepResult
from panoptic.transforms import Augment
from pipelines.training.broken import Recent
from pipelines.training.checkpoints import optimiser_slots
from pipelines.training.failures import OutOfMemory
from pipelines.training.peak_memory import peak_line, reset_peak
from pipelines.training.state import State


def try_largest(state: State) -> tuple[int, str]:
    """Try the largest batch before the first step; all workers call it, in training mode.

    Returns:
        the parts in which micro-batches are taken, and what this worker found in a line; 1 and "" where nothing was
        tried: without `train.fit_memory` on a CPU, or from features, where most of the network does not run.

    Raises:
        OutOfMemory: with `train.fit_memory`, not even one image fits.
    """
    fit = state.experiment.train.fit_memory
    if not fit and (state.device.type != "cuda" or state.job.features is not None):
        return 1, ""
    batch, extra = _largest(state)
    images, (height, width) = len(batch[0]), batch[1].frame.canvas
    if fit:
        parts = parts_that_fit(state, batch, extra)
        again = ", activations computed again" if recomputes(state.model) else ""
        return parts, (
            f"train.fit_memory: {images // parts} images of {height}x{width} at once, at most "
            f"{peak_line(state.device)}; {parts} parts{again}"
        )
    largest = f"the largest batch, {images} images of {height}x{width} at once"
    if _fits_all(state, batch, 1, extra):
        return 1, f"{largest}, takes at most {peak_line(state.device)}"
    return 1, (
        f"{largest}, does not fit the memory, and a step that meets such a one will end; --train.micro-batch "
        f"{max(1, images // 2)} takes fewer, --train.fit-memory True as few as it needs"
    )


def _largest(state: State) -> tuple[Batch, int]:
    """The largest micro-batch of the training, and the bytes that its optimiser has still to take."""
    options, data = state.experiment.train, state.job.train
    images = options.batch // state.world // state.accumulation
    size = largest_size(state.experiment.augment, (data.maximum_height, data.maximum_width))
    trained = sum(parameter.nbytes for parameter in state.model.parameters() if parameter.requires_grad)
    extra = 0 if state.optimiser.state else optimiser_slots(state.experiment.optim) * trained
    return largest_batch(images, size, len(data.categories.ids), state.model.divisor), extra


def parts_that_fit(state: State, batch: Batch, extra: int) -> int:
    """The parts of a micro-batch that fit the memory of every worker; all workers call it, in training mode.

    Args:
        state: of the worker.
        batch: the largest.
        extra: bytes that the training needs besides.

    Raises:
        OutOfMemory: not even one image does.
    """
    images, parts = len(batch[0]), 1
    while not _fits_all(state, batch, parts, extra):
        if _recompute(state):
            continue
        more = next_parts(images, parts)
        if more is None:
            height, width = batch[1].frame.canvas
            raise OutOfMemory(
                f"train.fit_memory: not even one image of {height}x{width} fits the memory of a worker; make images "
                "smaller (augment.crop), or choose a smaller model or fewer workers on a machine"
            )
        parts = more
    return parts


def largest_size(augment: Augment, image: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width of a training batch.

    Args:
        augment: the training view.
        image: largest height and width of the data set's images.
    """
    for size in (augment.crop, augment.size):
        if all(size):
            return size
    low, high = min(image), max(image)
    if any(augment.fit):
        low, high = augment.fit
    elif augment.scale == "short":
        low = max(augment.sides)
        high = min(augment.longest, math.ceil(low * max(image) / min(image)))
    elif augment.scale == "factor":
        low, high = (math.ceil(side * augment.factors[1]) for side in (low, high))
    elif augment.scale in ("jitter", "ratio"):
        low = high = math.ceil(max(augment.target) * augment.factors[1])
    high = max(low, high)
    return high, high  # a batch may hold an upright image beside a wide one


def _fits_all(state: State, batch: Batch, parts: int, extra: int) -> bool:
    """True if a batch in parts fits the memory of every worker; the peak is that of this attempt."""
    reset_peak(state.device)
    fit = fits(state.model, batch, state.experiment.engine, parts, extra)
    if world_size() == 1:
        return fit
    verdict = torch.tensor(int(fit), device=state.device)
    torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN)
    return bool(verdict)


def fitting_step(step: Callable[..., StepResult], batches: Recent, state: State) -> StepResult:
    """A step, taken again in more parts as long as it does not fit the memory of this one worker.

    Args:
        step: takes it, with `accumulation` micro-batches.
        batches: from which it takes them.
        state: of the worker.

    Raises:
        StepDoesNotFit: no more parts are allowed or possible.
    """
    while True:
        try:
            return step(accumulation=state.accumulation * batches.parts)
        except StepDoesNotFit as error:
            if state.world > 1 or not state.experiment.train.fit_memory:
                raise
            parts = batches.parts if _recompute(state) else next_parts(error.images * batches.parts, batches.parts)
            if parts is None:
                raise
        # only here is the memory of the error's frames free
        torch.cuda.empty_cache()
        told = f"{parts} parts of each micro-batch" if parts != batches.parts else "activations are computed again"
        batches.again(parts)
        print(f"step {state.step}: memory ran out; from here on {told}", flush=True)


def _recompute(state: State) -> bool:
    """Let the model compute its activations again; False where it does already, or has no blocks."""
    compiled = state.experiment.train.compile  # a compiled graph decides by itself what is kept
    return not compiled and not recomputes(state.model) and recompute_blocks(state.model) > 0
