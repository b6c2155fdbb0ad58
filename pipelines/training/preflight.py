"""Everything that is checked before a training starts, so that it does not fail hours later.

`check_options` needs nothing but the options, `check_model` the classes of the data too, `check_cluster` a Ray session,
`check_continuation` the record of the run that is continued.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import psutil
import torch

from panoptic.backbones import imagenet
from panoptic.evaluation.tally import Batch, evaluate_batches, summarise
from panoptic.metrics.report import metrics
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.device import prepare
from panoptic.training.freezing import freeze_parameters
from panoptic.training.frozen_backbone import learning_parameters, refuse_changing
from panoptic.training.optim import parameter_groups
from pipelines.cluster import disk, session, storage
from pipelines.config import Experiment, Train, least_workers
from pipelines.data.manifest import SCHEMA_VERSION
from pipelines.training.checkpoints import checkpoint_bytes, checkpoint_file, most_at_once, written_bytes
from pipelines.training.sharing import check_alone

logger = logging.getLogger(__name__)

STAND_IN = Categories(("thing", "stuff"), (True, False), (1, 2), ((220, 20, 60), (70, 130, 180)))
"""Classes with which models are built only to look at them."""

DRAWN = 64
"""Side of the image, in pixels, on which a model is tried."""

WORKER_MEMORY = 700 << 20
"""Bytes that a worker's process takes before it has a model: torch, Ray and their libraries (measured)."""

SCHEDULE = re.compile(r"\s*(\d)((?:\s+\d@\d+)*)\s*")
"""A number of stages, then pairs STAGES@STEP."""

FREE = (
    *("train.steps", "train.workers", "train.fit_memory", "train.threads", "train.stop_after", "train.log_every"),
    *("train.keep", "train.score", "train.score_mode", "train.checkpoint_every", "train.checkpoint_minutes"),
    "engine.activation_checkpointing",  # changes no number
    "model.backbone.own_pixels",  # the pixels themselves may not change
)
"""Options that a continued run may change. Any other, outside of the groups below, makes it another experiment."""

FREE_GROUPS = ("feed.", "tracking.", "data.")
"""Groups of options that it may change, except `FIXED`."""

FIXED = (
    *("data.limit", "data.limit_val", "data.limit_seed", "data.balance"),
    *("data.window", "data.cache_features"),
)
"""Options of these groups that choose the images or their order, so that a continued run keeps them."""

ADDED = {
    "data.cache_features": "no",
    **{"data.window": 0, "augment.copies": 0, "augment.originals": True, "augment.stored": "raw"},
    "augment.truncate": False,
    **{"data.limit_val": 0, "data.balance": 0.0, "augment.rotation": 0.0},
    **{"optim.stage_decay": 1.0, "optim.layer_decay": 1.0, "optim.layer_decay_embeddings": False},
    **{"optim.undecayed_layers": 0, "optim.backbone_warmup_steps": 0, "optim.schedule_start": "first_step"},
    "engine.tf32": "convolutions",
    "engine.activation_checkpointing": False,
}
"""Options that runs of earlier versions do not name, with the value that they had."""


def check_options(experiment: Experiment) -> None:
    """Refuse options with which no worker could train.

    Raises:
        ValueError: the batch cannot be shared by the workers, there is no such backbone or other options do not make a
            model, weights are not there, frozen names match nothing, frozen parts have no weights, rates by layers are
            asked of a backbone without any, the backbone's warm-up begins after the last step, options of the data
            exclude each other, or no validation gives `train.score`.
    """
    check_alone(experiment)
    check_weights(experiment)
    model = meta_model(experiment)
    freeze_parameters(model, experiment.train.freeze)
    check_rates(model, experiment)
    check_freezing(experiment)
    check_cache(experiment, model)
    check_score(experiment)


def check_cache(experiment: Experiment, model: torch.nn.Module) -> None:
    """Refuse to cache features of images that will differ from step to step, as far as the options tell.

    Args:
        model: the experiment's, with all that is frozen.

    Raises:
        ValueError: names the option and the remedy.
    """
    options, augment = experiment.train, experiment.augment
    assert isinstance(model, PanopticModel)
    if experiment.data.cache_features == "no" or learning_parameters(model):
        return
    refuse_changing(model, options.frozen_dropout)
    if options.compile:
        raise ValueError("data.cache_features: a compiled network runs its backbone; leave train.compile out")
    if augment.copies and augment.originals:
        raise ValueError(
            f"data.cache_features: the images beside their {augment.copies} copies are augmented anew in every epoch; "
            "keep the copies alone with --augment.originals False"
        )


