"""The configuration of one trial: values drawn by Ray Tune over a base experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import Experiment, keep_given, override
from pipelines.training.preflight import parse_schedule
from pipelines.tuning.plan import Plan, TrialConfig
from pipelines.tuning.search_space import PRESET, label

FREEZE = "model.backbone.freeze"
"""The one option whose value may be a schedule."""

GIVEN = "row"
"""Key of Ray Tune's config that holds the index of a trial which is given instead of drawn."""


@dataclass(frozen=True)
class ResolvedTrial:
    """The experiment of one trial."""

    config: TrialConfig
    experiment: Experiment
    """All options, with the first number of frozen stages."""
    schedule: tuple[tuple[int, int], ...]
    """Schedule of freezing: (step, frozen stages), the first at step 0."""


def config_of(config: Mapping[str, Any], plan: Plan) -> TrialConfig:
    """The options that a trial changes in its preset.

    Args:
        config: of Ray Tune: values of the search space by path, or the index of a given trial.
        plan: of the sweep.
    """
    if GIVEN in config:
        return plan.configs[config[GIVEN]]
    values = {
        path: domain.values[0] if domain.constant else domain.cleaned(config[path])
        for path, domain in plan.space.items()
    }
    drawn = {path: value for path, value in values.items() if not plan.space[path].constant}
    params = {plan.names.get(path, path): value for path, value in drawn.items()}
    changes = {path: value for path, value in values.items() if path != PRESET}
    return TrialConfig(label(drawn, plan.names) or "as given", values.get(PRESET, plan.preset), changes, params)


def resolve(config: Mapping[str, Any], plan: Plan) -> ResolvedTrial:
    """The experiment of a trial, from what Ray Tune passes to it.

    Raises:
        ValueError: the values do not make one.
    """
    trial_config = config_of(config, plan)
    return ResolvedTrial(trial_config, *apply(plan.bases[trial_config.preset], trial_config.changes))


def apply(base: Experiment, changes: Mapping[str, Any]) -> tuple[Experiment, tuple[tuple[int, int], ...]]:
    """A preset's experiment with a trial's changes, and its schedule of freezing as (step, frozen stages).

    Raises:
        ValueError: an option that does not exist, or a value that it does not take.
    """
    changes = dict(changes)
    schedule = ((0, base.model.backbone.freeze),)
    if FREEZE in changes:
        schedule = tuple(parse_schedule(changes[FREEZE]))
        changes[FREEZE] = schedule[0][1]
    experiment = keep_given(override(base, changes), changes) if changes else base
    if schedule[-1][0] >= experiment.train.steps:
        raise ValueError(f"{FREEZE}: the schedule changes at step {schedule[-1][0]}, training ends before")
    return fit_workers(experiment), schedule


def fit_workers(experiment: Experiment) -> Experiment:
    """An experiment with as many of its workers as share the batch equally; their number changes no update."""
    options = experiment.train
    workers = next(n for n in range(options.workers, 0, -1) if options.batch % n == 0)
    return replace(experiment, train=replace(options, workers=workers))


def with_micro_batch(experiment: Experiment, micro_batch: int) -> Experiment:
    """An experiment with as few images at once as its trial's memory turned out to hold; 0 leaves it as it is."""
    return replace(experiment, train=replace(experiment.train, micro_batch=micro_batch or experiment.train.micro_batch))
