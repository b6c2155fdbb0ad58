"""Memory of a training step: whether the largest batch fits, and a batch in parts where it does not.

The parts of a batch go through the network one after another and their gradients are added up, so the images of an
update and the learning rate stay as they are. Batch norms in training see the images of a part.

Shapes: B images of a micro-batch, H x W the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from panoptic.distributed import alone, one_of
from panoptic.segmentation import Frame, Targets
from panoptic.training.config import Engine
from panoptic.training.device import autocast, to_device

Batch = tuple[Tensor, Targets]

SEGMENTS = 24
"""Segments of each image of `largest_batch`."""


class StepDoesNotFit(MemoryError):
    """Memory ran out in the forward or backward pass of a step, which has changed nothing."""

    def __init__(self, step: int, images: int, size: tuple[int, int], names: tuple[str, ...]) -> None:
        """An error of the iteration `step`, from 0, with `images` images of a canvas `size` (height, width) at once."""
        super().__init__(step, images, size, names)
        self.step, self.images = step, images

    def __str__(self) -> str:
        step, images, (height, width), names = self.args
        return (
            f"step {step}: {images} images of {height}x{width} at once do not fit the memory "
            f"({', '.join(names)}); --train.micro-batch {max(1, images // 2)} takes fewer, "
            "--train.fit-memory True as few as it needs"
        )


ALLOCATION = 2
"""Code of an `AcceleratorError` where memory could not be had: cudaErrorMemoryAllocation, and the same of HIP."""

UNTYPED = ("can't allocate memory", "out of memory")
"""Words, in lower case, of errors about memory that have neither type nor code.

PyTorch's CPU allocator raises a bare RuntimeError ("DefaultCPUAllocator: can't allocate memory"), and so do CUDA's
driver, Triton, Apple's devices and NCCL (a DistBackendError for whatever happens): "... out of memory".
"""


def allocation_failed(error: BaseException) -> bool:
    """True if memory could not be had, for Python, NumPy or PyTorch."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):  # CUDA outside of PyTorch's allocator: pinned memory, say
        return getattr(error, "error_code", None) == ALLOCATION
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in UNTYPED)


def next_parts(images: int, parts: int) -> int | None:
    """The next larger number of equal parts of a micro-batch of `images`; None where a part is one image."""
    return next((n for n in range(parts + 1, images + 1) if images % n == 0), None)


def in_parts(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in equal parts of consecutive images, on the same canvas."""
    if parts == 1:
        yield batch
        return
    images, targets = batch
    size = len(images) // parts
    for k in range(0, len(images), size):
        here = slice(k, k + size)
        frame = Frame(targets.frame.canvas, targets.frame.sizes[here], targets.frame.output_sizes[here])
        segments, labels, crowd = targets.segments[here], targets.labels[here], targets.crowd[here]
        features = targets.features and {name: maps[here] for name, maps in targets.features.items()}
        countable = None if targets.countable is None else targets.countable[here]
        yield images[here], Targets(segments, labels, crowd, frame, targets.names[here], features, countable)


def largest_batch(images: int, size: tuple[int, int], classes: int, divisor: int = 1) -> Batch:
    """A batch of noise that takes as much memory as a training's largest.

    Args:
        images: B.
        size: largest height and width, rounded up to the divisor.
        classes: of the model; every image has `SEGMENTS` segments, which are stripes, of all classes in turn.
        divisor: of the model's canvas.
    """
    height, width = (-(-side // divisor) * divisor for side in size)
    segments = torch.arange(width).mul(SEGMENTS).div(width, rounding_mode="floor").add(1)
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=noise)
    labels = torch.arange(SEGMENTS).remainder(classes).expand(images, -1).clone()
    return pixels, Targets(
        segments.to(torch.int32).expand(images, height, -1).clone(),
        labels,
        torch.zeros_like(labels, dtype=torch.bool),
        Frame.full(pixels),
        tuple(f"largest {k}" for k in range(images)),
    )


def fits(model: nn.Module, batch: Batch, engine: Engine, parts: int = 1, extra: int = 0) -> bool:
    """True if forward and backward of the first part of a batch find memory; the model stays as it was.

    It asks no other worker, so synchronised norms take their running statistics meanwhile.

    Args:
        model: not wrapped, in training mode.
        batch: on any device.
        parts: in which the batch would be taken.
        extra: bytes that the training needs besides, those of an optimiser that has made no step yet.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    asking = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    for norm in asking:
        norm.eval()
    held = None
    try:
        images, targets = to_device(model, *next(in_parts(batch, parts)), engine)
        held = torch.empty(extra, dtype=torch.uint8, device=images.device)
        with alone(), autocast(images, engine), one_of(parts):
            losses, _ = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        fit = True
    except Exception as error:
        if not allocation_failed(error):
            raise
        fit = False
    finally:
        del held
        for parameter in model.parameters():
            parameter.grad = None
        for norm in asking:
            norm.train()
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    torch.cuda.empty_cache()  # does nothing on a CPU
    return fit
