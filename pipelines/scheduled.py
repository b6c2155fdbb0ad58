"""Evaluations by the clock: idempotent, exclusive, with an eye on the reference; see `jobs/evaluate.py --once`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines import registry
from pipelines.actors import Pool
from pipelines.evaluate import Task
from pipelines.judging import Places, Record, check, once, title_of


@dataclass(frozen=True)
class Reference:
    """What a model is compared with."""

    uri: str = ""
    """models:/name@alias; empty = nothing."""
    margin: float = 1.0
    """Points of PQ that a model may lose."""
    promote: bool = False
    """Move the alias to a model that is better by more than the bootstrap noise, or that is the first one."""


def scheduled(
    assign: Callable[[str], Task], model: str, pool: Pool, places: Places, reference: Reference
) -> Record | None:
    """Evaluate unless that was done; compare with the reference, which is evaluated too where it was not.

    An evaluation that was there already raises nothing, but a promotion that it missed is made up for.

    Returns:
        the record; None while another process is at it.

    Raises:
        Worse: PQ is lower than the reference's by more than the margin.
        ValueError: the reference is no alias of a registered model.
    """
    if reference.uri and not registry.ALIAS.fullmatch(reference.uri):
        raise ValueError(f"--reference {reference.uri}: give an alias of a registered model, models:/name@champion")
    task = assign(model)
    found, made = once(task, pool, places)
    if found is None:
        return None
    print(f"{title_of(task)}: PQ {found.pq:.2f}{'' if made else ', as evaluated before'} (run {found.run.run_id})")
    if reference.uri:
        _compare(assign, task, found, made, pool, places, reference)
    return found


def _compare(
    assign: Callable[[str], Task],
    task: Task,
    found: Record,
    made: bool,
    pool: Pool,
    places: Places,
    reference: Reference,
) -> None:
    if reference.promote and not registry.has_alias(reference.uri, places.tracking_uri):
        registry.move_alias(reference.uri, task.uri, places.tracking_uri)
        print(f"{reference.uri} had no model and is {task.uri} now")
        return
    other = assign(reference.uri)
    if other.identity == task.identity:
        print(f"it is {reference.uri} itself")
        return
    before, _ = once(other, pool, places)
    if before is None:
        return
    margin = reference.margin if made else float("inf")
    better = check(found, before, task.manifest.categories, margin)
    print(f"{reference.uri} has PQ {before.pq:.2f}: {'better' if better else 'not better'} by more than the noise")
    if better and reference.promote:
        registry.move_alias(reference.uri, task.uri, places.tracking_uri)
        print(f"{reference.uri} is {task.uri} now")
