"""Communication between the workers of one training: their number, means of counts, shared buffers, marks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """A context in which `world_mean` asks no other worker.

    For evaluation: workers have different numbers of batches, so they would wait for each other for ever.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world_mean(count: Tensor) -> Tensor:
    """The mean of a normaliser over all workers, as the references that all-reduce their counts do.

    Args:
        count: a scalar tensor; without a process group, or within `alone`, it comes back as it is. The mean carries no
            gradient.
    """
    if _alone.get() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    total = count.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


_micro_batches: ContextVar[int] = ContextVar("micro_batches", default=1)


@contextmanager
def one_of(count: int) -> Iterator[None]:
    """A context in which the images are one of `count` equal micro-batches of this worker's part of a step."""
    token = _micro_batches.set(count)
    try:
        yield
    finally:
        _micro_batches.reset(token)


def batch_parts() -> int:
    """Number of the equal parts into which a step's batch is cut: micro-batches times workers.

    The losses of the parts are averaged. A loss that is a sum over the images of the batch multiplies by this number,
    so that what is learnt does not depend on how the batch is cut. Within `alone` it is 1: an evaluation has no step.
    """
    return 1 if _alone.get() else _micro_batches.get() * world_size()


def share_buffers(model: nn.Module) -> None:
    """Give every worker the first one's buffers, which are those that a checkpoint holds.

    Call it before a validation that the workers share, or each evaluates a model with running statistics
    of its own. Does nothing without a process group.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def mark(name: str) -> None:
    """Set a mark that the other workers can see, without a collective operation, in which all meet."""
    if world_size() > 1:
        _store().set(name, "1")


def is_marked(name: str) -> bool:
    """True if a worker of the process group has set this mark; a worker alone has no other to hear of."""
    return world_size() > 1 and _store().check([name])


def _store() -> Any:
    """The `Store` in which the workers found each other; torch has no public name for it."""
    return torch.distributed.distributed_c10d._get_default_store()
