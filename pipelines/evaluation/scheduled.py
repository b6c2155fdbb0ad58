"""Scheduled evaluations: made once, by one process, and compared with a reference; see `jobs/evaluate.py --once`.

The verdict on a model is given once for each (evaluation, version of the reference, margin) and noted in a tag of the
evaluation's run, whichever call made the evaluation. Whoever compares holds a lease on the reference's alias, so that
of two models that beat the same champion the second is compared with the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.cluster import gauges, lease, session, storage
from pipelines.cluster.actor_pool import Pool
from pipelines.cluster.exits import Worse
from pipelines.cluster.lease import Busy
from pipelines.cluster.masking import masked
from pipelines.evaluation.evaluate import Task
from pipelines.evaluation.record import Places, Record, check, once, title_of
from pipelines.tracking import registry

ROUNDS = 10
"""Times that the reference may move while a model is compared with it."""

BETTER, SAME, WORSE = "better", "not better", "worse"


@dataclass(frozen=True)
class Reference:
    """The model that others are compared with, and the rule of the comparison."""

    uri: str = ""
    """models:/name@alias; empty = nothing."""
    margin: float = 1.0
    """Points of PQ that a model may lose."""
    promote: bool = False
    """Move the alias to a model that is better by more than the bootstrap noise, or that is the first one."""


def scheduled(
    ask: Callable[[str], Task], model: str, pool: Pool, places: Places, reference: Reference
) -> Record | None:
    """Evaluate unless that was done; compare with the reference, which is evaluated too where it was not.

    Args:
        ask: gives the task of evaluating a model by its URI, without loading it.
        model: URI.

    Returns:
        the record; None while another process is at it.

    Raises:
        Worse: PQ is lower than the reference's by more than the margin, and that was not said before.
        Busy: another process evaluates the reference, or moves its alias: nothing was compared.
        ValueError: the reference is no alias of a registered model, or cannot be moved to this model.
    """
    if reference.uri and not registry.ALIAS.fullmatch(reference.uri):
        raise ValueError(f"--reference {reference.uri}: give an alias of a registered model, models:/name@champion")
    task = ask(model)
    if reference.promote:
        registry.movable(reference.uri, task.uri)
    record, made = once(task, pool, places)
    if record is None:
        return None
    print(f"{title_of(task)}: PQ {record.pq:.2f}{'' if made else ', as evaluated before'} (run {record.run.run_id})")
    try:
        if reference.uri:
            _compare(ask, task, record, pool, places, reference)
    finally:
        _publish(model, record)
    return record


def _publish(model: str, record: Record) -> None:
    """On a cluster, tell Prometheus that the evaluation is there, also one that was there before."""
    if not os.environ.get("RAY_ADDRESS"):
        return
    session.connect()
    values = {"panoptic_evaluation_pq": record.pq, "panoptic_evaluation_timestamp_seconds": time.time()}
    gauges.publish(values, model=model)
    gauges.linger()


def _compare(
    ask: Callable[[str], Task], task: Task, record: Record, pool: Pool, places: Places, reference: Reference
) -> None:
    """Compare a record with that of the reference's model, and move the alias to the better one.

    The reference is evaluated first, which may take hours; the comparison follows under the lease of its alias, if
    the alias still names the same model.
    """
    folder = storage.join(places.folder, "leases", f"alias-{_digest(reference.uri)}")
    for _ in range(ROUNDS):
        champion = registry.aliased(reference.uri, places.tracking_uri)
        if champion is None and not reference.promote:
            store = masked(places.tracking_uri)
            raise ValueError(f"{reference.uri}: not found in {store}; --promote makes the first model it")
        if champion == task.uri:
            print(f"it is {reference.uri} itself")
            return
        before = None
        if champion is not None and not _noted(record, champion, reference):
            before = _reference_record(ask(champion), pool, places, reference)
        held = lease.wait(folder)
        with held.kept():
            if registry.aliased(reference.uri, places.tracking_uri) != champion:
                continue
            verdict = BETTER if champion is None else _verdict(task, record, before, champion, reference)
            if verdict == BETTER and reference.promote:
                if not held.held():
                    raise Busy(f"{reference.uri}: another process took over; nothing was moved, try again")
                registry.move_alias(reference.uri, task.uri, places.tracking_uri)
                print(f"{reference.uri} {'had no model and ' if champion is None else ''}is {task.uri} now")
            return
    raise Busy(f"{reference.uri} moved {ROUNDS} times while {title_of(task)} was compared with it; try again")


def _reference_record(asked: Task, pool: Pool, places: Places, reference: Reference) -> Record:
    """The record of the reference's model, made where there is none.

    Raises:
        Busy: another process is at it.
    """
    record, _ = once(asked, pool, places)
    if record is None:
        raise Busy(f"{reference.uri} ({title_of(asked)}) is being evaluated: nothing was compared, try again")
    return record


def _verdict(task: Task, record: Record, before: Record | None, champion: str, reference: Reference) -> str:
    """The verdict that was given before, or a new one, which is printed and noted.

    Raises:
        Worse: as `check`, the first time.
    """
    noted = _noted(record, champion, reference)
    if noted or before is None:
        print(f"{noted} when it was compared with {reference.uri} ({champion}) before")
        return noted
    try:
        better, why = check(record, before, task.manifest.categories, reference.margin)
    except Worse:
        _note(record, champion, reference, WORSE)
        raise
    print(f"{reference.uri} ({champion}) has PQ {before.pq:.2f}: {why}")
    verdict = BETTER if better else SAME
    _note(record, champion, reference, verdict)
    return verdict


def _noted(record: Record, champion: str, reference: Reference) -> str:
    """The verdict that was given on this reference under this margin; "" = none."""
    text = registry.read_tag(record.run, _tag(champion, reference))
    return json.loads(text)["verdict"] if text else ""


def _note(record: Record, champion: str, reference: Reference, verdict: str) -> None:
    """Keep a verdict as a tag of the evaluation's run."""
    content = {"reference": champion, "margin": reference.margin, "verdict": verdict}
    registry.set_tag(record.run, _tag(champion, reference), json.dumps(content))


def _tag(champion: str, reference: Reference) -> str:
    return f"compared.{_digest([champion, reference.margin])}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
