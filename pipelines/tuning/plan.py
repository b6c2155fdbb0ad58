"""The options of a sweep, the plan that its trials share, and the places of a trial's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.cluster import storage
from pipelines.config import Experiment
from pipelines.tracking import runs
from pipelines.training.record import Opened, read_record
from pipelines.tuning.config import SweepOptions
from pipelines.tuning.search_space import Space


@dataclass(frozen=True)
class TrialConfig:
    """The options that one trial changes in its preset: drawn from the search space, or given (a row of a study)."""

    label: str
    """Name of the trial in tables and in MLflow."""
    preset: str
    changes: Mapping[str, Any]
    """Value of each option that it sets, by dotted path."""
    params: Mapping[str, Any]
    """Parameters of its MLflow run: what differs between the trials."""


@dataclass(frozen=True)
class Trials:
    """The trials of a sweep before it starts: presets, and a search space or given configurations."""

    bases: Mapping[str, Experiment]
    """The experiment of each preset, with the options that hold for every trial."""
    preset: str
    """The preset of trials whose space chooses none."""
    space: Space = field(default_factory=dict)
    configs: tuple[TrialConfig, ...] = ()
    """Trials that are given instead of drawn; () = they are drawn from the space."""
    experiments: tuple[Experiment, ...] = ()
    """Every kind of trial that may be drawn, from the dry run: says what the cluster must hold, and for how long."""


def count_trials(options: SweepOptions, trials: Trials) -> int:
    """The number of trials: those that are given, or the draws for each combination of the grids."""
    grids = [len(domain.values) for domain in trials.space.values() if domain.kind == "grid"]
    return len(trials.configs) or options.samples * math.prod(grids)


@dataclass(frozen=True)
class Plan:
    """The data that all trials of a running sweep share."""

    bases: Mapping[str, Experiment]
    """The experiment of each preset, with its data prepared."""
    preset: str
    """The preset of trials whose space chooses none."""
    folder: str
    """URI of the sweep's folder: run folders of its trials and Tune's state."""
    parent: runs.Run
    """MLflow run of the sweep, above those of its trials."""
    space: Space = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Short names of the space's paths."""
    configs: tuple[TrialConfig, ...] = ()
    """Trials that are given instead of drawn; () = they are drawn from the space."""
    metric: str = "val/pq"
    """The metric that trials are compared by."""
    mode: str = "max"
    """max where a larger value of the metric is better, else min."""
    count: int = 0
    """Trials in all, of which Ray Tune makes one after the other; 0 = not known."""


def trial_name(trial_id: str) -> str:
    """The name of a trial's run folder."""
    return f"trial-{trial_id}"


def failure_file(folder: str, trial_id: str) -> str:
    """URI of the file with the reason of a failed trial."""
    return storage.join(folder, "failures", f"{trial_id}.txt")


def failed_run_file(folder: str, trial_id: str) -> str:
    """URI of the file with the MLflow run id of a trial that failed before its training opened a run."""
    return storage.join(folder, "failures", f"{trial_id}.run")


def run_id(folder: str, trial_id: str) -> str:
    """The MLflow run id of a trial, "" before it has one."""
    if record := read_record(storage.join(folder, trial_name(trial_id)), Opened):
        return record["run_id"]
    failed = failed_run_file(folder, trial_id)
    return storage.read_bytes(failed).decode() if storage.exists(failed) else ""
