"""Attempts at a training: which errors are tried again, what counts, and what is said at the end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.cluster import session
from pipelines.cluster.disk import DiskFull
from pipelines.cluster.exits import FailedRun
from pipelines.config import Train
from pipelines.training import attempts, notice
from pipelines.training.attempts import FAILURE, repeat
from pipelines.training.checkpoints import SNAPSHOT, mend_snapshot, newest_step
from pipelines.training.failures import OutOfMemory
from tests.support.worker_failures import KILLED, MONITORED, MONITORED_CONTROLLER, group_error


class Training:
    """A job whose attempts end as they are told to."""

    def __init__(self, folder: Path, *ends: Any, most: int = 2) -> None:
        """Of each attempt: the steps that it makes, or (steps, error)."""
        self.ends, self.step, self.folder = list(ends), 0, folder
        folder.mkdir()
        experiment = SimpleNamespace(name="x", train=Train(steps=100, max_failures=most))
        self.job: Any = SimpleNamespace(folder=str(folder), experiment=experiment, key="k")

    def fit(self, job: Any) -> Any:
        end = self.ends.pop(0)
        steps, error = end if isinstance(end, tuple) else (end, None)
        self.step += steps
        self._commit()
        if error is not None:
            raise error
        return SimpleNamespace(metrics={"step": self.step}, return_value="SIGTERM" if self.step < 100 else "")

    def _commit(self) -> None:
        name = f"step_{self.step:06d}"
        whole = self.folder / name
        whole.mkdir(exist_ok=True)
        for file in ("checkpoint.pt", "report.txt"):
            (whole / file).write_bytes(b"PK\5\6" + bytes(18))  # an empty archive
        (whole / "metrics.json").write_text("{}")
        content = {"checkpoint_results": [{"checkpoint_dir_name": name}], "latest_checkpoint_result": None}
        content["latest_checkpoint_result"] = content["checkpoint_results"][0]  # type: ignore[assignment,index]
        (self.folder / SNAPSHOT).write_text(json.dumps(content))


def controller_killed() -> ActorDiedError:
    return ActorDiedError()


def taken_back() -> PreemptionError:
    return PreemptionError(PreemptionInfo(None, {"node": [0]}), False)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name == attempts.__name__]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, attempts.__name__)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are left out here."""
    made: list[float] = []
    monkeypatch.setattr(attempts, "time", SimpleNamespace(sleep=made.append))
    return made


def test_failures_of_all_kinds_count_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pauses: list[float]
) -> None:
    errors = [group_error({0: KILLED}), ControllerError(ValueError("no")), controller_killed(), MONITORED_CONTROLLER]
    training = Training(tmp_path / "a", *((10, error) for error in errors), 60, most=4)
    assert repeat(training.fit, training.job).metrics["step"] == 100
    told = messages(caplog)
    assert [line.rsplit("; ", 1)[1] for line in told] == [f"going on from step {step}" for step in (10, 20, 30, 40)]
    assert all(f"(failure {n}, of 4 at the most)" in line for n, line in enumerate(told, 1))
    assert "ControllerError" not in told[1] and "ValueError: no" in told[1]
    assert told[3].startswith("x: OutOfMemoryError: 5 worker(s) were killed") and "\n" not in told[3]
    assert pauses == [0.0, 0.0, 0.0, 4 * attempts.PAUSE] and "waiting 80 s for memory" in told[3]


def test_a_run_gives_up_in_one_line(tmp_path: Path) -> None:
    training = Training(tmp_path / "a", *((10, group_error({0: MONITORED})) for _ in range(3)), most=2)
    with pytest.raises(FailedRun) as told:
        repeat(training.fit, training.job)
    line = str(told.value)
    assert line.startswith("x: OutOfMemoryError: ") and "\n" not in line
    assert "failure 3, and train.max_failures is 2; the same command goes on from step 30" in line
    assert "Traceback" in (tmp_path / "a" / FAILURE).read_text() or "Error" in (tmp_path / "a" / FAILURE).read_text()


def test_notices_are_no_failures_where_the_training_comes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tmp_path / "a", 10, 10, (10, taken_back()), 10, 60, most=0)
    assert repeat(training.fit, training.job).metrics["step"] == 100
    assert len(messages(caplog)) == 4 and not any("failure" in line for line in messages(caplog))
    stuck = Training(tmp_path / "b", 10, 0, 0, most=1)
    with pytest.raises(FailedRun, match=r"x: workers stopped on notice \(SIGTERM\)\. That was failure 2"):
        repeat(stuck.fit, stuck.job)


