"""Figures of a study that no validation has: AP, recall of proposals, models that are evaluated under other options."""

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
from pipelines.config import Experiment, override
from pipelines.evaluation.evaluate import assign, evaluate, load
from pipelines.evaluation.merge_branches import merge, save
from pipelines.studies import STUDIES
from pipelines.studies.plan import (
    Planned,
)
from pipelines.studies.study import METRICS
from pipelines.training.driver import prepare_data
from pipelines.training.worker import load_checkpoint
from pipelines.tuning.failures import describe

COSTLY = ("AP", "AP50", "recall")
"""Columns that are counted here and not while training."""


@dataclass(frozen=True)
class Holder:
    """Gives a model's options the paths that they have in an experiment."""

    model: Any


def evaluated(checkpoint: str, changes: Mapping[str, Any], base: Experiment, folder: str) -> dict[str, float]:
    """Metrics of a trained model on the validation split.

    Args:
        checkpoint: URI.
        changes: options of the model, by their path in an experiment, that do not change its weights' shapes.
        base: names the data.
        folder: where a checkpoint with these options is kept.
    """
    uri = with_options(checkpoint, changes, folder) if changes else checkpoint
    task = assign(uri, prepare_data(base)[1], base, measures=Measures(instances=True, losses=False))
    return metrics(evaluate(task, Pool(actors=-1 if _gpus() else 0)).evaluation)


def merged_quality(semantic: str, instances: str, base: Experiment, folder: str) -> float:
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
        quality = evaluated(uri, {}, base, folder)["val/pq"]
        storage.write_bytes(figure, json.dumps(quality).encode())
    return float(json.loads(storage.read_bytes(figure)))


def with_options(checkpoint: str, changes: Mapping[str, Any], folder: str) -> str:
    """URI of a copy of a checkpoint whose model has other options."""
    digest = hashlib.sha256(repr((checkpoint, sorted(changes.items()))).encode()).hexdigest()[:12]
    uri = storage.join(folder, "evaluated", f"{digest}.pt")
    if not storage.exists(uri):
        record = load_checkpoint(checkpoint)
        model = override(Holder(plain.read_config(record["config"])), changes).model
        buffer = io.BytesIO()
        torch.save({**record, "optimiser": None, "config": plain.to_plain(model)}, buffer)
        storage.write_bytes(uri, buffer.getvalue())
    return uri


def _gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


Uris = Mapping[tuple[str, int, int], str]
"""By study, row and seed."""


@dataclass(frozen=True)
class Result:
    """What a row of a study has under one seed."""

    entry: Planned
    training: str
    """Equal for results of one training."""
    values: Mapping[str, float]
    """Metrics, none where it did not come to its end or could not be evaluated."""
    reason: str = ""
    """Why it could not be evaluated."""


def outcome(result: Result, uris: Uris, base: Experiment, folder: str) -> Result:
    """The result with the metrics that its study asks for beyond its own validation; without any where that fails.

    Args:
        result: of the training.
        uris: of the last checkpoints, by study, row and seed; "" where there is none.
        base: names the data.
        folder: of the sweep.
    """
    try:
        return measured(result, uris, base, folder)
    except Exception as error:  # whatever a model, its data or an actor dies of: the other rows have their figures
        return replace(result, values={}, reason=f"not evaluated: {describe(error)}; --resume evaluates it again")


def measured(result: Result, uris: Uris, base: Experiment, folder: str) -> Result:
    """As `outcome`, with its errors."""
    entry, values = result.entry, dict(result.values)
    study, uri = STUDIES[entry.study], uris[entry.study, entry.row, entry.seed]
    changes = study.rows[entry.row].evaluate_with
    if not uri:
        return result
    if changes or set(study.columns) & set(COSTLY):
        values |= evaluated(uri, changes, base, folder)
    if entry.row in study.merged:
        semantic, instances = (uris[entry.study, row, entry.seed] for row in study.merged)
        values[METRICS["PQ"]] = merged_quality(semantic, instances, base, folder)
    return replace(result, values=values)
