"""Models and plots on the pages of a run: entries of its checkpoints, metrics of models, curves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.tracking.client import connect
from pipelines.tracking.curves import draw, log_curves
from pipelines.tracking.models_of_run import Kept, link_metrics, log_checkpoints, validated_on
from pipelines.tracking.runs import DataSet, Run, Tracking, start
from pipelines.tracking.tracker import Tracker

DATA = DataSet("scenes", "d" * 64, "/data/scenes/val", "val")


@pytest.fixture
def run(mlflow_store: str, tmp_path: Path) -> Run:
    """A run with two validations, the second without a checkpoint of its own yet."""
    run = start(Tracking(name="one"), tmp_path, data=[DATA])
    tracker = Tracker(run)
    for step, quality in ((10, 40.0), (20, 50.0)):
        tracker.metrics(step, {"val/pq": quality, "train/lr": 0.1, "train/loss/total": 1 / step})
    assert tracker.close()
    return run


def test_checkpoints_are_models_with_their_metrics_and_data(run: Run) -> None:
    client = connect(run.tracking_uri)
    kept = [Kept("/runs/one/step_000010", 10, {"val/pq": 40.0}), Kept("/runs/one/step_000020", 20, {"val/pq": 50.0})]
    ids = log_checkpoints(run, kept, DATA)
    assert log_checkpoints(run, kept, DATA) == ids
    found = {model.name: model for model in client.search_logged_models([run.experiment_id])}
    assert found.keys() == {"step_000010", "step_000020"}
    for checkpoint in kept:
        model = found[checkpoint.uri.rsplit("/", 1)[-1]]
        assert (model.source_run_id, str(model.status), model.model_id) == (run.run_id, "READY", ids[checkpoint.uri])
        assert model.tags["checkpoint"] == model.params["checkpoint"] == checkpoint.uri
        source = client.get_run(run.run_id).data.tags["mlflow.source.name"]
        assert model.tags["mlflow.source.name"] == source and model.tags["mlflow.source.type"] == "LOCAL"
        assert [(m.key, m.value, m.step, m.dataset_name, m.dataset_digest) for m in model.metrics] == [
            ("val/pq", checkpoint.metrics["val/pq"], checkpoint.step, "scenes", "d" * 36)
        ]
    # the points of the run's curve are still the same
    history = client.get_metric_history(run.run_id, "val/pq")
    assert [(metric.step, metric.value) for metric in history] == [(10, 40.0), (20, 50.0)]
    log_checkpoints(run, kept[1:], DATA)
    assert [model.name for model in client.search_logged_models([run.experiment_id])] == ["step_000020"]


def test_the_data_of_a_validation_is_found_again(run: Run, tmp_path: Path) -> None:
    assert validated_on(run) == DataSet("scenes", "d" * 36, "/data/scenes/val", "val")
    assert validated_on(start(Tracking(name="one"), tmp_path)) is None


def test_metrics_of_many_classes_take_one_question(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server far away would be asked for minutes otherwise; every metric is the point that the run has already."""
    from mlflow import MlflowClient

    values = {f"val/class/{number}/pq": float(number) for number in range(100)}
    tracker = Tracker(run)
    tracker.metrics(30, values)
    assert tracker.close()
    asked: list[str] = []
    history = MlflowClient.get_metric_history
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *given: asked.append(given[2]) or history(*given))
    ids = log_checkpoints(run, [Kept("/runs/one/step_000030", 30, values)], DATA)
    assert len(asked) == 1
    client = connect(run.tracking_uri)
    linked = client.get_logged_model(ids["/runs/one/step_000030"]).metrics
    assert {metric.key: metric.value for metric in linked} == values
    for name in ("val/class/0/pq", "val/class/99/pq"):
        assert len(history(client, run.run_id, name)) == 1


def test_a_logged_model_has_the_metrics_of_its_checkpoint(run: Run) -> None:
    client = connect(run.tracking_uri)
    model = client.create_logged_model(run.experiment_id, "model", run.run_id)
    for _ in range(2):
        link_metrics(run, f"models:/{model.model_id}", 20, {"val/pq": 50.0}, DATA)
    (metric,) = client.get_logged_model(model.model_id).metrics
    assert (metric.key, metric.value, metric.step, metric.dataset_name) == ("val/pq", 50.0, 20, "scenes")
    log_checkpoints(run, [], DATA)  # which deletes none that has files
    assert [found.name for found in client.search_logged_models([run.experiment_id])] == ["model"]


def test_curves_are_drawn_into_the_run(run: Run) -> None:
    assert log_curves(run) == ["plots/learning_rate.png", "plots/losses.png", "plots/validation.png"]
    listed = [file.path for file in connect(run.tracking_uri).list_artifacts(run.run_id, "plots")]
    assert listed == ["plots/learning_rate.png", "plots/losses.png", "plots/validation.png"]


def test_a_picture_of_curves_differs_where_they_do() -> None:
    flat, steep = ({"train/loss/a": [(k, rate**k) for k in range(20)]} for rate in (1.0, 0.5))
    first, second = (cv2.imdecode(np.frombuffer(draw("losses", c), np.uint8), 1) for c in (flat, steep))
    assert first.shape == second.shape == (450, 800, 3)
    assert np.mean((first != second).any(2)) > 0.005
