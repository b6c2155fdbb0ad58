"""Models of a run on MLflow's pages: a light entry for each checkpoint that is kept, and the metrics of each model.

A light entry (a "logged model" of MLflow) has no files. It names the checkpoint, its step and the metrics of its
validation, linked to the data that they were measured on, so that checkpoints of many runs can be sorted and compared
on the page "Models". Nothing is written twice: an entry is found again by its name, a metric by its place in the run's
history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from panoptic.metrics.text import metric_name
from pipelines.cluster.masking import masked
from pipelines.tracking.client import answering
from pipelines.tracking.runs import CONTEXT, DIGEST_LENGTH, DataSet, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND = "panoptic checkpoint"
"""MLflow's type of the light entries."""


@dataclass(frozen=True)
class Kept:
    """A checkpoint that a run keeps."""

    uri: str
    """The URI of its folder, whose name the entry has."""
    step: int
    """Updates done."""
    metrics: Mapping[str, float]
    """Metrics of the validation at its step; empty where there was none."""


def log_checkpoints(run: Run, kept: Sequence[Kept], data: DataSet) -> dict[str, str]:
    """An entry for each checkpoint that a run keeps; those of checkpoints that are gone are deleted.

    Args:
        run: of the checkpoints.
        kept: those in its folder now.
        data: on which they were validated.

    Returns:
        the id of the entry of each checkpoint, by URI.

    Raises:
        ConnectionError: the store does not answer.
    """
    with answering(run.tracking_uri) as client:
        entries = _entries(client, run)
        names = {masked(checkpoint.uri).rstrip("/").rsplit("/", 1)[-1] for checkpoint in kept}
        for name in entries.keys() - names:
            client.delete_logged_model(entries[name])
        source = {} if names <= entries.keys() else _source(client, run)
        ids: dict[str, str] = {}
        for checkpoint in kept:
            uri = masked(checkpoint.uri)
            name = uri.rstrip("/").rsplit("/", 1)[-1]
            if name not in entries:
                tags = {"checkpoint": uri, **source}
                params = {"step": str(checkpoint.step), "checkpoint": uri}
                model = client.create_logged_model(run.experiment_id, name, run.run_id, tags, params, KIND)
                _link(client, run, model.model_id, checkpoint.step, checkpoint.metrics, data)
                client.finalize_logged_model(model.model_id, "READY")
                entries[name] = model.model_id
            ids[checkpoint.uri] = entries[name]
        return ids


def _source(client: MlflowClient, run: Run) -> dict[str, str]:
    """The tags of a run that name its command and commit, which the page of a model shows as "Logged from"."""
    tags = client.get_run(run.run_id).data.tags
    return {name: value for name, value in tags.items() if name.startswith("mlflow.source.")}


def validated_on(run: Run) -> DataSet | None:
    """The data that a run recorded for its validations; None where it recorded none.

    Raises:
        ConnectionError: the store does not answer.
    """
    with answering(run.tracking_uri) as client:
        inputs = client.get_run(run.run_id).inputs
    for entry in inputs.dataset_inputs if inputs else ():
        if any(tag.key == CONTEXT and tag.value == "val" for tag in entry.tags):
            data = entry.dataset
            return DataSet(data.name, data.digest, json.loads(data.source)["uri"], "val")
    return None


def link_metrics(run: Run, model_uri: str, step: int, metrics: Mapping[str, float], data: DataSet) -> None:
    """Show metrics of a validation on the page of a model.

    Args:
        run: that logged the model.
        model_uri: "models:/m-…".
        step: of the validation.
        metrics: of it.
        data: that it was made on.

    Raises:
        ConnectionError: the store does not answer.
    """
    with answering(run.tracking_uri) as client:
        _link(client, run, model_uri.rsplit("/", 1)[-1], step, metrics, data)


def _entries(client: MlflowClient, run: Run) -> dict[str, str]:
    """The light entries of a run: id by name."""
    entries: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_logged_models(
            [run.experiment_id], f"source_run_id = '{run.run_id}'", max_results=100, page_token=token
        )
        entries |= {model.name: model.model_id for model in page if model.model_type == KIND}
        token = page.token
        if not token:
            return entries


def _link(client: MlflowClient, run: Run, model: str, step: int, metrics: Mapping[str, float], data: DataSet) -> None:
    """Write metrics of a step again, with the model and the data that they belong to.

    With the timestamp that they have in the run already they are the same points of its curves. The metrics of a
    validation are logged at once, so one of them tells it: a question for each would take minutes with many classes.
    """
    from mlflow.entities import Metric

    own = {"model_id": model, "dataset_name": data.name, "dataset_digest": data.digest[:DIGEST_LENGTH]}
    logged = client.get_run(run.run_id)
    known = [name for name in map(metric_name, metrics) if name in logged.data.metrics]
    histories = (client.get_metric_history(run.run_id, name) for name in known)
    here = ([metric.timestamp for metric in history if metric.step == step] for history in histories)
    timestamp = next((timestamps[-1] for timestamps in here if timestamps), logged.info.start_time)
    points = [
        Metric(metric_name(key), value, timestamp, step, run_id=run.run_id, **own) for key, value in metrics.items()
    ]
    for start in range(0, len(points), 1000):
        client.log_batch(run.run_id, metrics=points[start : start + 1000])