def check_rates(model: torch.nn.Module, experiment: Experiment) -> None:
    """Refuse rates that cannot be given, or that leave the backbone as it is though it is not frozen.

    Args:
        model: the experiment's, with all that is frozen.

    Raises:
        ValueError: names the option and the remedy.
    """
    optim, steps = experiment.optim, experiment.train.steps
    late = any(group["backbone"] and group["lr_factor"] > 0 for group in parameter_groups(model, optim))
    if late and optim.backbone_warmup_steps and optim.warmup_steps >= steps:
        raise ValueError(
            f"optim.backbone_warmup_steps {optim.backbone_warmup_steps}: the backbone begins to learn after "
            f"optim.warmup_steps {optim.warmup_steps}, which a run of {steps} steps does not reach; lower both, or cut "
            f"a longer run short with --train.stop-after {steps}"
        )


def check_model(experiment: Experiment, categories: Categories) -> None:
    """Refuse classes that the architecture is not made for.

    Raises:
        ValueError: things or stuff are missing where the model needs them; names the numbers of both.
    """
    try:
        meta_model(experiment, categories)
    except ValueError as error:
        there = f"{len(categories.things)} thing and {len(categories.stuff)} stuff classes"
        raise ValueError(f"{error} (the data set has {there})") from error


def check_disk(experiment: Experiment, categories: Categories) -> None:
    """Refuse to begin where the checkpoints will fill the disk. Nothing is checked on S3.

    Raises:
        DiskFull: names the folder, what the checkpoints need and what is free.
    """
    folder, options = storage.join(storage.absolute(experiment.storage), experiment.name), experiment.train
    if disk.free_bytes(folder) is None:
        return
    model = meta_model(experiment, categories)
    freeze_parameters(model, options.freeze)
    one, count = checkpoint_bytes(model, experiment.optim), most_at_once(options)
    what = f"{count} checkpoints of {disk.size(one)} (train.keep {options.keep}, the last one, the next one)"
    disk.check_room(folder, count * one - written_bytes(folder), what)


def check_weights(experiment: Experiment) -> None:
    """Refuse weights that are not there; those that timm has to download are downloaded here, into its cache.

    Raises:
        ValueError: names the option and the file, or what to install.
    """
    backbone = experiment.model.backbone
    if backbone.weights in imagenet.NAMES and imagenet.packaged(backbone.timm_name) is None:
        logger.info("the ImageNet weights of %s: from timm's cache, or downloaded by it", backbone.timm_name)
        imagenet.imagenet_weights(backbone.timm_name)
    elif backbone.weights not in ("none", *imagenet.NAMES) and not storage.exists(backbone.weights):
        raise ValueError(f"model.backbone.weights {backbone.weights}: no such file; give none, imagenet or a file")
    if experiment.train.weights:
        try:
            checkpoint_file(experiment.train.weights)
        except ValueError as error:
            raise ValueError(f"train.weights {error}") from error


def check_score(experiment: Experiment) -> None:
    """Refuse to rank checkpoints by a metric that no validation gives.

    Any but the usual one is looked for in what the model's validation of one drawn image gives.

    Raises:
        ValueError: names near metrics.
    """
    score = experiment.train.score
    if score == Train().score:
        return
    names = list(drawn_validation(experiment))
    if score not in names:
        near = get_close_matches(score, names, 5, 0.4) or names
        raise ValueError(f"train.score {score}: no validation gives this metric; there are {', '.join(near)}")


