"""The configuration of a trial: values drawn by Ray Tune over a base experiment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.presets.panoptic_deeplab import demo
from pipelines.tuning.plan import Row
from pipelines.tuning.trial_config import apply, fit_workers, more_accumulation, resolve
from tests.support.plans import plan_of


def test_what_tune_draws_becomes_an_experiment():
    plan = plan_of("optim.lr=loguniform(1e-4,1)", "train.batch=quniform(2,8,2)", "optim.ema=grid(0.5)")
    found = resolve({"optim.lr": 0.01, "train.batch": 4.0, "optim.ema": 0.5}, plan)
    assert (found.experiment.optim.lr, found.experiment.train.batch, found.experiment.optim.ema) == (0.01, 4, 0.5)
    assert found.row.label == "lr=0.01 batch=4" and found.row.params == {"lr": 0.01, "batch": 4}
    assert found.row.preset == "demo" and found.schedule == ((0, 0),)
    other = resolve({"preset": "other"}, plan_of("preset=grid(demo,other)"))
    assert other.row.preset == "other" and other.row.changes == {}
    assert resolve({"optim.ema": 0.5}, plan_of("optim.ema=0.5")).row.label == "as given"


def test_given_rows_are_taken_as_they_are():
    row = Row("first", "demo", {"optim.lr": 0.5}, {"row": "first"})
    found = resolve({"row": 0}, plan_of(rows=(row,)))
    assert found.row is row and found.experiment.optim.lr == 0.5


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