@pytest.mark.parametrize(
    "error", [ValueError("the options"), ControllerError(DiskFull("full")), ControllerError(OutOfMemory("4 GiB"))]
)
def test_what_another_attempt_would_meet_again_ends_the_run(error: Exception, tmp_path: Path) -> None:
    training = Training(tmp_path / "a", (10, error))
    with pytest.raises(type(error)):
        repeat(training.fit, training.job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_driver_gives_workers_time_for_a_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """They are asked to stop, and the training has its checkpoint before the signal ends the driver."""
    asked = threading.Event()
    monkeypatch.setattr(notice, "ask", lambda key, reason: asked.set())
    training = Training(tmp_path / "a", 10)
    begun = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def fit(job: Any) -> Any:
        begun.set()
        assert asked.wait(20)
        time.sleep(0.3)
        return training.fit(job)

    threading.Thread(target=lambda: begun.wait(20) and os.kill(os.getpid(), number), daemon=True).start()
    expected: Callable[..., Any] = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(expected), session.sigterm_raises():  # type: ignore[call-overload]
        repeat(fit, training.job)
    assert newest_step(training.job.folder) == 10


def test_a_session_whose_raylet_is_gone_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would end the process after seconds, with text of its own: the thread that fits hears of nothing before."""
    raylet = psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(session, "_raylet", raylet)
    training, ended = Training(tmp_path / "run", 40), threading.Event()
    done = training.fit(None)  # a checkpoint is there

    def fit(job: Any) -> Any:
        raylet.kill()
        ended.wait(60)
        return done

    assert not session.is_lost()
    with pytest.raises(FailedRun, match=r"^x: Ray's own process .* has ended.* goes on from step 40$"):
        repeat(fit, training.job)
    ended.set()
    raylet.wait()
    assert session.is_lost()


def test_sigterm_of_a_worker_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        notice.install()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert notice.of_this_worker() == "SIGTERM"
        monkeypatch.setattr(notice.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        assert ended.value.code == 143
        notice.install()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("rank", "first"), [(0, True), (1, True), (1, False)])
def test_one_worker_of_each_node_hears_that_it_is_drained(
    rank: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the head did not answer once; and what the driver asks is asked by rank 0 alone."""
    asked, begun, answers = [], [], iter([ConnectionError(), False, True])
    monkeypatch.setattr(notice, "is_first_of_node", lambda: first)
    monkeypatch.setattr(notice, "asked", lambda key: asked.append(key) or "")
    monkeypatch.setattr(notice, "tell_begun", begun.append)
    monkeypatch.setattr(notice.Listener, "SECONDS", 0.001)
    monkeypatch.setattr(notice.Listener, "NODE_SECONDS", 0.01)

    def is_drained() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(notice, "is_drained", is_drained)
    listener = notice.listen("k", rank)
    if listener is None:
        assert (rank, first) == (1, False)
        return
    listener._thread.join(20)
    assert listener.reason == notice.DRAINED and next(answers, None) is None
    assert set(asked) == ({"k"} if rank == 0 else set()) and begun == (["k"] if rank == 0 else [])


def write_whole(run: Path, step: int, values: dict[str, float]) -> None:
    folder = run / f"step_{step:06d}"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"PK\5\6" + bytes(18))
    (folder / "report.txt").write_text("x")
    (folder / "metrics.json").write_text(json.dumps(values))


def test_a_list_of_checkpoints_that_is_torn_is_written_anew(tmp_path: Path) -> None:
    """In the form that Ray Train reads, ranked; and one that stands for the folder is left as it is."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext
    from ray.train.v2.api.config import CheckpointConfig

    run = tmp_path / "x"
    run.mkdir()
    assert not mend_snapshot(str(run), Train()) and newest_step(str(run)) == -1
    for step, values in ((10, {"val/pq": 30.0}), (20, {"val/pq": 20.0}), (30, {})):
        write_whole(run, step, values)
    for content in ("", '{"checkpoint_results": [{"checkpo'):
        (run / SNAPSHOT).write_text(content)
        assert mend_snapshot(str(run), Train()) and newest_step(str(run)) == 30
    assert not mend_snapshot(str(run), Train())
    config = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="score")
    manager = CheckpointManager(config, StorageContext(str(tmp_path), "x"))
    assert manager.latest_checkpoint_result is not None and manager.latest_checkpoint_result.metrics["step"] == 30
    assert [result.metrics["step"] for result in manager.best_checkpoint_results] == [20, 10]
    write_whole(run, 40, {})  # whole, but the machine was lost before it was committed
    assert mend_snapshot(str(run), Train()) and newest_step(str(run)) == 40
    for file in (run / "step_000010").iterdir():
        file.unlink()
    (run / "step_000010").rmdir()  # by hand
    assert mend_snapshot(str(run), Train()) and "step_000010" not in (run / SNAPSHOT).read_text()
