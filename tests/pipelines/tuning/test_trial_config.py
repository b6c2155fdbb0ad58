"""The configuration of a trial: values drawn by Ray Tune over a base experiment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.state import more_accumulation
from pipelines.tuning.plan import TrialConfig
from pipelines.tuning.trial_config import apply, fit_workers, resolve, with_micro_batch
from tests.support.plans import plan_of


def test_what_tune_draws_becomes_an_experiment():
    plan = plan_of("optim.lr=loguniform(1e-4,1)", "train.batch=quniform(2,8,2)", "optim.ema=grid(0.5)")
    trial = resolve({"optim.lr": 0.01, "train.batch": 4.0, "optim.ema": 0.5}, plan)
    assert (trial.experiment.optim.lr, trial.experiment.train.batch, trial.experiment.optim.ema) == (0.01, 4, 0.5)
    assert trial.config.label == "lr=0.01 batch=4" and trial.config.params == {"lr": 0.01, "batch": 4}
    assert trial.config.preset == "demo" and trial.schedule == ((0, 0),)
    other = resolve({"preset": "other"}, plan_of("preset=grid(demo,other)"))
    assert other.config.preset == "other" and other.config.changes == {}
    assert resolve({"optim.ema": 0.5}, plan_of("optim.ema=0.5")).config.label == "as given"


def test_given_trials_are_taken_as_they_are():
    config = TrialConfig("first", "demo", {"optim.lr": 0.5}, {"row": "first"})
    trial = resolve({"row": 0}, plan_of(configs=(config,)))
    assert trial.config is config and trial.experiment.optim.lr == 0.5


def test_a_schedule_of_freezing_is_split_off():
    experiment, schedule = apply(demo(), {"model.backbone.freeze": "5 2@100"})
    assert experiment.model.backbone.freeze == 5 and schedule == ((0, 5), (100, 2))
    with pytest.raises(ValueError, match=r"changes at step 1200, training ends before"):
        apply(demo(), {"model.backbone.freeze": "5 2@1200"})
    with pytest.raises(ValueError, match=r"no option 'optim\.rate'"):
        apply(demo(), {"optim.rate": 1})


@pytest.mark.parametrize(("batch", "workers", "fitting"), [(8, 2, 2), (5, 2, 1), (6, 4, 3), (4, 8, 4), (1, 2, 1)])
def test_workers_share_the_batch_equally(batch: int, workers: int, fitting: int):
    base = demo()
    assert fit_workers(replace(base, train=replace(base.train, batch=batch, workers=workers))).train.workers == fitting


def test_more_accumulation_halves_what_goes_through_at_once():
    base = demo()
    first = more_accumulation(replace(base, train=replace(base.train, batch=12, workers=2)))
    assert first is not None and first.train.micro_batch == 3
    second = more_accumulation(first)
    assert second is not None and second.train.micro_batch == 1 and more_accumulation(second) is None


def test_images_at_once_are_those_that_memory_holds():
    assert with_micro_batch(demo(), 4).train.micro_batch == 4
    assert with_micro_batch(demo(), 0) == demo()
