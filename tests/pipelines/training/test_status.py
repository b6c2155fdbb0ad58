"""The status of a run, from its folder, its lease and MLflow, without any process of it."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs import status as job
from pipelines.cluster import lease, storage
from pipelines.tracking.runs import Run, Tracking
from pipelines.tracking.tracker import Tracker
from pipelines.training import status as status_module
from pipelines.training.status import Status, note_start, status
from tests.support.mlflow_server import MlflowServer
from tests.support.s3_server import ENVIRONMENT, s3_server

GONE = 2**22 + 1
"""A number that no process has."""


def write_run(folder: str, run_id: str = "r" * 32, **options: Any) -> str:
    """A run's record, as its driver writes it."""
    flat = {"train.steps": 100, "train.stop_after": 0, "tracking.uri": "", **options}
    storage.write_bytes(f"{folder}/run.json", json.dumps({"run_id": run_id, "options": flat}).encode())
    return folder


def write_checkpoint(folder: str, step: int, pq: float) -> None:
    values = {"val/pq": pq, "val/pq_things": pq - 10, "val/pq_stuff": pq + 10}
    storage.write_bytes(f"{folder}/step_{step:06d}/metrics.json", json.dumps(values).encode())


def write_lease(folder: str, number: int = 1, **changes: Any) -> None:
    """A lease that a process of another machine renewed this moment, unless changed."""
    now = time.time()
    content = {
        "owner": f"far:{GONE}:x",
        "machine": "far",
        "pid": GONE,
        "since": now,
        "expires": now + 60,
        "released": False,
    }
    storage.write_bytes(f"{folder}/lease/{number:06d}.json", json.dumps(content | changes).encode())


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Step 60 of 100, with two checkpoints of which the older one is the better, started twice."""
    folder = write_run(str(tmp_path / "runs" / "one"))
    write_checkpoint(folder, 30, 40.0)
    write_checkpoint(folder, 60, 35.0)
    for number, step in enumerate((0, 30), 1):
        note_start(folder, step)
        write_lease(folder, number)
    return folder


def of(folder: str, **changes: Any) -> Status:
    given = {"tracking": Tracking(), "stalled_after": 600.0, "files_only": True, **changes}
    return status(folder, **given)


def test_a_run_by_its_files_alone(run: str) -> None:
    found = of(run)
    assert (found.name, found.state, found.step, found.steps) == ("one", "running", 60, 100) and found.well
    assert found.last is not None and (found.last.step, found.last.pq, found.last.pq_stuff) == (60, 35.0, 45.0)
    assert found.best is not None and (found.best.step, found.best.pq) == (30, 40.0)
    assert found.checkpoint is not None and 0 <= time.time() - found.checkpoint.written < 60
    assert found.last.checkpoint == found.checkpoint.folder == f"{run}/step_000060"
    assert (found.starts, found.restarts) == (2, 1) and f"process {GONE} on far" in found.holder
    text = status_module.lines(found)
    assert "step 60 of 100 (60 %)" in text and "best        40.00 at step 30" in text
    assert "1 of the workers, 2 starts of a driver" in text


def test_a_checkpoint_between_validations_has_no_figures(run: str) -> None:
    storage.write_bytes(f"{run}/step_000075/metrics.json", b"{}")
    found = of(run)
    assert found.checkpoint is not None and found.last is not None
    assert (found.step, found.checkpoint.step, found.last.step) == (75, 75, 60)
    assert "checkpoint  step 75" in status_module.lines(found)


def test_the_state_is_told_by_the_lease(run: str) -> None:
    now = time.time()
    own = {"machine": lease._machine(), "pid": os.getpid(), "began": lease._began(os.getpid())}
    states = {
        "another machine renews it": ({}, "running"),
        "another machine is silent": ({"expires": now - 1}, "dead"),
        "a process of this machine lives, whatever it renewed": ({**own, "expires": now - 999}, "running"),
        "one of this machine is gone": ({**own, "pid": GONE}, "dead"),
        "given back before the end": ({"released": True, "expires": now}, "ended"),
    }
    for what, (changes, state) in states.items():
        write_lease(run, 2, **changes)
        assert of(run).state == state, what
        assert of(run).well is (state == "running"), what


def test_a_run_without_progress_is_stalled(run: str) -> None:
    """Its driver lives, but the last checkpoint, log line and start lie too far back."""
    long_ago = time.time() - 3600
    write_lease(run, 2, since=long_ago)
    for path in Path(run).glob("step_*/metrics.json"):
        os.utime(path, (long_ago, long_ago))
    assert of(run).state == "stalled" and not of(run).well
    assert of(run, stalled_after=7200.0).state == "running"
    record = {"key": "train/images_per_second", "value": 8.0, "step": 70, "timestamp": int(time.time() * 1000)}
    storage.write_bytes(f"{run}/mlflow-{'r' * 32}.jsonl", (json.dumps(record) + "\n").encode())
    found = of(run)
    assert (found.state, found.step) == ("running", 70), "a log line that waits for MLflow is progress"
    assert found.speed == {"images_per_second": 8.0} and found.undelivered


def test_ends_are_told_apart(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lease(run, 2, released=True)
    ends = {"FINISHED": "stopped", "FAILED": "failed", "KILLED": "killed", "RUNNING": "ended"}
    for known, state in ends.items():
        monkeypatch.setattr(
            status_module, "_of_mlflow", lambda *_, known=known: (known, -1, (status_module.Told(), {}), None)
        )
        assert of(run, files_only=False).state == state
    write_checkpoint(run, 100, 50.0)
    assert of(run).state == "finished" and of(run).well
    write_lease(run, 2, expires=time.time() - 1)
    assert of(run).state == "finished", "the machine was lost after the last step"


def test_a_trial_of_a_sweep_has_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(str(tmp_path / "sweep" / "trial"))
    write_checkpoint(folder, 30, 40.0)
    monkeypatch.setattr(status_module, "_of_mlflow", lambda *_: ("RUNNING", -1, (status_module.Told(), {}), None))
    assert of(folder, files_only=False).state == "running"


def test_a_driver_that_has_not_opened_its_run_prepares(tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    write_lease(folder)
    assert of(folder).state == "preparing" and of(folder).well


def test_figures_come_from_mlflow(run: str) -> None:
    server = MlflowServer()
    uri = server.uri
    try:
        write_run(run, server.run_id)
        tracker = Tracker(Run(uri, server.run_id, "0"))
        for step, speed in ((20, 3.0), (80, 4.0)):
            values = {"images_per_second": speed, "data_wait": 0.25, "step_seconds": 2.0, "loss/total": 1.0}
            tracker.metrics(step, {f"train/{name}": value for name, value in values.items()})
        tracker.metrics(80, {"val/pq": 55.0, "val/pq_things": 50.0})
        assert tracker.close()
        found = of(run, files_only=False, tracking=Tracking(uri=uri))
    finally:
        server.stop()
    assert (found.mlflow, found.step, found.state) == ("RUNNING", 80, "running")
    assert found.speed == {"images_per_second": 4.0, "data_wait": 0.25, "step_seconds": 2.0}
    assert found.last is not None and (found.last.step, found.last.pq, found.last.checkpoint) == (80, 55.0, "")
    assert math.isnan(found.last.pq_stuff)
    assert found.seconds_left == 40.0 and time.time() - found.told < 60
    assert "4.0 images/s, data wait 25 %, 2.000 s a step" in status_module.lines(found)
    assert "0:00:40 of steps" in status_module.lines(found)
    away = of(run, files_only=False, tracking=Tracking(uri=uri))
    assert (
        away.step == 60 and away.state == "running" and "does not tell" in away.mlflow and math.isnan(away.seconds_left)
    )


def test_the_store_of_a_run_is_not_made(run: str) -> None:
    found = of(run, files_only=False)
    assert found.mlflow.startswith("no store at ") and not list(Path(run).parent.glob("mlflow.db*"))


def test_a_run_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": endpoint}.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        folder = write_run("s3://bucket/runs/one")
        write_checkpoint(folder, 30, 40.0)
        write_lease(folder)
        note_start(folder, 0)
        found = of(folder)
        assert (found.state, found.step, found.restarts) == ("running", 30, 0)
        with pytest.raises(ValueError, match=r"^s3://bucket/runs/two: no run there; s3://bucket/runs has one$"):
            of("s3://bucket/runs/two")


def test_the_job_prints_json_and_tells_by_its_exit_code(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(Path(run).parent)
    job.main(["one", "--storage", base, "--json", "--files-only"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["state"] == "running" and printed["well"] is True and printed["last"]["pq"] == 35.0
    assert printed["seconds_left"] is None, "NaN is no JSON"
    write_lease(run, 2, expires=time.time() - 1)
    with pytest.raises(SystemExit) as end:
        job.main([run, "--files-only"])
    assert end.value.code == 1 and "dead, step 60 of 100" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"^{base}/other: no run there; {base} has one$"):
        job.main(["other", "--storage", base, "--files-only"])


def test_starts_are_numbered_and_a_store_that_errs_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    from pipelines.training import worker

    state: Any = SimpleNamespace(job=SimpleNamespace(folder=str(tmp_path)), step=7)
    worker._note_start(state)
    worker._note_start(state)
    starts = [json.loads((tmp_path / "starts" / f"00000{n}.json").read_text())["step"] for n in (1, 2)]
    assert starts == [7, 7]

    def fail(*_: Any) -> None:
        raise OSError("away")

    monkeypatch.setattr(worker, "note_start", fail)
    worker._note_start(state)
    assert "this start is not written down (away)" in caplog.text
