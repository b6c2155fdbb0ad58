"""Trials that do not finish: what is written about them, and runs that an interruption left open."""

from __future__ import annotations

import logging
from dataclasses import replace

from pipelines.cluster import storage
from pipelines.cluster.masking import masked
from pipelines.tracking import client, runs
from pipelines.tuning.plan import Plan, TrialConfig, failed_run_file, failure_file, run_id

logger = logging.getLogger(__name__)


def record_failure(plan: Plan, config: TrialConfig, trial_id: str, reason: str) -> None:
    """Write the reason beside the trial and into its MLflow run, which is opened where the trial failed before that."""
    reason = masked(reason)
    storage.write_bytes(failure_file(plan.folder, trial_id), reason.encode())
    known = run_id(plan.folder, trial_id)
    parent = plan.parent
    if known:
        run = replace(parent, run_id=known)
    else:
        options = runs.Tracking(uri=parent.tracking_uri, experiment=plan.bases[config.preset].tracking.experiment)
        options = replace(options, name=config.label)
        run = runs.start(options, plan.folder, params=config.params, tags={"trial": trial_id}, parent=parent.run_id)
        storage.write_bytes(failed_run_file(plan.folder, trial_id), run.run_id.encode())  # the next attempt's too
    runs.tag(run, {"state": "failed", "reason": reason})
    runs.finish(run, "FAILED")


def forget_failure(plan: Plan, trial_id: str) -> None:
    """Remove the reason of an earlier attempt, which would outlive the next one's success."""
    file = failure_file(plan.folder, trial_id)
    if not storage.exists(file):
        return
    storage.delete(file)
    known = run_id(plan.folder, trial_id)
    if known:
        runs.tag(replace(plan.parent, run_id=known), {"state": "running", "reason": ""})


def close_children(parent: runs.Run) -> None:
    """Close the MLflow runs of trials that are open when a sweep has ended: they were interrupted.

    A store that is away is a warning.
    """
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    try:
        with client.patience(2, 30):
            children = client.connect(parent.tracking_uri).search_runs([parent.experiment_id], query)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        logger.warning("tracking: runs of interrupted trials stay open (%s)", error)
        return
    for child in children:
        run = replace(parent, run_id=child.info.run_id)
        runs.tag(run, {"state": "interrupted"})
        runs.finish(run, "KILLED")
