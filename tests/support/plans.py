"""Plans of sweeps, and trials of Ray Tune, that several tests share."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking import client, runs
from pipelines.tracking.runs import Run
from pipelines.tuning import search_space
from pipelines.tuning.plan import Plan

RUN = Run("sqlite:///none.db", "parent", "0")


def plan_of(*expressions: str, **more: Any) -> Plan:
    """The plan of a sweep over these expressions, with further fields."""
    space = search_space.parse(expressions)
    names = search_space.short_names(list(space))
    return Plan({"demo": demo(), "other": demo()}, "demo", "/nowhere", RUN, space, names, **more)


def stored_plan(folder: Path, template: Path, **more: Any) -> Plan:
    """A plan whose MLflow store is a copy of the template in `folder`."""
    shutil.copy(template, folder / "mlflow.db")
    parent = runs.start(runs.Tracking(uri=f"sqlite:///{folder}/mlflow.db"), folder)
    return replace(plan_of("optim.lr=loguniform(1e-4,1)"), folder=str(folder), parent=parent, **more)


def tags_of(plan: Plan, run_id: str) -> dict[str, str]:
    """Tags of an MLflow run, and its status under "status"."""
    run = client.connect(plan.parent.tracking_uri).get_run(run_id)
    return {**run.data.tags, "status": run.info.status}


def tuned(status: str, **more: Any) -> Any:
    """A trial of Ray Tune with this status, as callbacks see it."""
    last = {"step": 10, "total": 20, "val/pq": 5.0, "done": True}
    given = {"last_result": last, "metric_analysis": {}, "config": {"optim.lr": 0.5}, "error_file": None, **more}
    return SimpleNamespace(trial_id="7", status=status, **given)
