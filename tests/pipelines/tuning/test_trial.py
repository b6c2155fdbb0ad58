"""A trial: what it reports to Tune, where it goes on, what it says when it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking import client as client_module
from pipelines.tracking import runs as tracking
from pipelines.training.failures import OutOfMemory
from pipelines.tuning import progress, search_space
from pipelines.tuning.failures import forget_failure
from pipelines.tuning.plan import TrialConfig, run_id
from pipelines.tuning.trial import (
    TrialState,
    best_of,
    origin_of,
    origin_with_accumulation,
    run_trial,
    tune_result,
    unreported,
)
from pipelines.tuning.trial_config import ResolvedTrial
from tests.support.plans import plan_of, stored_plan, tags_of, tuned
from tests.support.worker_failures import GLOO, KILLED


def test_reports_have_an_objective_even_without_a_figure():
    values = {"step": 401, "val/pq": 12.5, "checkpoint": "uri"}
    result = tune_result(values, demo(), plan_of())
    assert (result["objective"], result["total"]) == (12.5, 1200)
    assert tune_result({"step": 400, "val/pq": math.nan}, demo(), plan_of())["objective"] == -1e9
    assert tune_result({"step": 400}, demo(), plan_of(mode="min", metric="val/loss/total"))["objective"] == 1e9


@pytest.mark.parametrize(("step", "round_"), [(100, 0), (399, 0), (400, 1), (500, 1), (800, 2), (1000, 3)])
def test_the_end_of_a_part_of_a_schedule_is_no_round(step: int, round_: int):
    """A trial that thaws is evaluated once more than others, and must not meet them a round early."""
    base = demo()
    experiment = replace(base, train=replace(base.train, steps=1000, validate_every=400))
    assert tune_result({"step": step, "val/pq": 1.0}, experiment, plan_of())["round"] == round_


def test_where_a_trial_begins():
    trial = ResolvedTrial(TrialConfig("a", "demo", {"optim.lr": 0.5}, {}), demo(), ((0, 0),))
    first = origin_of("7", None, trial)
    assert first == {"name": "trial-7", "begin": "", "step": 0, "micro_batch": 0}
    own = {"checkpoint": "x/step_000400", "step": 400, "origin": first, "changes": {"optim.lr": 0.5}}
    assert origin_of("7", own, trial) == first
    donor = {**own, "origin": {"name": "trial-8", "begin": "", "step": 0}}
    taken = origin_of("7", donor, trial)
    assert taken["name"].startswith("trial-7-") and (taken["begin"], taken["step"]) == ("x/step_000400", 400)
    assert origin_of("7", donor, trial) == taken  # started again before it reported anything
    changed = origin_of("7", {**own, "checkpoint": "y/step_000400", "changes": {"optim.lr": 0.1}}, trial)
    assert changed["name"] not in (first["name"], taken["name"]) and changed["begin"] == "y/step_000400"
    assert origin_of("7", {**own, "origin": taken}, trial) == taken


def test_a_trial_with_less_memory_goes_on_and_stays_so():
    trial = ResolvedTrial(TrialConfig("a", "demo", {"optim.lr": 0.5}, {}), demo(), ((0, 0),))
    origin = origin_of("7", None, trial)
    scratch = origin_with_accumulation(TrialState(origin, None), 4)
    assert scratch == {"name": "trial-7-accumulating-4", "begin": "", "step": 0, "micro_batch": 4}
    own = {"checkpoint": "x/step_000400", "step": 400, "origin": origin, "changes": {"optim.lr": 0.5}}
    later = origin_with_accumulation(TrialState(origin, own), 4)
    assert later == {**scratch, "begin": "x/step_000400", "step": 400}
    resumed = {**own, "checkpoint": "y/step_000800", "step": 800, "origin": later}
    assert origin_of("7", resumed, trial) == later
    assert origin_with_accumulation(TrialState(later, resumed), 2)["name"] == "trial-7-accumulating-2"
    taken = origin_of("9", resumed, trial)  # the same options need the same memory
    assert taken["micro_batch"] == 4 and taken["begin"] == "y/step_000800"
    old = {**own, "origin": {"name": "trial-7", "begin": "", "step": 0}}  # of an earlier version
    assert origin_of("7", old, trial)["micro_batch"] == 0


def kept(folder: Path, **steps: float) -> str:
    """A run's folder with the metrics of some checkpoints."""
    for step, value in steps.items():
        (folder / step).mkdir(parents=True, exist_ok=True)
        (folder / step / "metrics.json").write_text(json.dumps({"val/pq": value}))
    return str(folder)


