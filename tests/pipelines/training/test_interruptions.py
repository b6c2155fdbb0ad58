"""Trainings that are interrupted in all ways, which end as the one that nothing happened to. All are slow.

Weights, average, optimiser and history are compared bit for bit, in float32 on CPU with the same workers, with
batch norm, dropout, averaged weights and colour augmentation: each interruption goes on from a checkpoint between
validations.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipelines.training.checkpoints import newest_step
from tests.support.training_runs import check_consistent, check_equal, descendants, history, wait_for

if TYPE_CHECKING:
    from pipelines.training.driver import Outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]

OPTIONS = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --augment.colour ssd --resize.short 96 --optim.warmup-steps 4
--optim.ema 0.9 --engine.precision float32 --train.deterministic True --train.batch 4 --train.workers 2
--train.log-every 1 --train.steps 36 --train.validate-every 18 --train.overlays 1 --train.checkpoint-every 4
--train.keep 1
"""
STEPS, EVERY, BATCH = 36, 18, 4


@pytest.fixture(scope="module")
def places(scenes16: Path, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return ["--storage", str(folder), "--data.root", str(scenes16), "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]


@pytest.fixture(scope="module")
def run(ray_cluster: None, places: list[str]) -> Callable[..., Outcome]:
    """`run("name", "--option", "value")` trains a tiny model in this session's Ray."""
    from jobs import train

    def start(name: str, *options: str) -> Outcome:
        return train.main(["demo", *places, *OPTIONS.split(), "--name", name, *options])

    return start


@pytest.fixture(scope="module")
def whole(run: Callable[..., Outcome]) -> Outcome:
    """The training that nothing happened to."""
    return run("whole")


def check_as_whole(outcome: Outcome, whole: Outcome) -> None:
    """The same weights, average, optimiser and position; each step once in one MLflow run, with the same figures."""
    check_equal(outcome.folder, whole.folder, STEPS)
    check_consistent(outcome, STEPS, EVERY, BATCH)
    for key in ("train/loss/total", "train/grad_norm", "train/lr", "val/pq", "val/loss/total"):
        np.testing.assert_equal(history(outcome, key), history(whole, key))


def processes(name: str, root: int) -> set[int]:
    return {pid for pid, command in descendants(root).items() if name in command}


class Interruptions(threading.Thread):
    """Does one thing after the other to the processes of a run, each when its training has come to a step."""

    def __init__(self, folder: Path, *things: tuple[int, str, int], root: int | None = None) -> None:
        """Begin.

        Args:
            folder: of the run.
            things: step that is committed, part of the process's command line, signal.
            root: process from which the others come.
        """
        super().__init__(daemon=True)
        self.done: list[tuple[str, int]] = []
        """Processes and the newest checkpoint when they got their signal."""
        self._folder, self._things, self._root = folder, things, root or os.getpid()
        self.start()

    def run(self) -> None:
        for step, name, number in self._things:

            def ready(step: int = step, name: str = name) -> set[int]:
                return processes(name, self._root) if newest_step(str(self._folder)) >= step else set()

            found = wait_for(ready, 200)
            if not found:
                return
            os.kill(max(found), number)
            self.done.append((name, newest_step(str(self._folder))))


def test_workers_and_controllers_that_go_cost_nothing_but_time(
    run: Callable[..., Outcome], whole: Outcome, places: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """SIGTERM of a worker is a notice: no failure, and nothing is repeated. SIGKILL of a worker and of the controller
    are two failures of the two that are allowed."""
    things = [
        (4, "RayTrainWorker", signal.SIGTERM),
        (12, "RayTrainWorker", signal.SIGKILL),
        (20, "TrainController", signal.SIGKILL),
    ]
    interruptions = Interruptions(Path(places[1]) / "often", *things)
    with caplog.at_level(logging.WARNING, "pipelines.training.attempts"):
        outcome = run("often", "--train.max-failures", "2")
    told = [entry.getMessage() for entry in caplog.records if entry.name == "pipelines.training.attempts"]
    assert len(interruptions.done) == 3, (interruptions.done, told)
    assert "on notice (SIGTERM)" in told[0] or "notice of another worker" in told[0]
    assert (
        "failure" not in told[0] and "(failure 1, of 2" in told[1] and "(failure 2, of 2" in told[2] and len(told) == 3
    )
    check_as_whole(outcome, whole)


def test_a_continued_run_is_the_uninterrupted_one(run: Callable[..., Outcome], whole: Outcome) -> None:
    """Half of it, and the same command again: one MLflow run, and its model only at the end."""
    first = run("halves", "--train.stop-after", str(EVERY))
    assert first.model == "" and len(history(first, "train/loss/total")) == EVERY
    second = run("halves")
    assert second.run.run_id == first.run.run_id != whole.run.run_id
    check_as_whole(second, whole)
