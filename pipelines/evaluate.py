"""Judging a stored model on a prepared split: the figures that its training run printed.

The images run through `judge` exactly as in a validation while training: the same view, the same
batches, counts added in the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from panoptic import checkpoint as checkpoints
from panoptic.checkpoint import check_categories
from panoptic.evaluation import judge, summarise
from panoptic.metrics.report import Evaluation
from panoptic.models.interface import PanopticModel
from pipelines.config import Experiment, override
from pipelines.manifest import Manifest
from pipelines.worker import load_checkpoint, validation_batches


@dataclass(frozen=True)
class Stored:
    """A model and the options that it was judged with while it was trained."""

    model: PanopticModel
    options: dict[str, Any]
    """Flat: of the experiment that trained it."""


def load(uri: str, tracking_uri: str = "") -> Stored:
    """A model from a checkpoint (folder or file, local or s3://) or from MLflow (models:/name@alias, runs:/id/model).

    Raises:
        ValueError: nothing is there, or it is no model of this project.
    """
    if uri.startswith(("models:/", "runs:/")):
        from pipelines import mlflow_model

        packaged = mlflow_model.load_packaged(uri, tracking_uri)
        return Stored(packaged.model, dict(packaged.experiment))
    record = load_checkpoint(uri)
    return Stored(checkpoints.build_model(record), dict(record["experiment"]))


def options_of(stored: Stored, base: Experiment) -> Experiment:
    """`base` with the evaluation view, precision and batch that the stored model was judged with."""
    wanted = ("resize.", "engine.", "train.validation_batch")
    return override(base, {path: value for path, value in stored.options.items() if path.startswith(wanted)})


def evaluate(stored: Stored, manifest: Manifest, experiment: Experiment) -> Evaluation:
    """Every image of the split once, in this process (on a GPU when there is one).

    Raises:
        ValueError: the classes of model and data differ.
    """
    model = stored.model
    check_categories(model.categories, manifest.categories)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if experiment.engine.channels_last else torch.preserve_format
    model = model.to(device=device, memory_format=memory).eval()  # type: ignore[call-overload]
    return summarise(
        [judge(model, validation_batches(manifest, experiment, model.divisor), experiment.engine)], manifest.categories
    )
