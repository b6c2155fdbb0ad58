"""How trials end other than by finishing: reasons of failures, and runs that an interruption left open."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from pipelines.cluster import storage
from pipelines.tracking import client, runs, tracker
from pipelines.tuning.plan import Plan, Row, failed_run_file, failure_file, run_id

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|can't allocate memory|not enough memory|Unable to allocate|"
    r"memory pressure|low on memory|memory usage threshold",
    re.IGNORECASE,
)

KILLED = re.compile(r"killed by the OOM killer|worker process has died|WorkerCrashed", re.IGNORECASE)
"""What Ray says of a process that ended without a word: the kernel's killer and a crash look alike."""

CONSEQUENCE = re.compile(r"gloo|nccl|connection (was )?(reset|closed)|broken pipe|process ?group", re.IGNORECASE)
"""What the other workers raise when one is gone."""


class OutOfMemory(RuntimeError):
    """Ends a run at once: started again as it is, it would run out of memory again."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it on a worker, says that memory ran out."""
    return _says(OUT_OF_MEMORY, error)


def perhaps_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, or a worker was killed, which the kernel does without saying why."""
    return out_of_memory(error) or _says(KILLED, error)


def describe(error: BaseException) -> str:
    """The innermost reason in one line: what a worker raised, not that a worker failed, nor that others missed it."""
    leaves = _leaves(error)
    innermost = next((leaf for leaf in leaves if not CONSEQUENCE.search(str(leaf))), leaves[0])
    if KILLED.search(str(innermost)) and not out_of_memory(innermost):
        return "a worker's process died: killed, perhaps by the kernel for lack of memory, or crashed; see Ray's logs"
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    if type(innermost).__module__.startswith("ray."):  # its first line says it, the others advise
        return f"{type(innermost).__name__}: {' '.join(lines[:1])}"
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = (named or lines or [""])[-1]
    return text if re.match(r"[\w.]*(Error|Exception)\b", text) else f"{type(innermost).__name__}: {text}"


def _says(pattern: re.Pattern[str], error: BaseException) -> bool:
    return any(pattern.search(f"{part} {type(part).__name__}") for part in [error, *_leaves(error)])


def _leaves(error: BaseException, seen: frozenset[int] = frozenset()) -> list[BaseException]:
    """What an error began with: on each worker that failed, else its own cause, else itself."""
    failures = getattr(error, "worker_failures", None)
    inner = [
        *(failures.values() if isinstance(failures, Mapping) else ()),
        getattr(error, "health_check_failure", None),
        getattr(error, "controller_failure", None),
        error.__cause__,
    ]
    seen |= {id(error)}
    found = [one for one in inner if isinstance(one, Exception) and id(one) not in seen]  # not a parser's SystemExit
    return [leaf for one in found for leaf in _leaves(one, seen)] or [error]


def record_failure(plan: Plan, row: Row, identity: str, reason: str) -> None:
    """The reason, beside the trial and in its MLflow run (which is opened where it failed before that)."""
    storage.write_bytes(failure_file(plan.folder, identity), reason.encode())
    known = run_id(plan.folder, identity)
    parent = plan.parent
    if known:
        run = replace(parent, run_id=known)
    else:
        options = runs.Tracking(uri=parent.tracking_uri, experiment=plan.bases[row.preset].tracking.experiment)
        options = replace(options, name=row.label)
        run = runs.start(options, plan.folder, params=row.params, tags={"trial": identity}, parent=parent.run_id)
        storage.write_bytes(failed_run_file(plan.folder, identity), run.run_id.encode())  # the next attempt's too
    tracker.Tracker(run).tags({"state": "failed", "reason": reason})
    runs.finish(run, "FAILED")


def forget_failure(plan: Plan, identity: str) -> None:
    """The reason of an earlier attempt, which would outlive the next one's success."""
    file = failure_file(plan.folder, identity)
    if not storage.exists(file):
        return
    storage.delete(file)
    known = run_id(plan.folder, identity)
    if known:
        tracker.Tracker(replace(plan.parent, run_id=known)).tags({"state": "running", "reason": ""})


def close_children(parent: runs.Run) -> None:
    """Runs of trials that are open when a sweep has ended were interrupted; a store that is away is a warning."""
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    try:
        with client.patience(2, 30):
            found = client.connect(parent.tracking_uri).search_runs([parent.experiment_id], query)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        logger.warning("tracking: runs of interrupted trials stay open (%s)", error)
        return
    for one in found:
        run = replace(parent, run_id=one.info.run_id)
        tracker.Tracker(run).tags({"state": "interrupted"})
        runs.finish(run, "KILLED")
