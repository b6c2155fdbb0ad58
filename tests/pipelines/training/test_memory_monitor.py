"""Ray's own memory monitor kills a training's processes for real, its controller and Ray Data's actors among them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from ray._private.utils import get_system_memory, get_used_memory

from pipelines.tracking import client as client_module
from tests.pipelines.training.test_driver import TINY, last_kept
from tests.support.training_runs import driver, wait_for

GIB = 2**30

ROOM = 4 * GIB
"""Memory that a tiny training on one worker finds before the monitor kills: it takes some two."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]


def test_a_training_goes_on_after_the_memory_monitor_has_killed_it(
    scenes16: Path, mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was killed: one failure, told as such, every step once, one MLflow run."""
    total, before = get_system_memory(), get_used_memory()
    if total - before < ROOM + 2 * GIB:
        pytest.skip(f"{(total - before) / GIB:.1f} GiB of memory are free, and this takes {ROOM / GIB + 2:.0f}")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(before + ROOM) / total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    steps, log, folder = 200, tmp_path / "log", tmp_path / "starved"
    arguments = ["--storage", str(tmp_path), "--data.root", str(scenes16), "--tracking.uri", store, "--name", "starved"]
    arguments += [*TINY.split(), "--train.workers", "1", "--train.batch", "2", "--train.steps", str(steps)]
    arguments += ["--train.validate-every", str(steps), "--train.checkpoint-every", "10"]
    with driver(arguments, log) as process:
        assert wait_for(lambda: last_kept(folder) >= 20 or process.poll() is not None, 300), log.read_text()
        taken: list[bytearray] = []
        while get_used_memory() < before + ROOM + GIB // 2:
            taken.append(bytearray(b"x") * (GIB // 8))
        told = wait_for(lambda: "running low on memory" in log.read_text() or process.poll() is not None, 120)
        taken.clear()
        assert told and process.wait(timeout=500) == 0, log.read_text()
    text = log.read_text()
    (said,) = re.findall(r"^starved: .*", text, re.MULTILINE)[:1]
    assert "killed due to the node running low on memory" in said and "(failure 1, of 2 at the most)" in said
    (reached,) = map(int, re.findall(r"waiting \d+ s for memory; going on from step (\d+)", text))
    assert re.findall(r"continuing at step (\d+)", text) == [str(reached)] and reached >= 20
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    client = client_module.connect(store)
    counted = [metric.step for metric in client.get_metric_history(run_id, "train/loss/total")]
    assert counted == list(range(1, steps + 1)) and client.get_run(run_id).info.status == "FINISHED"
    assert last_kept(folder) == steps
