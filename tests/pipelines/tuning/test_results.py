"""Results of a sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking import client
from pipelines.tracking import tracker as tracker_module


def test_the_best_model_is_logged_once_with_its_own_view(monkeypatch, mlflow_template, tmp_path: Path):
    """In the size that its own trial saw images, not the one of the first preset."""
    from pipelines.tracking import model, runs
    from pipelines.tuning import results

    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    parent = runs.start(runs.Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    logged: list[int] = []

    def log_model(run: Any, record: Any, resize: Any, **names: Any) -> str:
        logged.append(resize.short)
        return f"models:/m-{len(logged)}"

    monkeypatch.setattr(model, "log_model", log_model)
    monkeypatch.setattr(results, "load_checkpoint", lambda uri: {"experiment": {"resize.short": 64, "optim.lr": 1.0}})
    assert results.log_best(parent, "a/step_000010", demo()) == "models:/m-1"
    assert results.log_best(parent, "a/step_000010", demo()) == "models:/m-1" and logged == [64]
    assert results.log_best(parent, "b/step_000010", demo()) == "models:/m-2"
    tracker = tracker_module.Tracker(parent)
    for value in (50.0, 40.0):
        tracker.figures({"best/val/pq": value})
    tracker.close()
    run = client.connect(parent.tracking_uri).get_run(parent.run_id)
    assert run.data.tags["best_checkpoint"] == "b/step_000010" and run.data.metrics["best/val/pq"] == 40.0


def test_checkpoints_of_trials_are_models_of_their_own_runs(mlflow_store, tmp_path: Path, capsys) -> None:
    """A trial that was jumped over to another's weights has two folders; one that never began has no run."""
    from pipelines.tracking import runs
    from pipelines.tuning.plan import Plan
    from pipelines.tuning.results import show_checkpoints

    data = runs.DataSet("scenes", "d" * 64, "/data/scenes/val", "val")
    train = runs.DataSet("scenes", "e" * 64, "/data/scenes/train", "train")
    parent = runs.start(runs.Tracking(name="sweep"), tmp_path)
    own = runs.start(runs.Tracking(name="sweep"), tmp_path, data=[train, data])
    tracker = tracker_module.Tracker(own)
    tracker.metrics(10, {"val/pq": 40.0})
    assert tracker.close()
    for part, step in (("trial-a", 10), ("trial-a-2", 20)):
        checkpoint = tmp_path / part / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "metrics.json").write_text(json.dumps({"val/pq": 4.0 * step}))
    (tmp_path / "trial-a" / "run.json").write_text(json.dumps({"run_id": own.run_id}))
    plan = Plan({}, "", str(tmp_path), parent)
    for _ in range(2):
        show_checkpoints(["a", "b"], plan)
    store = client.connect(parent.tracking_uri)
    models = {model.name: model for model in store.search_logged_models([parent.experiment_id])}
    assert models.keys() == {"step_00000010", "step_00000020"}
    assert {model.source_run_id for model in models.values()} == {own.run_id}
    shown = [(m.key, m.value, m.dataset_digest) for m in models["step_00000010"].metrics]
    assert shown == [("val/pq", 40.0, "d" * 36)]
    assert capsys.readouterr().err == ""


def test_a_store_that_is_away_costs_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    from pipelines.tracking import runs
    from pipelines.tuning import results
    from pipelines.tuning.plan import Plan

    def away(run: Any) -> None:
        raise ConnectionError("MLflow does not answer")

    monkeypatch.setattr(results, "validated_on", away)
    for trial in ("a", "b"):
        (tmp_path / f"trial-{trial}").mkdir()
        (tmp_path / f"trial-{trial}" / "run.json").write_text(json.dumps({"run_id": trial}))
    results.show_checkpoints(["a", "b"], Plan({}, "", str(tmp_path), runs.Run("sqlite:///nowhere", "p", "1")))
    assert capsys.readouterr().err.splitlines() == [
        "the checkpoints of trials are not on MLflow's pages (MLflow does not answer)"
    ]
