"""The configuration of one trial: values drawn by Ray Tune over a base experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import Experiment, override
from pipelines.training.preflight import parse_schedule
from pipelines.tuning.plan import Plan, Row
from pipelines.tuning.search_space import PRESET, label

FREEZE = "model.backbone.freeze"
"""The one option whose value may be a schedule."""


@dataclass(frozen=True)
class Resolved:
    """A trial's options."""

    row: Row
    experiment: Experiment
    """With the first number of frozen stages."""
    schedule: tuple[tuple[int, int], ...]
    """(step, frozen stages), the first at step 0."""


def row_of(config: Mapping[str, Any], plan: Plan) -> Row:
    """What Tune drew: one of the given trials, or values of the space."""
    if "row" in config:
        return plan.rows[config["row"]]
    values = {
        path: domain.values[0] if domain.constant else domain.cleaned(config[path])
        for path, domain in plan.space.items()
    }
    told = {path: value for path, value in values.items() if not plan.space[path].constant}
    params = {plan.names.get(path, path): value for path, value in told.items()}
    changes = {path: value for path, value in values.items() if path != PRESET}
    return Row(label(told, plan.names) or "as given", values.get(PRESET, plan.preset), changes, params)


def resolve(config: Mapping[str, Any], plan: Plan) -> Resolved:
    """What Tune drew, as an experiment.

    Raises:
        ValueError: the values do not make one.
    """
    row = row_of(config, plan)
    return Resolved(row, *apply(plan.bases[row.preset], row.changes))


def apply(base: Experiment, changes: Mapping[str, Any]) -> tuple[Experiment, tuple[tuple[int, int], ...]]:
    """A trial's experiment and its schedule of freezing.

    Raises:
        ValueError: an option that does not exist, or a value that it does not take.
    """
    changes = dict(changes)
    schedule = ((0, base.model.backbone.freeze),)
    if FREEZE in changes:
        schedule = tuple(parse_schedule(changes[FREEZE]))
        changes[FREEZE] = schedule[0][1]
    experiment = override(base, changes) if changes else base
    if schedule[-1][0] >= experiment.train.steps:
        raise ValueError(f"{FREEZE}: the schedule changes at step {schedule[-1][0]}, training ends before")
    return fit_workers(experiment), schedule


def fit_workers(experiment: Experiment) -> Experiment:
    """As many of the asked workers as share the batch equally: their number changes neither samples nor updates."""
    options = experiment.train
    workers = next(n for n in range(options.workers, 0, -1) if options.batch % n == 0)
    return replace(experiment, train=replace(options, workers=workers))


def more_accumulation(experiment: Experiment) -> Experiment | None:
    """The same experiment with half the images at once on a worker; None where that is one already."""
    options = experiment.train
    share = options.batch // options.workers
    at_once = min(options.micro_batch or share, share)
    if at_once == 1:
        return None
    return replace(experiment, train=replace(options, micro_batch=at_once // 2))
