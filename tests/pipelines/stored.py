"""A stored model that was never trained, and an actor that dies: for tests of evaluation and prediction."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluate import Task, counter

OPTIONS = {"train.validation_batch": 2}


def write_model(folder: Path, categories: Any, seed: int = 0) -> str:
    """A checkpoint folder of a tiny Panoptic-DeepLab with random weights."""
    import torch

    from panoptic import checkpoint
    from tests.panoptic.models.small import SMALL_DEEPLAB

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = SMALL_DEEPLAB.build(categories)
    checkpoint.save(str(folder / "checkpoint.pt"), config=SMALL_DEEPLAB, model=model, experiment=OPTIONS)
    return str(folder)


def mortal(task: Task, marker: str) -> Callable[[Sequence[int]], Any]:
    """As `counter`, but the first process that is asked for row 2 is killed over it."""
    work = counter(task)

    def until_killed(rows: Sequence[int]) -> Any:
        if 2 in rows and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(rows)

    return until_killed


def unbuildable() -> Callable[[int], int]:
    """Kills the process that sets up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def deadly(poison: Any) -> Callable[[Any], Any]:
    """Gives items back; the process that is asked for `poison` is killed over it, each time."""

    def work(item: Any) -> Any:
        if item == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work
