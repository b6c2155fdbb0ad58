"""Communication between the workers of one training: their number, means of counts, shared buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
