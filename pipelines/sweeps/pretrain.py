"""Weights for what a study freezes, where none can be had: trained on the drawn scenes, once, and kept.

The backbone alone learns through the semantic loss of its model; where other parts are frozen too, the whole model
learns through all its losses, and the study's rows start from that checkpoint.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import Any, Literal

import torch

from panoptic import checkpoint as checkpoints
from pipelines import storage
from pipelines.config import Data, Experiment, Scenes, override
from pipelines.presets.deeplab import demo
from pipelines.train import train
from pipelines.worker import load_checkpoint

SEMANTIC_ONLY: dict[str, dict[str, Any]] = {
    "PanopticDeepLabConfig": {"model.centre_weight": 0.0, "model.offset_weight": 0.0},
    "JSISNetConfig": {"model.branches": "semantic"},
    "PanopticFPNConfig": {"model.instance_weight": 0.0},
}
"""By architecture, what leaves its semantic loss alone; others keep all their losses."""


def pretraining(experiment: Experiment, kind: Literal["backbone", "model"], steps: int) -> Experiment:
    """The run on the scenes that gives an experiment its weights: its model, with nothing frozen, as the demo trains.

    Args:
        experiment: of a row of a study.
        kind: what is to be kept.
        steps: of this run.
    """
    base = demo()
    trunk = replace(experiment.model.backbone, freeze=0, weights="none")
    changed = replace(
        base,
        model=replace(experiment.model, backbone=trunk),  # type: ignore[type-var]
        storage=experiment.storage,
        data=Data(root="scenes", scenes=Scenes()),
        tracking=replace(experiment.tracking, register="", alias=""),
        optim=base.optim if kind == "backbone" else replace(experiment.optim, milestones=()),
        train=replace(base.train, steps=steps, validate_every=steps, overlays=0, workers=1, seed=0),
    )
    changed = replace(changed, train=replace(changed.train, threads=experiment.train.threads))
    if kind == "backbone":
        changed = override(changed, SEMANTIC_ONLY.get(type(experiment.model).__name__, {}))
    digest = hashlib.sha256(repr((trunk if kind == "backbone" else changed.model, kind)).encode()).hexdigest()[:8]
    return replace(changed, name=f"pretrained-{kind}-{trunk.name}-{steps}-{digest}")


def pretrained(experiment: Experiment, kind: Literal["backbone", "model"], steps: int) -> dict[str, str]:
    """The option that starts a row from those weights; they are trained where they are not there yet.

    Returns:
        `{"model.backbone.weights": URI}` or `{"train.weights": URI}`.
    """
    run = pretraining(experiment, kind, steps)
    file = storage.join(storage.absolute(experiment.storage), "pretrained", f"{run.name}.pt")
    if not storage.exists(file):
        print(f"no weights were given: training {run.model.backbone.name} on drawn scenes, {steps} steps", flush=True)
        record = load_checkpoint(train(run, "pretraining").checkpoint)
        buffer = io.BytesIO()
        if kind == "backbone":
            torch.save(checkpoints.build_model(record).get_submodule("backbone").state_dict(), buffer)
        else:
            torch.save(record, buffer)
        storage.write_bytes(file, buffer.getvalue())
    return {"model.backbone.weights" if kind == "backbone" else "train.weights": file}
