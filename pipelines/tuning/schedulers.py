"""Ray Tune's searchers, which draw the trials of a sweep, and its schedulers, which end them early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.tune import schedulers

from pipelines.config import Experiment
from pipelines.tuning import search_space
from pipelines.tuning.config import SweepOptions
from pipelines.tuning.search_space import Space


def searcher(kind: str, mode: str, seed: int, concurrent: int, points: Sequence[Mapping[str, Any]] = ()) -> Any:
    """Tune's searcher.

    Args:
        kind: as `SweepOptions.searcher`.
        mode: max or min.
        seed: of its draws.
        concurrent: trials at once.
        points: values of the first trials, by path.
    """
    first = [dict(point) for point in points]
    if kind == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(metric="objective", mode=mode, seed=seed, points_to_evaluate=first or None)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(points_to_evaluate=first, max_concurrent=concurrent, random_state=seed)


def rounds_of(experiments: Iterable[Experiment]) -> int:
    """The number of validations of the longest of all trials that may be drawn."""
    return max(-(-experiment.train.steps // experiment.train.validate_every) for experiment in experiments)


def scheduler(options: SweepOptions, space: Space, rounds: int) -> Any:
    """Tune's scheduler, None for none; its time is the number of the validation.

    Args:
        options: of the sweep.
        space: of the sweep, from which a population draws.
        rounds: validations of the longest trial.
    """
    grace, factor = options.grace, options.reduction
    most = max(rounds + 1, grace + 1)  # a trial that has come to its last validation ends by itself
    match options.scheduler:
        case "asha":
            return Halving(time_attr="round", max_t=most, grace_period=grace, reduction_factor=factor)
        case "hyperband":
            # Hyperband's brackets without its waiting: Ray's synchronous form pauses trials until a bracket is full,
            # which it never is where fewer run at once than it holds.
            brackets = 1 + max(0, int(math.log(rounds / grace, factor) + 1e-9))
            return Halving(
                time_attr="round", max_t=most, grace_period=grace, reduction_factor=factor, brackets=brackets
            )
        case "median":
            least = min(3, max(2, options.samples - 1))
            return Median(time_attr="round", grace_period=grace, min_samples_required=least)
        case "pbt":
            return population(options, space)
    return None


class LastValidation:
    """Lets a trial end by itself once it has come to its last validation.

    Ray's rules would stop it there as anywhere, and kill workers that write the last checkpoint.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on where Ray would stop what is at its end."""
        decision: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        ended = result.get("step", 0) >= result.get("total", math.inf)
        return schedulers.TrialScheduler.CONTINUE if ended and decision == schedulers.TrialScheduler.STOP else decision


class Halving(LastValidation, schedulers.AsyncHyperBandScheduler):
    """Ray's asynchronous successive halving."""


class Median(LastValidation, schedulers.MedianStoppingRule):
    """Ray's median rule without pauses.

    Ray's own would pause a trial that nothing can be compared with yet, and start its workers anew.
    """

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return schedulers.TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leave out a trial that ended without a validation: it has nothing to compare, and no round to read."""
        if self._time_attr in result:
            super().on_trial_complete(tune_controller, trial, result)


class Population(schedulers.PopulationBasedTraining):
    """Ray's population based training without pauses.

    Ray's own would pause a trial, and start its workers anew, whenever another one waits for its turn. Here all of a
    population trains at once, so the one that waits has just taken over another's training.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on where Ray would pause."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return schedulers.TrialScheduler.CONTINUE if decision == schedulers.TrialScheduler.PAUSE else decision


def population(options: SweepOptions, space: Space) -> Any:
    """Tune's population based training: listed values move to a neighbour, numbers by a fifth, within their range."""
    drawn = search_space.to_tune(space)
    mutations = {
        path: list(domain.values) if domain.kind in search_space.ENUMERATED else drawn[path]
        for path, domain in space.items()
        if domain.kind != "grid"
    }

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, **{path: space[path].clipped(config[path]) for path in mutations}}

    return Population(
        time_attr="round",
        perturbation_interval=options.grace,
        hyperparam_mutations=mutations,
        custom_explore_fn=explore,
        require_attrs=False,  # one trial that ends without a validation must not end the others
    )
