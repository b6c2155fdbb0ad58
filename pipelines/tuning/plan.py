"""What every trial of a sweep shares, and how its folders and its MLflow run are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
