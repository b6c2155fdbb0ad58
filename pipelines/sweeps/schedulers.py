"""What of Ray Tune draws the trials of a sweep, and what ends them early."""

from __future__ import annotations

from typing import Any, Protocol

from pipelines.sweeps import search
from pipelines.sweeps.search import Space
from pipelines.sweeps.trial import Plan


class Schedule(Protocol):
    """Of a sweep's options (`pipelines.tune.Sweep`), those that matter here."""

    @property
    def scheduler(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def grace(self) -> int: ...
    @property
    def reduction(self) -> int: ...


def searcher(kind: str, mode: str, seed: int, concurrent: int) -> Any:
    """Tune's searcher."""
    if kind == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(metric="objective", mode=mode, seed=seed)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(max_concurrent=concurrent, random_state=seed)


def scheduler(options: Schedule, plan: Plan) -> Any:
    """Tune's scheduler; its time is the number of the validation."""
    from ray.tune import schedulers

    rounds = max(-(-base.train.steps // base.train.validate_every) for base in plan.bases.values())
    after = rounds + 1  # a trial that has come to its last validation ends by itself
    match options.scheduler:
        case "asha":
            return schedulers.ASHAScheduler(
                time_attr="round",
                max_t=max(after, options.grace + 1),
                grace_period=options.grace,
                reduction_factor=options.reduction,
            )
        case "hyperband":
            return schedulers.HyperBandScheduler(time_attr="round", max_t=after, reduction_factor=options.reduction)
        case "median":
            return schedulers.MedianStoppingRule(
                time_attr="round", grace_period=options.grace, min_samples_required=min(3, max(2, options.samples - 1))
            )
        case "pbt":
            return population(options, plan.space)
    return None


def population(options: Schedule, space: Space) -> Any:
    """Population based training: listed values move to a neighbour, numbers by a fifth, within their range."""
    from ray.tune.schedulers import PopulationBasedTraining

    drawn = search.to_tune(space)
    mutations = {
        path: list(domain.values) if domain.kind in search.ENUMERATED else drawn[path]
        for path, domain in space.items()
        if domain.kind != "grid"
    }

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, **{path: space[path].clipped(config[path]) for path in mutations}}

    return PopulationBasedTraining(
        time_attr="round",
        perturbation_interval=options.grace,
        hyperparam_mutations=mutations,
        custom_explore_fn=explore,
    )