def drawn_validation(experiment: Experiment) -> dict[str, float]:
    """The metrics of a validation of the untrained model on one drawn image of a thing on stuff."""
    model: PanopticModel = prepare(_untrained(experiment).build(STAND_IN), torch.device("cpu"), experiment.engine)
    segments = np.ones((DRAWN, DRAWN), np.int32)
    segments[: DRAWN // 2, : DRAWN // 2] = 2
    truth = Segmentation(segments, np.array([1, 0]))
    images, targets = collate([Sample(np.zeros((DRAWN, DRAWN, 3), np.uint8), truth, "drawn")], model.divisor)
    tally = evaluate_batches(model.eval(), [Batch(images, targets, [truth], [0])], experiment.engine)
    return metrics(summarise([tally], STAND_IN))


def meta_model(experiment: Experiment, categories: Categories = STAND_IN) -> torch.nn.Module:
    """The experiment's model on torch's meta device, which takes no memory; for two classes where none are given.

    Raises:
        ValueError: the options do not make a model.
    """
    try:
        with torch.device("meta"):
            return _untrained(experiment).build(categories)
    except (RuntimeError, ArithmeticError, TypeError, IndexError, KeyError) as error:  # torch's own, of odd sizes
        raise ValueError(f"the options of model do not make one ({' '.join(str(error).split())[:300]})") from error


def _untrained(experiment: Experiment) -> Any:
    """The configuration of the experiment's model, which downloads nothing when it is built."""
    config = experiment.model
    return replace(config, backbone=replace(config.backbone, weights="none"))  # type: ignore[type-var]


def lacking(experiment: Experiment) -> Literal["", "backbone", "model"]:
    """The part that is frozen though no weights are loaded into it: none (""), the backbone, or more of the model."""
    patterns, backbone = experiment.train.freeze, experiment.model.backbone
    if experiment.train.weights:
        return ""
    frozen: list[str] = []
    if patterns:
        model = meta_model(experiment)
        names = [name for name, _ in model.named_parameters()]
        frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        layer_of = getattr(model.get_submodule("backbone"), "layer_of", lambda inner: 0)
        inner = [name.removeprefix("backbone.") for name in frozen if name.startswith("backbone.")]
        if len(inner) < len(frozen) or any(layer_of(name) is None for name in inner):  # such as a plain ViT's pyramid
            return "model"
    return "backbone" if backbone.weights == "none" and (backbone.freeze or frozen) else ""


def check_freezing(experiment: Experiment) -> None:
    """Refuse to freeze what no weights are loaded into: frozen noise learns nothing and measures nothing.

    Raises:
        ValueError: names the option and the remedies.
    """
    missing = lacking(experiment)
    if not missing:
        return
    backbone, patterns = experiment.model.backbone, " ".join(experiment.train.freeze)
    named = f"train.freeze {patterns}" if patterns else f"model.backbone.freeze {backbone.freeze}"
    thaw = "set --train.freeze to nothing" if patterns else "train everything with --model.backbone.freeze 0"
    weights = "" if missing == "model" else "--model.backbone.weights imagenet (or FILE), or with "
    raise ValueError(
        f"{named}: no weights were loaded into what is frozen, and frozen noise measures nothing. Start with {weights}"
        f"--train.weights CHECKPOINT, or {thaw}"
    )


def parse_schedule(text: Any) -> list[tuple[int, int]]:
    """Steps and the number of backbone stages that are frozen from there on.

    `"5 2@500 0@800"`, five stages at first, two from step 500, none from 800, is [(0, 5), (500, 2), (800, 0)]. A
    number is a schedule of one entry.

    Raises:
        ValueError: the text is no schedule, or its steps do not rise.
    """
    if isinstance(text, int):
        return [(0, text)]
    match = SCHEDULE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r}: write a number of stages, or such as '5 2@500': five at first, two from step 500")
    later = (part.split("@") for part in match[2].split())
    schedule = [(0, int(match[1])), *((int(step), int(stages)) for stages, step in later)]
    if any(a[0] >= b[0] for a, b in itertools.pairwise(schedule)):
        raise ValueError(f"{text!r}: the steps of a schedule of freezing must rise")
    return schedule


def check_machine(experiment: Experiment) -> None:
    """Refuse more workers than this machine has cores or memory for, where a session of our own would start them.

    Nothing is checked where a cluster is joined, which `check_cluster` asks, nor where `train.cpus_per_worker` says how
    the cores are to be shared. Two workers are started on one core, too.

    Raises:
        ValueError: names the workers, what there is, and the remedies.
    """
    options = experiment.train
    if os.environ.get("RAY_ADDRESS") or session.is_connected():
        return
    cores, workers = os.cpu_count() or 1, least_workers(options.workers)
    if workers > max(2, cores) and not options.cpus_per_worker:
        raise ValueError(
            f"--train.workers {workers}: this machine has {cores} cores, and more workers only wait for each other. "
            f"Give --train.workers {cores} (the batch stays {options.batch}: workers share it), or, to share the "
            f"cores all the same, --train.cpus-per-worker {cores / workers:.2g}"
        )
    check_memory(experiment, psutil.virtual_memory().available, "free on this machine")


