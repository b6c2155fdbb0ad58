"""A trial's writes to MLflow, in a process of its own beside others that write to the same store."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow  # before the processes part, so that one alone pays for it
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import numpy as np

from pipelines.tracking import client, tracker
from pipelines.tracking.runs import Tracking, ending, start


@dataclass(frozen=True)
class Written:
    """What one trial wrote."""

    run_id: str
    steps: int
    delivered: bool
    """Nothing was left when the tracker closed."""
    median: float
    """Seconds of a step's calls."""
    told: str
    """Everything that was logged."""


def write(uri: str, folder: Path, name: str, seconds: float, keys: int) -> Written:
    """A run that writes so many metrics every 20 ms, each sent within 50 ms, and a tag and a picture now and then."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    client.logger.addHandler(handler)
    tracker.INTERVAL = 0.05  # type: ignore[misc]
    step, picture, calls = 0, np.zeros((8, 8, 3), np.uint8), []
    run = start(Tracking(uri=uri, name=name), folder)
    with ending(run):
        writing = tracker.Tracker(run, folder / name)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            writing.metrics(step, {f"train/{k}": step + k / 10 for k in range(keys)})
            if step % 50 == 0:
                writing.tags({"reached": str(step)})
                writing.image(step, "a", picture)
            calls.append(time.monotonic() - begin)
            step += 1
            time.sleep(0.02)
        delivered = writing.close()
    return Written(run.run_id, step, delivered, statistics.median(calls), "\n".join(told))
