"""What a sweep leaves: its table in MLflow, and the best trial's model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import Experiment, override
from pipelines.tracking import client as client_module
from pipelines.tracking import runs
from pipelines.tracking import tracker as tracker_module
from pipelines.training.driver import MODEL_TAG
from pipelines.training.worker import load_checkpoint
from pipelines.tuning import progress, trial
from pipelines.tuning.plan import Plan

VIEW = "resize."
"""How the options begin that say what of an image a model sees."""


@dataclass(frozen=True)
class Finished:
    """What a sweep leaves."""

    name: str
    folder: str
    lines: list[progress.Line]
    best: progress.Line | None
    checkpoint: str
    """Best one of the best trial, "" without one."""
    model: str
    """MLflow URI of its model."""
    parent: runs.Run
    table: str


def conclude(name: str, lines: list[progress.Line], plan: Plan, first: Experiment) -> Finished:
    """The table in MLflow, and the best trial's model."""
    tracker = tracker_module.Tracker(plan.parent)
    text = progress.table(lines, progress.short_metric(plan.metric), plan.mode, most=len(lines) + 1)
    tracker.table("trials", progress.rows(lines, plan.metric), text)
    ordered = progress.ranked(lines, plan.mode)
    best = ordered[0] if ordered and ordered[0].best == ordered[0].best else None
    checkpoint = model = ""
    if best is not None:
        checkpoint = trial.best_of(trial.all_checkpoints(plan.folder, best.identity), plan.metric, plan.mode)
        tracker.figures({f"best/{plan.metric}": best.best})
        tracker.tags({"best_trial": best.label})
    tracker.close()
    if checkpoint:
        model = log_best(plan.parent, checkpoint, first)
    told = "" if best is None else f"Best: **{best.label}**, {plan.metric} {best.best:.2f}\n\n"
    runs.describe(plan.parent, f"{told}```\n{text}\n```")
    return Finished(name, plan.folder, lines, best, checkpoint, model, plan.parent, text)


def log_best(parent: runs.Run, checkpoint: str, first: Experiment) -> str:
    """MLflow URI of a checkpoint's model, logged with the sweep and registered where `tracking.register` says so.

    A sweep that was resumed and has the same best checkpoint as before keeps the model that it logged.
    """
    from pipelines.tracking.model import log_model

    names = first.tracking
    try:
        client = client_module.connect(parent.tracking_uri)
        before: Mapping[str, str] = client.get_run(parent.run_id).data.tags
        if before.get("best_checkpoint") == checkpoint and before.get(MODEL_TAG):
            return before[MODEL_TAG]
        client.set_tag(parent.run_id, "best_checkpoint", checkpoint)
        client.set_tag(parent.run_id, MODEL_TAG, "")
        record = load_checkpoint(checkpoint)
        view = {path: value for path, value in record["experiment"].items() if path.startswith(VIEW)}
        resize = override(first, view).resize  # the trial's own: presets and sweeps may differ in it
        model = log_model(parent, record, resize, register=names.register, alias=names.alias)
        client.set_tag(parent.run_id, MODEL_TAG, model)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: the checkpoint is safe
        print(f"the best model could not be logged ({error}); its checkpoint is {checkpoint}", file=sys.stderr)
        return ""
    return model


def closing_lines(done: Finished) -> str:
    """The table, and where things lie."""
    return "\n".join(
        [
            "",
            done.table,
            "",
            f"sweep       {done.folder}",
            f"best        {done.best.label if done.best else 'no trial reported a validation'}",
            f"checkpoint  {done.checkpoint or '-'}",
            f"model       {done.model or '-'}",
            f"MLflow      {done.parent.tracking_uri}, run {done.parent.run_id}",
        ]
    )
