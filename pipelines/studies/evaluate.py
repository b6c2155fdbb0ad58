"""Metrics that no validation has: AP, recall of proposals, models evaluated under other options or merged."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from panoptic.evaluation.tally import Measures
from panoptic.metrics.report import metrics
from panoptic.training import plain
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Pool
from pipelines.cluster.json_file import read_json
from pipelines.config import Experiment, override
from pipelines.evaluation.evaluate import assign, evaluate, load
from pipelines.evaluation.merge_branches import merge, save
from pipelines.studies import STUDIES
from pipelines.studies.plan import PlannedTrial
from pipelines.studies.study import METRICS
from pipelines.training.driver import prepare_data
from pipelines.training.failures import describe
from pipelines.training.worker import load_checkpoint

COSTLY = ("AP", "AP50", "recall", "FPS")
"""Columns that need an evaluation of their own, since training does not count them."""


Uris = Mapping[tuple[str, int, int], str]
"""URIs of last checkpoints by study, row and seed; "" where there is none."""


@dataclass(frozen=True)
class RowResult:
    """The metrics of one row of a study under one seed."""

    entry: PlannedTrial
    """The row and the seed."""
    training: str
    """Key of the training; equal for rows that are evaluations of one."""
    values: Mapping[str, float]
    """Metrics by name; none where the training did not come to its end or the model could not be evaluated."""
    reason: str = ""
    """Why it could not be evaluated."""


def evaluate_row(result: RowResult, uris: Uris, base: Experiment, folder: str) -> RowResult:
    """The result with the metrics that its study asks for beyond those of its validation; without any where that fails.

    Args:
        result: of the training.
        uris: of the last checkpoints.
        base: names the data.
        folder: of the sweep.
    """
    try:
        return _evaluate_row(result, uris, base, folder)
    except Exception as error:  # whatever a model, its data or an actor dies of: the other rows have their figures
        return replace(result, values={}, reason=f"not evaluated: {describe(error)}; --resume evaluates it again")


def _evaluate_row(result: RowResult, uris: Uris, base: Experiment, folder: str) -> RowResult:
    """The result of `evaluate_row`, whose errors are not caught here."""
    entry, values = result.entry, dict(result.values)
    study, uri = STUDIES[entry.study], uris[entry.study, entry.row, entry.seed]
    row = study.rows[entry.row]
    if not uri:
        return result
    if row.evaluate_with or row.true is not None or set(study.columns) & set(COSTLY):
        values |= evaluate_checkpoint(uri, row.evaluate_with, base, folder, row.true or ())
    if entry.row in study.merged:
        semantic, instances = (uris[entry.study, row, entry.seed] for row in study.merged)
        values[METRICS["PQ"]] = merged_pq(semantic, instances, base, folder)
    return replace(result, values=values)


def evaluate_checkpoint(
    checkpoint: str, changes: Mapping[str, Any], base: Experiment, folder: str, true: tuple[str, ...] = ()
) -> dict[str, float]:
    """The metrics of a trained model on the validation split.

    Args:
        checkpoint: URI.
        changes: options of the model, by their path in an experiment, that do not change its weights' shapes.
        base: names the data.
        folder: where a checkpoint with these options is kept.
        true: outputs of the network that the truth takes the place of.
    """
    uri = with_options(checkpoint, changes, folder) if changes else checkpoint
    task = assign(uri, prepare_data(base)[1], base, measures=Measures(instances=True, true=true, losses=False))
    return metrics(evaluate(task, Pool(actors=-1 if _gpus() else 0)).evaluation)


def merged_pq(semantic: str, instances: str, base: Experiment, folder: str) -> float:
    """PQ of two models of JSIS-Net, each trained on one branch alone, merged as one; NaN where one is missing.

    Args:
        semantic: URI of the checkpoint with the semantic branch; "" = none.
        instances: the same with the instance branch.
        base: names the data.
        folder: where the merged model and its figure are kept.
    """
    if not (semantic and instances):
        return math.nan
    digest = hashlib.sha256(repr((semantic, instances)).encode()).hexdigest()[:12]
    figure = storage.join(folder, "evaluated", f"merged-{digest}.json")
    if not storage.exists(figure):
        uri = save(merge(load(semantic), load(instances)), storage.join(folder, "evaluated", f"merged-{digest}.pt"))
        quality = evaluate_checkpoint(uri, {}, base, folder)["val/pq"]
        storage.write_bytes(figure, json.dumps(quality).encode())
    return read_json(figure, float, "remove it, and it is counted again")


@dataclass(frozen=True)
class ModelOptions:
    """Gives a model's options the paths that they have in an experiment."""

    model: Any


def with_options(checkpoint: str, changes: Mapping[str, Any], folder: str) -> str:
    """URI of a copy of a checkpoint whose model has other options."""
    digest = hashlib.sha256(repr((checkpoint, sorted(changes.items()))).encode()).hexdigest()[:12]
    uri = storage.join(folder, "evaluated", f"{digest}.pt")
    if not storage.exists(uri):
        record = load_checkpoint(checkpoint)
        model = override(ModelOptions(plain.read_config(record["config"])), changes).model
        buffer = io.BytesIO()
        torch.save({**record, "optimiser": None, "config": plain.to_plain(model)}, buffer)
        storage.write_bytes(uri, buffer.getvalue())
    return uri


def _gpus() -> bool:
    """True if the cluster has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0