def test_validations_that_tune_did_not_hear_of(tmp_path: Path):
    folder = kept(tmp_path / "trial-7", step_000400=1.0, step_000800=3.0, step_001200=2.0)
    validations = unreported(folder, 400)
    assert [(entry["step"], entry["val/pq"]) for entry in validations] == [(800, 3.0), (1200, 2.0)]
    assert validations[1]["checkpoint"] == f"{folder}/step_001200"
    assert unreported(folder, 1200) == [] == unreported(str(tmp_path / "none"), 0)


class FakeQueue:
    """Ray's, in this process."""

    def __init__(self, **options: Any) -> None:
        self.entries: list[Any] = []

    def put(self, entry: Any) -> None:
        self.entries.append(entry)

    def empty(self) -> bool:
        return not self.entries

    def get(self, timeout: float) -> Any:
        from ray.util.queue import Empty

        if not self.entries:
            raise Empty
        return self.entries.pop(0)

    def shutdown(self) -> None:
        self.entries.clear()


@contextmanager
def in_tune(monkeypatch: pytest.MonkeyPatch, train: Any, pointer: dict[str, Any] | None = None) -> Iterator[list]:
    """A trial's function outside Ray: what it tells Tune comes into the list, `train` stands in for Ray Train."""
    from ray import tune
    from ray.util import queue

    from pipelines.tuning import trial

    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(queue, "Queue", FakeQueue)
    monkeypatch.setattr(trial, "train", train)
    monkeypatch.setattr(trial, "_read_pointer", lambda checkpoint: pointer)
    monkeypatch.setattr(trial.concurrency, "wait_for_turn", lambda parent, trial_id: None)
    monkeypatch.setattr(tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "7"))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)

    def report_to_tune(values: dict[str, Any], checkpoint: Any) -> None:
        reported.append({**values, "pointer": json.loads((Path(checkpoint.path) / "pointer.json").read_text())})

    monkeypatch.setattr(tune, "report", report_to_tune)
    yield reported


def test_a_finished_training_is_told_to_tune_though_it_says_nothing(monkeypatch, tmp_path: Path):
    """Killed between Train's last checkpoint and Tune's saving, the trial finds nothing left to train."""
    plan = replace(plan_of("optim.lr=loguniform(1e-4,1)"), folder=str(tmp_path))
    kept(tmp_path / "trial-7", step_000800=3.0, step_001200=5.0)
    (tmp_path / "trial-7" / "run.json").write_text('{"run_id": "r"}')
    origin = {"name": "trial-7", "begin": "", "step": 0}
    pointer = {"checkpoint": "x/step_000800", "step": 800, "origin": origin, "changes": {"optim.lr": 0.5}}
    with in_tune(monkeypatch, lambda *given: None, pointer) as reported:
        run_trial({"optim.lr": 0.5}, plan)
    assert [(values["step"], values["round"], values["objective"]) for values in reported] == [(1200, 3, 5.0)]
    assert reported[0]["pointer"]["checkpoint"] == f"{tmp_path}/trial-7/step_001200"


def test_a_trial_out_of_memory_is_tried_with_less_from_where_it_was(monkeypatch, tmp_path: Path):
    plan = replace(plan_of("optim.lr=loguniform(1e-4,1)"), folder=str(tmp_path))
    runs: list[tuple[str, int, str]] = []

    def train(experiment: Any, preset: str, child: Any) -> None:
        runs.append((experiment.name, experiment.train.micro_batch, child.begin))
        if len(runs) == 1:
            kept(tmp_path / experiment.name, step_000300=1.0)
            raise MemoryError
        kept(tmp_path / experiment.name, step_001200=2.0)

    with in_tune(monkeypatch, train) as reported:
        run_trial({"optim.lr": 0.5}, plan)
    half = demo().train.batch // demo().train.workers // 2
    assert runs == [
        ("trial-7", 0, ""),
        (f"trial-7-accumulating-{half}", half, f"{tmp_path}/trial-7/step_000300"),
    ]
    assert [values["step"] for values in reported] == [300, 1200]
    with in_tune(monkeypatch, train, reported[1]["pointer"]):  # resumed, it is what it became
        run_trial({"optim.lr": 0.5}, plan)
    assert runs[2] == runs[1]


