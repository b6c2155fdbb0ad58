"""What the driver hands to a worker."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import Experiment
from pipelines.data.manifest import Manifest
from pipelines.tracking.runs import Run


@dataclass(frozen=True)
class Job:
    """What the driver hands to each worker."""

    experiment: Experiment
    train: Manifest
    val: Manifest
    run: Run
    folder: str
    """Of the run: spooled metrics go there when it is local."""
    gpu: bool
    begin: str = ""
    """URI of another run's checkpoint whose training this one takes over, with its own options."""
    quiet: bool = False
    """Lines go to log.txt in `folder` instead of the console, where many runs would mix."""


def accumulation(batch: int, workers: int, micro_batch: int) -> int:
    """Micro-batches of a worker in one step: the fewest that are equal and hold at most `micro_batch` images.

    Raises:
        ValueError: the global batch cannot be shared out equally.
    """
    if batch % workers:
        raise ValueError(f"train.batch {batch} cannot be shared by {workers} workers; choose a multiple of {workers}")
    share = batch // workers
    return next(n for n in range(1, share + 1) if share % n == 0 and (not micro_batch or share // n <= micro_batch))