def check_memory(experiment: Experiment, free: float, where: str) -> None:
    """Refuse workers whose programs and weights alone do not fit into memory.

    Raises:
        ValueError: names what they need and what there is.
    """
    workers = least_workers(experiment.train.workers)
    weights = sum(value.nbytes for value in meta_model(experiment).state_dict().values())
    each = WORKER_MEMORY + weights
    if workers * each > free:
        fitting = int(free // each)
        remedy = f"Give --train.workers {fitting}" if fitting else "End what else runs, or take a smaller model"
        raise ValueError(
            f"--train.workers {workers}: each needs {disk.size(each)} of memory before its first image, and "
            f"{disk.size(int(free))} are {where}. {remedy}"
        )


def check_cluster(experiment: Experiment) -> bool:
    """Refuse a cluster on which workers and data would starve each other; returns whether to train on GPUs.

    A cluster with an autoscaler is given the time that `session.grow` says; to get GPUs that are not there yet, the
    options must say `train.gpu yes`.

    Raises:
        ValueError: names what is needed, what there is, and what to change.
    """
    import ray

    options, least = experiment.train, least_workers(experiment.train.workers)
    gpu = {"GPU": 1.0} if options.gpu == "yes" else {}
    session.grow(options.workers, {"CPU": (options.cpus_per_worker or 1.0) + experiment.feed.reserved_cpus, **gpu})
    resources = ray.cluster_resources()
    if not session.own_folder() and "memory" in resources:
        check_memory(experiment, resources["memory"], "counted by the cluster")
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    if options.gpu == "yes" and gpus < least:
        raise ValueError(
            f"train.gpu yes: {least} workers need {least} GPUs, the cluster has {gpus:g}; lower "
            "train.workers or train on CPU with --train.gpu no"
        )
    own, data = worker_cpus(experiment), experiment.feed.reserved_cpus
    needed = least * (own + data)
    if needed > cpus:
        raise ValueError(
            f"{least} workers need {needed:g} CPUs (each {own:g} for itself and {data:g} for Ray Data), the "
            f"cluster has {cpus:g}; they would wait for each other for ever. Lower train.workers, "
            "train.cpus_per_worker or feed.cpus"
        )
    return gpus >= least and options.gpu != "no"


def worker_cpus(experiment: Experiment) -> float:
    """CPUs that Ray reserves for a worker: those of the options, else one, or half a one on a small cluster."""
    import ray

    if experiment.train.cpus_per_worker:
        return experiment.train.cpus_per_worker
    return 1.0 if ray.cluster_resources().get("CPU", 0) >= 2 * experiment.train.workers else 0.5


def local_cpus(experiment: Experiment) -> int:
    """Logical CPUs of a local session. They only count reservations; Ray Data warns where few are left over.

    Of a range of workers, the least must have room; more of them train where the machine has the cores.
    """
    return max(os.cpu_count() or 1, 2 * least_workers(experiment.train.workers))


def check_continuation(
    before: Mapping[str, Any], options: Mapping[str, Any], hashes: Mapping[str, str], name: str
) -> None:
    """Refuse to continue a run under other options or on other data than it began with.

    Args:
        before: content of the run's `run.json`.
        options: flat, of the experiment that continues it.
        hashes: `train_hash` and `val_hash` of its data.
        name: of the run.

    Raises:
        ValueError: names the options that differ.
    """
    old = ADDED | before["options"]
    fixed = [p for p in options if p in FIXED or (p not in FREE and not p.startswith(FREE_GROUPS))]
    differing = [
        f"{path} was {old.get(path)!r}, is {options[path]!r}" for path in fixed if old.get(path) != options[path]
    ]
    version = before.get("schema_version", 1)
    shards = f", whose shards had schema version {version} while this software reads {SCHEMA_VERSION}"
    differing += [
        f"the data changed ({key}){shards if version != SCHEMA_VERSION else ''}"
        for key in hashes
        if before.get(key) != hashes[key]
    ]
    if differing:
        raise ValueError(
            f"run {name!r} began with other options: {'; '.join(differing)}. Choose another --name for a new run"
        )
