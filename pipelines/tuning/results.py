"""The results of a sweep: its table in MLflow, and the best trial's model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.cluster.masking import masked
from pipelines.config import Experiment, override
from pipelines.tracking import client as client_module
from pipelines.tracking import runs
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.client import first_line
from pipelines.tracking.models_of_run import log_checkpoints, validated_on
from pipelines.training.checkpoints import load_checkpoint, read_metrics
from pipelines.training.driver import MODEL_TAG
from pipelines.training.pages import kept_checkpoint, version_tags
from pipelines.training.record import read_record
from pipelines.tuning import progress, trial
from pipelines.tuning.plan import Plan, run_id

VIEW = "resize."
"""Prefix of the options of the evaluation view."""


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep."""

    name: str
    folder: str
    """URI of its folder."""
    trials: list[progress.TrialResult]
    best: progress.TrialResult | None
    """The best trial; None where none has a value."""
    checkpoint: str
    """URI of the best trial's best checkpoint, "" without one."""
    model: str
    """MLflow URI of that checkpoint's model, "" without one."""
    parent: runs.Run
    """MLflow run of the sweep."""
    table: str
    """The trials as text."""


def conclude(name: str, results: list[progress.TrialResult], plan: Plan, first: Experiment) -> SweepResult:
    """Write the table of a sweep and the best trial's model into MLflow.

    Args:
        name: of the sweep.
        results: of its trials.
        plan: of the sweep.
        first: experiment of its first preset: under which name models are registered.
    """
    tracker = tracker_module.Tracker(plan.parent)
    text = progress.table(results, progress.short_metric(plan.metric), plan.mode, most=len(results) + 1)
    tracker.table("trials", progress.rows(results, plan.metric), text)
    best = next((result for result in progress.ranked(results, plan.mode) if not math.isnan(result.best)), None)
    checkpoint = model = ""
    if best is not None:
        checkpoint = trial.best_of(trial.all_checkpoints(plan.folder, best.identity), plan.metric, plan.mode)
        tracker.figures({f"best/{plan.metric}": best.best})
        tracker.tags({"best_trial": best.label})
    tracker.close()
    heading = "" if best is None else f"Best: **{best.label}**, {plan.metric} {best.best:.2f}\n\n"
    description = f"{heading}```\n{text}\n```"
    if checkpoint:
        model = log_best(plan.parent, checkpoint, first, description)
    show_checkpoints([result.identity for result in results], plan)
    runs.describe(plan.parent, description)
    return SweepResult(name, plan.folder, results, best, checkpoint, model, plan.parent, text)


def show_checkpoints(trial_ids: Sequence[str], plan: Plan) -> None:
    """A light entry on MLflow's pages for every checkpoint that trials keep, so that those of a sweep can be compared.

    Where MLflow is away one line says so: the checkpoints are safe. The same again changes nothing.
    """
    for trial_id in trial_ids:
        try:
            if not (own := run_id(plan.folder, trial_id)):
                continue
            run = replace(plan.parent, run_id=own)
            if data := validated_on(run):
                kept = [kept_checkpoint(uri) for uri in trial.all_checkpoints(plan.folder, trial_id)]
                log_checkpoints(run, kept, data)
        except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
            print(f"the checkpoints of trials are not on MLflow's pages ({first_line(error)})", file=sys.stderr)
            return


def log_best(parent: runs.Run, checkpoint: str, first: Experiment, description: str = "") -> str:
    """Log a checkpoint's model with the sweep, registered where `tracking.register` says so; returns its MLflow URI.

    The URI is "" where MLflow is away. A sweep that was resumed and has the same best checkpoint as before keeps the
    model that it logged.
    """
    from pipelines.tracking.model import log_model

    names = first.tracking
    try:
        client = client_module.reach(parent.tracking_uri)
        before: Mapping[str, str] = client.get_run(parent.run_id).data.tags
        if before.get("best_checkpoint") == checkpoint and before.get(MODEL_TAG):
            return before[MODEL_TAG]
        client.set_tag(parent.run_id, "best_checkpoint", checkpoint)
        client.set_tag(parent.run_id, MODEL_TAG, "")
        record = load_checkpoint(checkpoint)
        view = {path: value for path, value in record["experiment"].items() if path.startswith(VIEW)}
        resize = override(first, view).resize  # the trial's own: presets and sweeps may differ in it
        began = read_record(checkpoint.rstrip("/").rpartition("/")[0])  # of the trial
        data = {"data_hash": str(began["val_hash"])} if "val_hash" in began else {}
        tags = version_tags(read_metrics(checkpoint), data, checkpoint) if names.register else {}
        places = {"register": names.register, "alias": names.alias, "description": description}
        model = log_model(parent, record, resize, tags=tags, **places)
        client.set_tag(parent.run_id, MODEL_TAG, model)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: the checkpoint is safe
        print(f"the best model could not be logged ({error}); its checkpoint is {checkpoint}", file=sys.stderr)
        return ""
    return model


def closing_lines(done: SweepResult) -> str:
    """The text that a sweep ends with: the table, and where things lie."""
    return "\n".join(
        [
            "",
            done.table,
            "",
            f"sweep       {done.folder}",
            f"best        {done.best.label if done.best else 'no trial reported a validation'}",
            f"checkpoint  {done.checkpoint or '-'}",
            f"model       {done.model or '-'}",
            f"MLflow      {masked(done.parent.tracking_uri)}, run {done.parent.run_id}",
        ]
    )