def test_a_trial_that_takes_over_another_says_so(monkeypatch, tmp_path: Path, mlflow_template):
    plan = stored_plan(tmp_path, mlflow_template)
    run = tracking.start(tracking.Tracking(uri=plan.parent.tracking_uri), tmp_path, parent=plan.parent.run_id)
    (tmp_path / "trial-7").mkdir()
    (tmp_path / "trial-7" / "run.json").write_text(json.dumps({"run_id": run.run_id}))
    origin = {"name": "trial-8", "begin": "", "step": 0}
    donor = {"checkpoint": "x/trial-8/step_000300", "step": 300, "origin": origin, "changes": {"optim.lr": 0.1}}
    with in_tune(monkeypatch, lambda e, *_: kept(tmp_path / e.name, step_001200=2.0), donor):
        run_trial({"optim.lr": 0.5}, plan)
    tags = tags_of(plan, run.run_id)
    assert tags["exchange_000300"] == "from x/trial-8/step_000300: lr=0.5" and tags["mlflow.runName"] == "lr=0.5"


def test_a_run_out_of_memory_ends_before_ray_train_starts_it_again():
    from pipelines.tuning.trial import forward_reports

    callback = forward_reports(FakeQueue())
    callback.after_exception(None, {0: GLOO, 1: KILLED})  # may be a lost machine
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        callback.after_exception(None, {1: torch.OutOfMemoryError("CUDA out of memory. Tried")})


def test_a_schedule_of_freezing_trains_part_by_part(monkeypatch, tmp_path: Path):
    """Each part in a folder of its own, from the end of the one before, and once through when it is started again."""
    plan = replace(plan_of("model.backbone.freeze=choice('5 2@500','0')"), folder=str(tmp_path))
    runs: list[tuple[str, int, int, str]] = []

    def train(experiment: Any, preset: str, child: Any) -> None:
        options = experiment.train
        runs.append((experiment.name, experiment.model.backbone.freeze, options.stop_after, child.begin))
        kept(tmp_path / experiment.name, **{f"step_{options.stop_after or options.steps:06d}": 1.0})

    with in_tune(monkeypatch, train) as reported:
        run_trial({"model.backbone.freeze": "5 2@500"}, plan)
    assert runs == [
        ("trial-7", 5, 500, ""),
        ("trial-7-from-500", 2, 0, f"{tmp_path}/trial-7/step_000500"),
    ]
    assert [values["step"] for values in reported] == [500, 1200] and {v["total"] for v in reported} == {1200}
    donor = {"checkpoint": "x/step_000800", "step": 800, "origin": {"name": "trial-8", "begin": "", "step": 0}}
    runs.clear()
    with in_tune(monkeypatch, train, {**donor, "changes": {"model.backbone.freeze": "0"}}):
        run_trial({"model.backbone.freeze": "5 2@500"}, plan)
    assert [(freeze, begin) for _, freeze, _, begin in runs] == [(2, "x/step_000800")]  # past the first part


def test_the_best_checkpoint_by_metric():
    kept = {"a/step_000010": {"val/pq": 3.0}, "b/step_000020": {"val/pq": math.nan}, "c/step_000005": {"val/pq": 5.0}}
    assert best_of(kept, "val/pq", "max") == "c/step_000005"
    assert best_of(kept, "val/pq", "min") == "a/step_000010"
    assert best_of(kept, "val/miou", "max") == "" == best_of({}, "val/pq", "max")


def test_a_failure_before_any_training_has_one_run_however_often(monkeypatch, tmp_path, mlflow_template):
    """A draw that makes no experiment has its reason, in a run that the next attempts go on with."""
    plan = stored_plan(tmp_path, mlflow_template)
    bad = {"optim.lr": "fast"}
    plan = replace(plan, space=search_space.parse(["optim.lr=choice(fast,slow)"]))
    for _ in range(2):
        with in_tune(monkeypatch, lambda *given: None), pytest.raises(RuntimeError, match=r"optim\.lr"):
            run_trial(bad, plan)
    client = client_module.connect(plan.parent.tracking_uri)
    children = client.search_runs([plan.parent.experiment_id], f"tags.`mlflow.parentRunId` = '{plan.parent.run_id}'")
    assert [child.info.run_id for child in children] == [run_id(plan.folder, "7")]
    tags = tags_of(plan, run_id(plan.folder, "7"))
    assert tags["status"] == "FAILED" and tags["state"] == "failed" and "optim.lr" in tags["reason"]
    assert progress.result_of(tuned("ERROR", config=bad), plan).reason.startswith("ValueError: --optim.lr")
    forget_failure(plan, "7")
    assert not (tmp_path / "failures" / "7.txt").exists() and tags_of(plan, run_id(plan.folder, "7"))["reason"] == ""
    assert run_id(plan.folder, "7")  # the run stays the trial's
