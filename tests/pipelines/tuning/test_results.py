"""Results of a sweep."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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
