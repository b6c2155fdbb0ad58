"""Weights for what a study freezes, where none can be had: trained on the drawn scenes, once, and kept.

The backbone alone learns through the semantic loss of its preset's model, whatever heads a row has, so that all
studies of a preset share a backbone. Where other parts are frozen too, the row's whole model learns through all its
losses, at the preset's rate (its backbone from ImageNet weights, where the preset has them), and the study's rows start
from that checkpoint. Run and file are named by everything
that changes them.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from typing import Any, Literal

import torch

from panoptic.backbones import imagenet
from panoptic.training import checkpoint as checkpoints
from pipelines.cluster import storage
from pipelines.config import Data, Experiment, Scenes, flatten, override
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.checkpoints import load_checkpoint
from pipelines.training.driver import train
from pipelines.training.preflight import FREE, FREE_GROUPS

Kind = Literal["backbone", "model"]
"""The part of a pretrained model that is kept."""

SEMANTIC_ONLY: dict[str, dict[str, Any]] = {
    "PanopticDeepLabConfig": {"model.centre_weight": 0.0, "model.offset_weight": 0.0},
    "JSISNetConfig": {"model.branches": "semantic"},
    "PanopticFPNConfig": {"model.instance_weight": 0.0},
}
"""Options by architecture that leave only its semantic loss; other architectures keep all their losses."""

ANY_SIZE: dict[str, dict[str, Any]] = {"PanopticDeepLabConfig": {"model.image_pool": None}}
"""Options by architecture that let it take the crops of the scenes."""

ELSEWHERE = ("name", "storage", "train.steps")
"""Options that do not change what is learnt, or are part of the name themselves."""


def pretraining(experiment: Experiment, base: Experiment, kind: Kind, steps: int) -> Experiment:
    """The run on the scenes that gives an experiment its weights: with nothing frozen, as the demo trains.

    Args:
        experiment: of a row of a study.
        base: the row's preset with the options that hold for all rows.
        kind: what is to be kept.
        steps: of this run.
    """
    scenes = demo()
    given = experiment.model.backbone
    weights = given.weights if kind == "model" and given.weights in imagenet.NAMES else "none"
    backbone = replace(given, freeze=0, weights=weights)
    model = base.model if kind == "backbone" else experiment.model
    optim, most = base.optim, steps // 10
    warmups = {name: min(getattr(optim, name), most) for name in ("warmup_steps", "backbone_warmup_steps")}
    own = {"steps": steps, "validate_every": steps, "overlays": 0, "workers": 1, "seed": 0}
    changed = replace(
        scenes,
        model=replace(model, backbone=backbone),  # type: ignore[type-var]
        storage=storage.absolute(experiment.storage),
        data=Data(root="scenes", scenes=Scenes()),
        tracking=replace(experiment.tracking, register="", alias=""),
        optim=scenes.optim if kind == "backbone" else replace(optim, milestones=(), **warmups),
        train=replace(scenes.train, **own, threads=experiment.train.threads),
    )
    architecture = type(model).__name__
    losses = SEMANTIC_ONLY.get(architecture, {}) if kind == "backbone" else {}
    changed = override(changed, {**ANY_SIZE.get(architecture, {}), **losses})
    return replace(changed, name=f"pretrained-{kind}-{backbone.name}-{steps}-{digest(changed)}")


def digest(experiment: Experiment) -> str:
    """A hash of every option that changes what a run learns; not of machinery, threads, storage, tracking."""
    free = (*FREE, *ELSEWHERE)
    options = {p: v for p, v in flatten(experiment).items() if p not in free and not p.startswith(FREE_GROUPS)}
    return hashlib.sha256(repr((type(experiment.model).__name__, sorted(options.items()))).encode()).hexdigest()[:8]


def pretrained(experiment: Experiment, base: Experiment, kind: Kind, steps: int) -> dict[str, str]:
    """The option that starts a row from weights of `pretraining`; these are trained where they are not there yet.

    Returns:
        `{"model.backbone.weights": URI}` or `{"train.weights": URI}`.
    """
    run = pretraining(experiment, base, kind, steps)
    file = storage.join(run.storage, "pretrained", f"{run.name}.pt")
    if not storage.exists(file):
        begins = "" if run.model.backbone.weights == "none" else ", from ImageNet weights"
        print(
            f"no weights were given: training {run.model.backbone.name} on drawn scenes, {steps} steps{begins}",
            flush=True,
        )
        record = load_checkpoint(train(run, "pretraining").checkpoint)
        buffer = io.BytesIO()
        if kind == "backbone":
            torch.save(checkpoints.build_model(record).get_submodule("backbone").state_dict(), buffer)
        else:
            torch.save(record, buffer)
        storage.write_bytes(file, buffer.getvalue())
    return {"model.backbone.weights" if kind == "backbone" else "train.weights": file}
