"""How trials end other than by finishing: reasons of failures, and runs that an interruption left open."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from pipelines import storage, tracking
from pipelines.sweeps.plan import Plan, Row, failed_run_file, failure_file, run_id

log = logging.getLogger(__name__)

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|can't allocate memory|not enough memory|Unable to allocate|memory pressure",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it on a worker, says that memory ran out."""
    return bool(OUT_OF_MEMORY.search(" ".join(str(part) + type(part).__name__ for part in _causes(error))))


def describe(error: BaseException) -> str:
    """The innermost reason in one line: what a worker raised, not that a worker failed."""
    innermost = _causes(error)[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = (named or lines or [""])[-1]
    return text if re.match(r"[\w.]*(Error|Exception)\b", text) else f"{type(innermost).__name__}: {text}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error, and those of workers in it."""
    found, seen = [error], {id(error)}
    for part in found:
        failures = getattr(part, "worker_failures", None)
        inner = [*(failures.values() if isinstance(failures, Mapping) else ()), part.__cause__]
        for one in inner:
            if isinstance(one, Exception) and id(one) not in seen:  # not the SystemExit of a parser
                seen.add(id(one))
                found.append(one)
    return found


def record_failure(plan: Plan, row: Row, identity: str, reason: str) -> None:
    """The reason, beside the trial and in its MLflow run (which is opened where it failed before that)."""
    storage.write_bytes(failure_file(plan.folder, identity), reason.encode())
    known = run_id(plan.folder, identity)
    parent = plan.parent
    if known:
        run = replace(parent, run_id=known)
    else:
        options = tracking.Tracking(uri=parent.tracking_uri, experiment=plan.bases[row.preset].tracking.experiment)
        options = replace(options, name=row.label)
        run = tracking.start(options, plan.folder, params=row.params, tags={"trial": identity}, parent=parent.run_id)
        storage.write_bytes(failed_run_file(plan.folder, identity), run.run_id.encode())  # the next attempt's too
    tracking.Tracker(run).tags({"state": "failed", "reason": reason})
    tracking.finish(run, "FAILED")


def forget_failure(plan: Plan, identity: str) -> None:
    """The reason of an earlier attempt, which would outlive the next one's success."""
    file = failure_file(plan.folder, identity)
    if not storage.exists(file):
        return
    storage.delete(file)
    known = run_id(plan.folder, identity)
    if known:
        tracking.Tracker(replace(plan.parent, run_id=known)).tags({"state": "running", "reason": ""})


def close_children(parent: tracking.Run) -> None:
    """Runs of trials that are open when a sweep has ended were interrupted; a store that is away is a warning."""
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    try:
        with tracking.patience(2, 30):
            found = tracking.connect(parent.tracking_uri).search_runs([parent.experiment_id], query)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        log.warning("tracking: runs of interrupted trials stay open (%s)", error)
        return
    for one in found:
        run = replace(parent, run_id=one.info.run_id)
        tracking.Tracker(run).tags({"state": "interrupted"})
        tracking.finish(run, "KILLED")
