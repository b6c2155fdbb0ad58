"""The pages of a training in MLflow beside its curves, when it ends or stops: its checkpoints as models, and plots."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipelines.cluster.masking import masked
from pipelines.data.manifest import Manifest
from pipelines.tracking.client import first_line
from pipelines.tracking.curves import log_curves
from pipelines.tracking.models_of_run import Kept, link_metrics, log_checkpoints
from pipelines.tracking.provenance import code_version
from pipelines.tracking.runs import DataSet
from pipelines.training.checkpoints import read_metrics
from pipelines.training.state import Job

logger = logging.getLogger(__name__)


def data_set(manifest: Manifest, context: str) -> DataSet:
    """A split as runs, metrics and models name it."""
    return DataSet(PurePosixPath(manifest.uri).parent.name, manifest.hash, manifest.uri, context)


def version_tags(metrics: Mapping[str, float], data: Mapping[str, str], checkpoint: str) -> dict[str, str]:
    """The tags on the page of a registered version: figures, the data of its validation, its checkpoint, its code."""
    figures = {name.upper(): f"{metrics[key]:.2f}" for name in ("pq", "sq", "rq") if (key := f"val/{name}") in metrics}
    commit = {"commit": sent} if (sent := code_version().get("mlflow.source.git.commit")) else {}
    return {**figures, **data, "checkpoint": masked(checkpoint), **commit}


def fill_pages(job: Job, checkpoints: Sequence[str], model: str, step: int, metrics: Mapping[str, float]) -> bool:
    """Entries of the kept checkpoints, metrics of the logged model, plots; False and a warning where one failed.

    The same again changes nothing.

    Args:
        job: of the training.
        checkpoints: URIs of the folders of those that are kept.
        model: MLflow's URI of the logged model, "" where there is none.
        step, metrics: of the checkpoint in it.
    """
    data = data_set(job.val, "val")

    def entries() -> None:
        log_checkpoints(job.run, [kept_checkpoint(uri) for uri in checkpoints], data)

    def linked() -> None:
        if model:
            link_metrics(job.run, model, step, metrics, data)

    done = True
    for name, write in {
        "checkpoints": entries,
        "model's metrics": linked,
        "plots": lambda: log_curves(job.run),
    }.items():
        try:
            write()
        except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: the training is done
            logger.warning("the %s of run %s are not on its pages (%s)", name, job.run.run_id, first_line(error))
            done = False
    return done


def kept_checkpoint(uri: str) -> Kept:
    """A checkpoint's step and metrics, from its folder."""
    step: Any = uri.rstrip("/").rsplit("_", 1)[-1]
    return Kept(uri, int(step), read_metrics(uri))
