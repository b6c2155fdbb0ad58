"""What every trial of a sweep shares, and how its folders and its MLflow run are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.cluster import storage
from pipelines.config import Experiment
from pipelines.tracking import runs
from pipelines.tuning.search_space import Space


@dataclass(frozen=True)
class Row:
    """A trial that is given instead of drawn."""

    label: str
    preset: str
    changes: Mapping[str, Any]
    params: Mapping[str, Any]
    """What MLflow compares."""


@dataclass(frozen=True)
class Plan:
    """What every trial of a sweep shares."""

    bases: Mapping[str, Experiment]
    """By preset."""
    preset: str
    """Where the space chooses none."""
    folder: str
    """Of the sweep: trials and Tune's state."""
    parent: runs.Run
    space: Space = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Short names of the space's paths."""
    rows: tuple[Row, ...] = ()
    metric: str = "val/pq"
    mode: str = "max"


def trial_name(identity: str) -> str:
    """Of a trial's run folder."""
    return f"trial-{identity}"


def failure_file(folder: str, identity: str) -> str:
    """Where the reason of a failed trial stands."""
    return storage.join(folder, "failures", f"{identity}.txt")


def failed_run_file(folder: str, identity: str) -> str:
    """Where the MLflow run stands of a trial that failed before its training opened one."""
    return storage.join(folder, "failures", f"{identity}.run")


def run_id(folder: str, identity: str) -> str:
    """MLflow run of a trial, "" before it has one."""
    record = storage.join(folder, trial_name(identity), "run.json")
    if storage.exists(record):
        return json.loads(storage.read_bytes(record))["run_id"]
    failed = failed_run_file(folder, identity)
    return storage.read_bytes(failed).decode() if storage.exists(failed) else ""


@dataclass(frozen=True)
class Sweep:
    """What is searched, and how. Options of the experiment (`jobs/train.py PRESET --help`) hold for every trial."""

    sweep: tuple[str, ...] = ()
    """path=expression: grid(…) choice(…) uniform(a,b) loguniform(a,b) randint(a,b) quniform(a,b,step), or a value;
    the path is any option, or `preset`; model.backbone.freeze takes schedules such as '5 2@500' too."""
    samples: int = 1
    """Trials; with grids, draws of the other values for each of their combinations."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """random draws; grid enumerates choices too; optuna learns from finished trials (extra `search`)."""
    scheduler: Literal["none", "asha", "hyperband", "pbt", "median"] = "none"
    """Which trials end early. hyperband: asha with several brackets, which begin to end trials later and later. pbt:
    population based training, the worst take over weights and options of the best."""
    metric: str = "val/pq"
    """What the trials are compared by, and which of their checkpoints are kept: any metric of a validation."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    grace: int = 1
    """Validations that each trial gets before it may be ended (pbt: between two exchanges)."""
    reduction: int = 3
    """asha, hyperband: one in so many trials goes on."""
    concurrent: int = 0
    """Trials at once; 0 = as many as the cluster holds without waiting for each other."""
    resume: bool = False
    """Go on with the sweep of this --name."""
    search_seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Trials:
    """Everything that is needed to start: what `execute` takes."""

    bases: Mapping[str, Experiment]
    preset: str
    space: Space = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    """Of the dry run: every kind of trial that may be drawn. What the cluster must hold, and for how long."""
