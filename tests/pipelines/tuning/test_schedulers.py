"""Ray's own schedulers and searchers as sweeps make them, driven with made-up validations."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler

from pipelines.config import parse_known
from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking.runs import Run
from pipelines.tuning import search_space
from pipelines.tuning.config import check_options, preset_values, read_command
from pipelines.tuning.plan import Plan, SweepOptions
from pipelines.tuning.schedulers import rounds_of, scheduler, searcher
from pipelines.tuning.trial_config import apply, resolve


class One:
    """A trial of Tune, as schedulers see it."""

    def __init__(self, identity: str, status: str = "PENDING") -> None:
        self.trial_id, self.status = identity, status


def drive(made: Any, lengths: list[int], at_once: int, value: Callable[[int, int], float]) -> list[int]:
    """The round to which each trial came, where `at_once` run and the next begins when one ends.

    Args:
        made: scheduler.
        lengths: rounds of each trial.
        at_once: trials.
        value: of a trial at a round.
    """
    made.set_search_properties("objective", "max")
    trials = [One(str(k)) for k in range(len(lengths))]
    controller = SimpleNamespace(get_live_trials=lambda: [t for t in trials if t.status != "TERMINATED"])
    for one in trials:
        made.on_trial_add(controller, one)
    reached = [0] * len(lengths)
    while any(one.status != "TERMINATED" for one in trials):
        for k, one in enumerate(trials):
            if one.status == "PENDING" and sum(t.status == "RUNNING" for t in trials) < at_once:
                one.status = "RUNNING"
            if one.status != "RUNNING":
                continue
            reached[k] += 1
            result = {"round": reached[k], "objective": value(k, reached[k]), "step": reached[k], "total": lengths[k]}
            decision = made.on_trial_result(controller, one, result)
            assert decision in ("CONTINUE", "STOP"), f"trial {k} at round {reached[k]}: {decision}"
            if decision == "STOP" or reached[k] == lengths[k]:
                made.on_trial_complete(controller, one, result)
                one.status = "TERMINATED"
    return reached


@pytest.mark.parametrize("at_once", [1, 2, 12])
def test_hyperband_ends_trials_and_never_waits(at_once: int):
    """However few run at once; the best trial comes to its last validation."""
    np.random.seed(0)
    made = scheduler(SweepOptions(scheduler="hyperband"), {}, rounds=9)
    assert len(made._brackets) == 3
    reached = drive(made, [9] * 12, at_once, lambda k, at: (12 - k) * at)
    assert reached[0] == 9 and min(reached) < 9 and len(set(reached)) > 2


@pytest.mark.parametrize(("rounds", "grace", "brackets"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (9, 1, 3), (9, 3, 2)])
def test_brackets_of_hyperband(rounds: int, grace: int, brackets: int):
    made = scheduler(SweepOptions(scheduler="hyperband", grace=grace), {}, rounds)
    assert len(made._brackets) == brackets and all(bracket._rungs for bracket in made._brackets)


def test_the_longest_trial_of_a_sweep_comes_to_its_end():
    """Whatever the length of the options that all share."""
    base = demo()
    lengths = [replace(base, train=replace(base.train, steps=steps, validate_every=250)) for steps in (1000, 4000)]
    rounds = rounds_of(lengths)
    assert rounds == 16
    assert drive(scheduler(SweepOptions(scheduler="asha"), {}, rounds), [4, 16], 2, lambda k, at: k + at) == [4, 16]


def last_words(made: Any) -> list[str]:
    """Decisions of a rule about seven trials at their third and last validation, each worse than those before."""
    made.set_search_properties("objective", "max")
    decisions = []
    for k in range(7):
        one = One(str(k), "RUNNING")
        made.on_trial_add(SimpleNamespace(get_live_trials=list), one)
        for at in (1, 2, 3):  # as good as all others before
            result = {"round": at, "objective": 1.0 if at < 3 else -float(k), "step": 10 * at, "total": 30}
            decision = made.on_trial_result(SimpleNamespace(get_live_trials=list), one, result)
            assert at == 3 or decision == "CONTINUE"
        decisions.append(decision)
        made.on_trial_complete(None, one, result)
    return decisions


def test_what_is_at_its_last_validation_ends_by_itself():
    """Ray would stop it while it writes its last checkpoint."""
    rays = AsyncHyperBandScheduler(time_attr="round", max_t=4, grace_period=1, reduction_factor=3)
    assert last_words(rays) == ["CONTINUE"] + ["STOP"] * 6
    assert last_words(scheduler(SweepOptions(scheduler="asha"), {}, rounds=3)) == ["CONTINUE"] * 7


def test_the_median_rule_does_not_pause_and_bears_trials_without_a_validation():
    made = scheduler(SweepOptions(scheduler="median", samples=8), {}, rounds=4)
    reached = drive(made, [4] * 8, 2, lambda k, at: (8 - k) * at)
    assert reached[:2] == [4, 4] and min(reached) < 4
    empty = One("empty", "RUNNING")
    made.on_trial_complete(None, empty, {"done": True})
    fresh = One("fresh", "RUNNING")
    controller = SimpleNamespace(get_live_trials=lambda: [fresh])
    assert made.on_trial_result(controller, fresh, {"round": 1, "objective": 99.0}) == "CONTINUE"


def test_a_population_goes_on_while_one_of_it_waits_for_its_turn(monkeypatch):
    """Ray would pause whoever reports next, and its workers would start anew for nothing."""
    made = scheduler(
        SweepOptions(scheduler="pbt", samples=4), search_space.parse(["optim.lr=loguniform(1e-4,1e-2)"]), 8
    )
    made.set_search_properties("objective", "max")
    trials = [One(str(k), "RUNNING") for k in range(4)]
    made._trial_state = {one: SimpleNamespace(last_perturbation_time=0) for one in trials}
    for part in ("_checkpoint_or_exploit", "_save_trial_state"):
        monkeypatch.setattr(made, part, lambda *given: None)
    monkeypatch.setattr(made, "_quantiles", lambda: ([], []))
    controller = SimpleNamespace(get_trials=lambda: trials)
    trials[0].status = "PENDING"  # it has just taken over another's training
    assert made.on_trial_result(controller, trials[1], {"round": 1, "objective": 1.0}) == "CONTINUE"
    trials[2].status = "PAUSED"  # by an exchange of its own, after which Ray starts it again
    assert made.on_trial_result(controller, trials[2], {"round": 1, "objective": 1.0}) == "NOOP"


@pytest.mark.parametrize("kind", ["none", "asha", "hyperband", "median", "pbt"])
def test_every_scheduler_is_made(kind: str):
    space = search_space.parse(
        ["optim.lr=loguniform(1e-4,1e-2)", "model.backbone.freeze=choice(0,2,5)", "optim.ema=0.5"]
    )
    made = scheduler(SweepOptions(scheduler=kind, samples=4), space, 3)  # type: ignore[arg-type]
    assert (made is None) == (kind == "none")
    if kind == "pbt":
        changed = made._custom_explore_fn({"optim.lr": 1.0, "model.backbone.freeze": 2, "optim.ema": 0.5, "seed": 1})
        assert changed == {"optim.lr": 1e-2, "model.backbone.freeze": 2, "optim.ema": 0.5, "seed": 1}


def test_the_first_trial_has_the_values_of_the_preset():
    """And is one of the samples; a value that is not searched over stays as it is given."""
    expressions = ["optim.lr=loguniform(1e-5,1)", "model.backbone.freeze=choice(5,0)", "optim.ema=0.5"]
    space, base = search_space.parse(expressions), demo()
    made = searcher("random", "max", 0, 0, [preset_values(space, base)])
    spec = {"run": lambda config: None, "config": search_space.to_tune(space), "num_samples": 4}
    made.add_configurations({"drawn": spec})
    configs = [made.next_trial().config for _ in range(4)]
    assert made.next_trial() is None
    assert configs[0] == {"optim.lr": base.optim.lr, "model.backbone.freeze": 0, "optim.ema": 0.5}
    assert len({config["optim.lr"] for config in configs}) == 4


@pytest.mark.parametrize(
    ("expression", "more", "message"),
    [
        ("optim.lr=loguniform(1e-9,1e-8)", (), r"optim.lr is .* in the preset, outside of loguniform\(1e-09, 1e-08\)"),
        ("model.backbone.freeze=choice(4,5)", (), "freeze is 0 in the preset, outside of choice"),
        ("optim.lrr=loguniform(1e-5,1)", (), "no option 'optim.lrr'"),
        ("model.backbone.freeze=grid(0,5)", (), "grids and presets are tried one by one"),
        ("preset=choice(demo,detr-scenes)", (), "grids and presets are tried one by one"),
        ("model.backbone.freeze=choice(0,5)", ("grid",), "grids and presets are tried one by one"),
    ],
)
def test_a_baseline_that_cannot_be_is_refused(expression: str, more: tuple[str, ...], message: str):
    kind: Any = more[0] if more else "random"
    with pytest.raises(ValueError, match=message):
        read_command(SweepOptions(sweep=(expression,), baseline=True, searcher=kind), ["demo"], PRESETS)


def test_optuna_draws_from_our_space():
    """Constants among what it draws; every draw is an experiment, and it learns from the objectives."""
    pytest.importorskip("optuna")
    expressions = [
        "optim.lr=loguniform(1e-5,1e-3)",
        "optim.optimiser=choice(adam,adamw)",
        "train.batch=quniform(2,8,2)",
        "train.seed=randint(0,3)",
        "optim.ema=0.5",
        "model.rates=choice((2,4,6))",
    ]
    space = search_space.parse(expressions)
    options = SweepOptions(sweep=tuple(expressions), searcher="optuna")
    check_options(options, space)
    made = searcher("optuna", "max", 0, 2)
    config = search_space.to_tune(space)
    assert made.set_search_properties("objective", "max", config)
    plan = Plan({"demo": demo()}, "demo", "/nowhere", Run("", "", ""), space)
    drawn = []
    for k in range(30):
        experiment = resolve({**config, **made.suggest(str(k))}, plan).experiment
        assert (
            experiment.optim.ema == 0.5
            and experiment.model.rates == (2, 4, 6)
            and experiment.train.batch in (2, 4, 6, 8)
        )
        drawn.append(experiment.optim.lr)
        result = {"objective": -abs(np.log10(experiment.optim.lr) + 3), "training_iteration": 1}
        made.on_trial_result(str(k), result)
        made.on_trial_complete(str(k), result)
    assert np.mean(drawn[20:]) > np.mean(drawn[:10])  # the best are near 1e-3
    with pytest.raises(ValueError, match="nothing to draw"):
        check_options(options, search_space.parse(["optim.ema=0.5"]))


def searches_for_frozen_stages() -> list[tuple[SweepOptions, Any, dict[str, Any]]]:
    """Options, search space and presets of the sweeps over frozen stages in the README."""
    readme = (Path(__file__).parents[3] / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in readme.splitlines() if line.startswith("python jobs/tune.py") and "freeze=" in line]
    found = []
    for line in lines:
        options, rest = parse_known(SweepOptions, shlex.split(line)[2:], "")
        space, bases, _ = read_command(options, rest, PRESETS)
        found.append((options, space, bases))
    return found


def test_the_searches_of_the_readme_draw_frozen_stages_and_rates():
    """One ends poor trials early, over stages, rate and the backbone's factor; one is a population that thaws."""
    asha, pbt = searches_for_frozen_stages()
    assert (asha[0].scheduler, pbt[0].scheduler) == ("asha", "pbt") and pbt[0].concurrent == pbt[0].samples
    freeze = "model.backbone.freeze"
    assert list(asha[1]) == [freeze, "optim.lr", "optim.backbone_lr"] and list(pbt[1]) == [freeze, "optim.lr"]
    for options, space, bases in (asha, pbt):
        made = scheduler(options, space, rounds_of(bases.values()))
        (base,) = bases.values()
        stages = set()
        for _ in range(50):
            changes = {path: space[path].cleaned(one.sample()) for path, one in search_space.to_tune(space).items()}
            experiment, _ = apply(base, changes)
            stages.add(experiment.model.backbone.freeze)
            assert experiment.model.backbone.weights == "imagenet" and experiment.optim.lr == changes["optim.lr"]
        assert stages == set(space[freeze].values) and rounds_of(bases.values()) >= 3
        assert set(getattr(made, "_hyperparam_mutations", space)) == set(space)
