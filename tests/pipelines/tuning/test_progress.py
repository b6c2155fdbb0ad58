"""The table of all trials, and their states in MLflow."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.tracking import runs as tracking
from pipelines.tuning import progress
from pipelines.tuning.failures import record_failure
from pipelines.tuning.plan import TrialConfig, run_id
from pipelines.tuning.progress import Display, Progress, TrialResult, line, share_done, table
from tests.support.plans import plan_of, stored_plan, tags_of, tuned

RESULTS = [
    TrialResult("1", "lr=0.1", "finished", 20, 20, 41.0, 42.0),
    TrialResult("2", "lr=1", "failed", 10, 20, 1.0, 1.0, "FloatingPointError: step 9"),
    TrialResult("3", "lr=0.01", "pruned", 10, 20, 30.0, 30.0),
    TrialResult("4", "lr=0.001", "waiting"),
]


def test_the_table_of_trials():
    lines = table(RESULTS).splitlines()
    assert lines[0] == "4 trials: 1 failed, 1 finished, 1 pruned, 1 waiting"
    assert lines[1].split() == ["trial", "state", "step", "PQ", "best"]
    assert lines[2].split() == ["lr=0.1", "finished", "20/20", "41.00", "42.00*"]
    assert lines[4].split()[:3] == ["lr=1", "failed", "10/20"] and lines[4].endswith("FloatingPointError: step 9")
    assert lines[5].split() == ["lr=0.001", "waiting", "-", "-", "-"]
    assert "42.00*" not in table(RESULTS, mode="min") and "1.00*" in table(RESULTS, mode="min")
    many = [TrialResult(str(k), f"lr={k}", "waiting" if k else "running", 1, 2, float(k), float(k)) for k in range(100)]
    short = table(many, most=10).splitlines()
    assert len(short) == 12 and "10 of them" in short[0] and any(line.startswith("lr=0 ") for line in short)


def test_a_log_is_not_flooded():
    log, terminal = Display(False), Display(True)
    for display in (log, terminal):
        assert display.due(0.0, "a")
        display.write("table", 0.0, "a")
    assert not log.due(20.0, "b") and log.due(31.0, "b") and not log.due(599.0, "a") and log.due(600.0, "a")
    assert terminal.due(2.0, "a") and not terminal.due(1.0, "b")


def test_a_terminal_is_drawn_over(capsys):
    display = Display(True)
    display.write("one\ntwo", 0.0, "")
    display.write("one\ntwo", 3.0, "")
    display.write("three", 6.0, "")
    assert capsys.readouterr().out == "one\ntwo\n\x1b[2F\x1b[Jthree\n"


def test_the_result_of_a_trial_of_tune(tmp_path):
    plan = replace(plan_of("optim.lr=loguniform(1e-4,1)"), folder=str(tmp_path))
    last = {"step": 10, "total": 20, "val/pq": 5.0, "done": True}
    analysis = {"objective": {"max": 7.0, "min": -1e9}}
    one = SimpleNamespace(
        trial_id="7", status="TERMINATED", last_result=last, metric_analysis=analysis, config={"optim.lr": 0.5}
    )
    result = progress.result_of(one, plan)
    assert (result.state, result.value, result.best, result.label) == ("pruned", 5.0, 7.0, "lr=0.5") and result.ended
    one.last_result = {**last, "step": 20}
    assert progress.result_of(one, plan).state == "finished"
    one.last_result = {**last, "done": False}  # Tune ends so what ran when it was interrupted
    assert progress.result_of(one, plan).state == "waiting" and not progress.result_of(one, plan).ended
    one.status, one.last_result, one.metric_analysis = "PENDING", None, None
    waiting = progress.result_of(one, plan)
    assert waiting.state == "waiting" and math.isnan(waiting.best) and not waiting.ended
    one.status = "ERROR"
    assert progress.result_of(one, plan).reason == "see its log"
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "7.txt").write_text("ValueError: x")
    assert progress.result_of(one, plan).reason == "ValueError: x"
    assert progress.rows([progress.result_of(one, plan)], "val/pq")[0]["lr"] == 0.5
    assert progress.short_metric("val/pq_things") == "PQ things" and progress.short_metric("val/miou") == "miou"


def test_a_process_that_died_has_its_reason(tmp_path, mlflow_template):
    plan = stored_plan(tmp_path, mlflow_template)
    error = tmp_path / "error.txt"
    error.write_text("Failure # 1\nThe actor died unexpectedly.\n\tpid: 1\nIts node ran out of memory.\n\n")
    shown = Progress(plan)
    shown.on_trial_error(1, [], tuned("ERROR", error_file=str(error)))
    assert progress.result_of(tuned("ERROR"), plan).reason == "Its node ran out of memory."
    assert tags_of(plan, run_id(plan.folder, "7"))["status"] == "FAILED"
    record_failure(plan, TrialConfig("a", "demo", {}, {}), "7", "ValueError: its own")
    shown.on_trial_error(1, [], tuned("ERROR", error_file=str(error)))
    assert tags_of(plan, run_id(plan.folder, "7"))["reason"] == "ValueError: its own"


@pytest.mark.parametrize(
    ("step", "status", "state"), [(10, "KILLED", "pruned at step 10 of 20"), (20, "FINISHED", "finished")]
)
def test_a_trial_that_ended_has_its_state(step: int, status: str, state: str, tmp_path, mlflow_template):
    plan = stored_plan(tmp_path, mlflow_template)
    run = tracking.start(tracking.Tracking(uri=plan.parent.tracking_uri), tmp_path, parent=plan.parent.run_id)
    (tmp_path / "trial-7").mkdir()
    (tmp_path / "trial-7" / "run.json").write_text(json.dumps({"run_id": run.run_id}))
    Progress(plan).on_trial_complete(1, [], tuned("RUNNING", last_result={"step": step, "total": 20}))
    tags = tags_of(plan, run.run_id)
    assert (tags["status"], tags["state"]) == (status, state)


def test_a_table_that_fails_does_not_end_the_sweep(monkeypatch, caplog):
    shown = Progress(plan_of("optim.lr=loguniform(1e-4,1)"))

    def broken(*given: Any) -> None:
        raise OSError("the bucket is away")

    monkeypatch.setattr(progress, "result_of", broken)
    monkeypatch.setattr(progress.concurrency, "find_limiter", lambda parent: None)
    shown.on_step_end(1, [tuned("RUNNING")])
    assert "the table could not be shown (OSError: the bucket is away)" in caplog.text


def test_a_log_says_every_ten_seconds_how_far_the_sweep_has_come(monkeypatch, capsys):
    results = [
        TrialResult("1", "a", "finished", 20, 20),
        TrialResult("2", "b", "pruned", 5, 20),
        TrialResult("3", "c", "running", 10, 20),
        TrialResult("4", "d", "waiting"),
    ]
    assert share_done(results, 5) == 0.5
    assert line(results, 5, 0.0, 60.0) == "trials: 2 of 5 ended, 50% of all steps, 0:01:00 left"
    assert line(results, 5, 0.25, 60.0) == "trials: 2 of 5 ended, 50% of all steps, 0:02:00 left"
    assert line(results[:1], 1, 0.0, 60.0) == "trials: 1 of 1 ended, 100% of all steps"
    assert line(results[3:], 4, 0.0, 60.0) == "trials: 0 of 4 ended, 0% of all steps"
    clock = iter([0.0, 4.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.concurrency, "find_limiter", lambda parent: None)
    shown = Progress(replace(plan_of("optim.lr=loguniform(1e-4,1)"), count=3))
    printed = []
    for step in (0, 0, 5, 5, 10):
        shown.show([tuned("RUNNING", last_result={"step": step, "total": 20})])
        printed.append(capsys.readouterr().out)
    assert "trials: 0 of 3 ended, 0% of all steps" in printed[0] and "1 trials: 1 running" in printed[0]
    assert printed[1] == printed[3] == ""
    assert printed[2] == "trials: 0 of 3 ended, 8% of all steps, 0:02:01 left\n"
    assert printed[4].startswith("trials: 0 of 3 ended, 17% of all steps, 0:01:50 left")


def test_lines_are_cut_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *given, **named: os.terminal_size((10, 5)))
    Display(True).write("123456789012345\nab", 0.0, "")
    assert capsys.readouterr().out == "1234567890\nab\n"
    Display(False).write("123456789012345", 0.0, "")
    assert capsys.readouterr().out == "\n123456789012345\n"


def test_a_table_fits_the_terminal_that_it_is_drawn_over(monkeypatch):
    """The cursor cannot go up beyond the top, and what has scrolled away would be written again and again."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *given, **named: os.terminal_size((80, 12)))
    many = [TrialResult(str(k), f"lr={k}", "running", 1, 2, float(k), float(k)) for k in range(100)]
    assert len(table(many, most=Display(True).most).splitlines()) + 1 == 12
    assert Display(False).most == progress.SHOWN
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *given, **named: os.terminal_size((80, 400)))
    assert Display(True).most == progress.SHOWN


def test_the_limiter_hears_which_trials_tune_started(monkeypatch):
    updates: list[list[str]] = []
    handle = SimpleNamespace(update=SimpleNamespace(remote=updates.append))
    monkeypatch.setattr(progress.concurrency, "find_limiter", lambda parent: handle if parent == "parent" else None)
    shown = Progress(plan_of("optim.lr=loguniform(1e-4,1)"))
    trials = [tuned("RUNNING"), tuned("PENDING"), tuned("TERMINATED")]
    for _ in range(2):
        shown.on_step_end(1, trials)
    trials[0].status = "TERMINATED"
    shown.on_step_end(2, trials)
    assert updates == [["7"], []]
