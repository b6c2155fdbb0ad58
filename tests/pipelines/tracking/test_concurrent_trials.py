"""Many trials of a sweep write to one SQLite store at the same time."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.support import concurrent_trials

TRIALS, KEYS, SECONDS = 8, 6, 4.0


@pytest.mark.slow  # a process that imports MLflow, and eight that write for seconds
@pytest.mark.timeout(180)
def test_eight_trials_on_one_sqlite_file_lose_nothing(mlflow_template: Path, tmp_path: Path) -> None:
    """Every metric of every step is there once, and no call of a training waits for the others' writes."""
    database = tmp_path / "mlflow.db"
    shutil.copy(mlflow_template, database)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([concurrent_trials.__name__])
    with ProcessPoolExecutor(TRIALS, context) as pool:
        tasks = [
            pool.submit(concurrent_trials.write, f"sqlite:///{database}", tmp_path, f"trial{k}", SECONDS, KEYS)
            for k in range(TRIALS)
        ]
        trials = [task.result(timeout=150) for task in tasks]
    with sqlite3.connect(database) as store:
        rows = store.execute("select run_uuid, key, step, value from metrics where key like 'train/%'").fetchall()
        ends = dict(store.execute("select run_uuid, status from runs"))
        tags = dict(store.execute("select run_uuid, value from tags where key = 'reached'"))
    expected = {
        (trial.run_id, f"train/{k}", step, step + k / 10)
        for trial in trials
        for k in range(KEYS)
        for step in range(trial.steps)
    }
    assert len({trial.run_id for trial in trials}) == TRIALS and len(rows) == len(expected)
    assert {row[:3] for row in rows} == {row[:3] for row in expected}
    values = {row[:3]: row[3] for row in expected}
    assert all(abs(value - values[run, key, step]) < 1e-9 for run, key, step, value in rows)
    assert set(ends.values()) == {"FINISHED"} and len(tags) == TRIALS
    for trial in trials:
        assert trial.delivered and trial.steps > 20, trial
        assert tags[trial.run_id] == str((trial.steps - 1) // 50 * 50)
        assert trial.median < 0.01, trial  # one call waits for the others' processes at most, on two cores
        assert "database is locked" not in trial.told, trial.told
