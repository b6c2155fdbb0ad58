"""Frozen parts need weights: what a run may freeze, and schedules that thaw it while it trains."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from panoptic.segmentation import Categories
from pipelines.config import Experiment

STAND_IN = Categories(("thing", "stuff"), (True, False), (1, 2), ((220, 20, 60), (70, 130, 180)))
"""Classes with which models are built only to look at them."""

SCHEDULE = re.compile(r"\s*(\d)((?:\s+\d@\d+)*)\s*")


def meta_model(experiment: Experiment) -> torch.nn.Module:
    """The experiment's model without memory, for two classes.

    Raises:
        ValueError: the options do not make a model.
    """
    config = experiment.model
    config = replace(config, backbone=replace(config.backbone, weights="none"))  # type: ignore[type-var]
    with torch.device("meta"):
        return config.build(STAND_IN)


def lacking(experiment: Experiment) -> Literal["", "backbone", "model"]:
    """What is frozen though no weights were loaded into it: nothing, the backbone, or other parts of the model."""
    patterns, backbone = experiment.train.freeze, experiment.model.backbone
    if experiment.train.weights:
        return ""
    frozen: list[str] = []
    if patterns:
        names = [name for name, _ in meta_model(experiment).named_parameters()]
        frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if any(not name.startswith("backbone.") for name in frozen):
        return "model"
    return "backbone" if backbone.weights == "none" and (backbone.freeze or frozen) else ""


def check_freezing(experiment: Experiment) -> None:
    """Frozen noise learns nothing and measures nothing.

    Raises:
        ValueError: names the option and the remedies.
    """
    missing = lacking(experiment)
    if not missing:
        return
    backbone, patterns = experiment.model.backbone, " ".join(experiment.train.freeze)
    named = f"train.freeze {patterns}" if patterns else f"model.backbone.freeze {backbone.freeze}"
    thaw = "set --train.freeze to nothing" if patterns else "train everything with --model.backbone.freeze 0"
    weights = "" if missing == "model" else "--model.backbone.weights FILE (or timm, which downloads), or with "
    raise ValueError(
        f"{named}: no weights were loaded into what is frozen, and frozen noise measures nothing. Start with {weights}"
        f"--train.weights CHECKPOINT, or {thaw}"
    )


def parse_schedule(text: Any) -> list[tuple[int, int]]:
    """`"5 2@500 0@800"`, five stages frozen at first, two from step 500, none from 800: [(0, 5), (500, 2), (800, 0)].

    A number is a schedule of one entry.

    Raises:
        ValueError: the text is no schedule, or its steps do not rise.
    """
    if isinstance(text, int):
        return [(0, text)]
    found = SCHEDULE.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r}: write a number of stages, or such as '5 2@500': five at first, two from step 500")
    later = (part.split("@") for part in found[2].split())
    schedule = [(0, int(found[1])), *((int(step), int(stages)) for stages, step in later)]
    if any(a[0] >= b[0] for a, b in itertools.pairwise(schedule)):
        raise ValueError(f"{text!r}: the steps of a schedule of freezing must rise")
    return schedule


FREE = (
    *("train.steps", "train.workers", "train.threads", "train.stop_after", "train.log_every"),
    *("train.keep", "train.score", "train.score_mode"),
)


FREE_GROUPS = ("feed.", "tracking.", "data.")
"""Options that a continued run may change; any other would make it another experiment."""


FIXED = ("data.limit", "data.limit_seed")
"""Those of the free groups that it may not: they choose the images."""


def preflight(experiment: Experiment) -> bool:
    """Refuse a cluster on which workers and data would starve each other; whether to train on GPUs.

    Raises:
        ValueError: names what is needed, what there is, and what to change.
    """
    import ray

    there = ray.cluster_resources()
    options, feed = experiment.train, experiment.feed
    gpus, cpus = there.get("GPU", 0), there.get("CPU", 0)
    if options.gpu == "yes" and gpus < options.workers:
        raise ValueError(
            f"train.gpu yes: {options.workers} workers need {options.workers} GPUs, the cluster has {gpus:g}; lower "
            "train.workers or train on CPU with --train.gpu no"
        )
    own, data = worker_cpus(experiment), feed.tasks * feed.cpus
    needed = options.workers * (own + data)
    if needed > cpus:
        raise ValueError(
            f"{options.workers} workers need {needed:g} CPUs (each {own:g} for itself and {data:g} for Ray Data), the "
            f"cluster has {cpus:g}; they would wait for each other for ever. Lower train.workers, "
            "train.cpus_per_worker or feed.cpus"
        )
    enough = gpus >= options.workers
    return enough and options.gpu != "no"


def worker_cpus(experiment: Experiment) -> float:
    """CPUs that Ray reserves for a worker."""
    import ray

    if experiment.train.cpus_per_worker:
        return experiment.train.cpus_per_worker
    return 1.0 if ray.cluster_resources().get("CPU", 0) >= 2 * experiment.train.workers else 0.5


def _local_cpus(experiment: Experiment) -> int:
    """Logical CPUs of a local session. They only count reservations; Ray Data warns where few are left over."""
    return max(os.cpu_count() or 1, 2 * experiment.train.workers)


def check_continuation(
    before: Mapping[str, Any], options: Mapping[str, Any], hashes: Mapping[str, str], name: str
) -> None:
    """A run may only go on as what it was.

    Raises:
        ValueError: names the options that differ.
    """
    old = before["options"]
    fixed = [p for p in options if p in FIXED or (p not in FREE and not p.startswith(FREE_GROUPS))]
    differing = [
        f"{path} was {old.get(path)!r}, is {options[path]!r}" for path in fixed if old.get(path) != options[path]
    ]
    differing += [f"the data changed ({key})" for key in hashes if before.get(key) != hashes[key]]
    if differing:
        raise ValueError(
            f"run {name!r} began with other options: {'; '.join(differing)}. Choose another --name for a new run"
        )
