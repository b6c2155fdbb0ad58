"""Trainings of tests: their processes, their checkpoints and what MLflow holds of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tracking import client as client_module

if TYPE_CHECKING:
    import torch

    from pipelines.training.driver import Outcome

ROOT = Path(__file__).resolve().parents[2]


def history(outcome: Outcome, key: str) -> list[tuple[int, float]]:
    """A metric of a run: (step, value)."""
    client = client_module.connect(outcome.run.tracking_uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(outcome.run.run_id, key)]


def record(folder: str | Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step in a run's folder."""
    from panoptic.training.checkpoint import load

    file = Path(folder) / f"step_{step:06d}" / "checkpoint.pt"
    return load(str(file), file.parent.name)


def tensors(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, their average and the optimiser's state."""
    averaged = {f"average {name}": value for name, value in (found["ema"] or {}).items()}
    moments = {
        f"optimiser {number} {name}": value
        for number, state in found["optimiser"]["state"].items()
        for name, value in state.items()
    }
    return found["weights"] | averaged | moments


def check_equal(folder: str | Path, other: str | Path, step: int) -> None:
    """The checkpoints of a step in two run folders hold the same, to the last bit."""
    import torch

    found, expected = record(folder, step), record(other, step)
    one, two = tensors(found), tensors(expected)
    assert one.keys() == two.keys() and len(one) > 100
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    for key in ("step", "position", "ema_updates"):
        assert found[key] == expected[key]
    assert found["optimiser"]["param_groups"] == expected["optimiser"]["param_groups"]


def status(outcome: Outcome) -> str:
    """What MLflow says of a run."""
    return client_module.connect(outcome.run.tracking_uri).get_run(outcome.run.run_id).info.status


def check_consistent(outcome: Outcome, steps: int, every: int, batch: int) -> None:
    """Every checkpoint is whole, every step stands in the MLflow run exactly once, and its model is registered.

    Args:
        steps: of the run.
        every: steps between validations.
        batch: images of a step.
    """
    import pytest

    kept = sorted(Path(outcome.folder).glob("step_*"))
    assert kept[-1].name == f"step_{steps:06d}"
    for folder in kept:
        step = int(folder.name.removeprefix("step_"))
        found = record(outcome.folder, step)
        assert (found["step"], found["position"], found["run_id"]) == (step, batch * step, outcome.run.run_id)
        written = json.loads((folder / "metrics.json").read_text())
        assert written or step % every, "no checkpoint between validations takes the place of one"
        if written:
            assert written["val/pq"] == pytest.approx(dict(history(outcome, "val/pq"))[step], abs=0, nan_ok=True)
    assert [step for step, _ in history(outcome, "train/loss/total")] == list(range(1, steps + 1))
    assert [step for step, _ in history(outcome, "val/pq")] == list(range(every, steps + 1, every))
    assert status(outcome) == "FINISHED" and outcome.model.startswith("models:/")


def descendants(root: int) -> dict[int, str]:
    """Process id to command line of everything that a process started, directly or not."""
    parents, commands = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    found, level = {}, {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= {pid: commands[pid] for pid in level if pid in commands}
    return found


def wait_for(ready: Callable[[], Any], seconds: float) -> Any:
    """The first true value of a function; None where there is none in so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    return None


@contextlib.contextmanager
def driver(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """jobs/train.py with a Ray of its own; on leaving, nothing that it started is left."""
    begun: set[int] = set()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "jobs/train.py", "demo", *arguments], cwd=ROOT, stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            begun |= set(descendants(process.pid))
            process.kill()
            process.wait()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in begun), 15)
            for pid in begun:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
