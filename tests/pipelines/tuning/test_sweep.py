"""A sweep from its options to Ray Tune: what it refuses before anything starts, what it starts, how it ends."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking import client, runs
from pipelines.tracking.runs import Run
from pipelines.tuning import progress, search_space
from pipelines.tuning import sweep as tune
from pipelines.tuning.config import split_preset
from pipelines.tuning.plan import Plan, SweepOptions, Trials
from pipelines.tuning.sweep import sweep


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        (["optim.rate=uniform(0,1)"], r"no option 'optim\.rate': Optim has optimiser"),
        (["optim=grid(1,2)"], "is a group of options"),
        (["train.steps=uniform(100,200)"], r"cannot take train\.steps=uniform\(100, 200\): .*use randint"),
        (["train.batch=grid(4,x)"], r"train\.batch"),
        (["optim.optimiser=choice(adam,adagrad)"], r"optim\.optimiser=adagrad"),
        (["model.backbone.freeze=grid(0,7)"], r"freeze=7.*7, but it must be 0 or more and at most 5"),
        (["model.backbone.freeze=grid(0,2)"], r"freeze=2.*frozen noise measures nothing.*--model\.backbone\.weights"),
        (["model.backbone.freeze=grid(0,'2 0@9')"], r"frozen noise"),
        (["train.freeze=grid((),('backbone.*',))"], r"frozen noise"),
        (["model.backbone.name=choice(resnet18,resnet1)"], "resnet1"),
        (["preset=choice(demo,dmo)"], "unknown preset 'dmo'; near: demo"),
        ([], "nothing to search"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be(expressions: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        sweep(SweepOptions(sweep=tuple(expressions)), ["demo", "--storage", str(tmp_path)], PRESETS)
    assert list(tmp_path.iterdir()) == []


def test_the_preset_may_be_left_out():
    assert split_preset(["--train.steps", "5"]) == ("demo", ["--train.steps", "5"])
    assert split_preset(["other", "--train.steps", "5"]) == ("other", ["--train.steps", "5"])
    assert split_preset([]) == ("demo", [])


def test_the_job_lists_its_options(capsys):
    from jobs.tune import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and all(
        o in told for o in ("--sweep", "--scheduler", "--study", "--resume", "--seeds")
    )


def execute_with(
    monkeypatch: pytest.MonkeyPatch, options: SweepOptions, concurrent: int, folder: Path
) -> dict[str, Any]:
    """What `sweep` would start: everything of Ray and MLflow is left out."""
    started: dict[str, Any] = {"opened": False}

    def join(wanted: int, experiments: Any) -> int:
        started["experiments"] = list(experiments)
        return concurrent

    def ready(base: Any, at_once: int, first: Any, metric: str, mode: str, sets: Any) -> Any:
        started["score"] = (metric, mode)
        return base

    def open_parent(*given: Any) -> Run:
        started["opened"] = True
        return Run("", "parent", "")

    def run(options: SweepOptions, plan: Any, at_once: int, rounds: int) -> list[Any]:
        started.update(plan=plan, rounds=rounds)
        return []

    monkeypatch.setattr(tune, "join_cluster", join)
    monkeypatch.setattr(tune, "prepare_base", ready)
    monkeypatch.setattr(tune, "open_parent", open_parent)
    monkeypatch.setattr(tune, "run_trials", run)
    monkeypatch.setattr(tune, "conclude", lambda *given: None)
    monkeypatch.setattr(tune.runs, "ending", lambda parent: nullcontext())
    started["error"] = ""
    try:
        sweep(options, ["demo", "--storage", str(folder), "--name", "small"], PRESETS)
    except ValueError as error:
        started["error"] = str(error)
    return started


def test_the_name_of_a_sweep_is_checked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tune.search_space, "dry_run", lambda *given: pytest.fail("trials were drawn"))
    options = SweepOptions(sweep=("optim.lr=grid(0.1,0.2)",))
    with pytest.raises(ValueError, match=r"^--name '\.\./x': a name has"):
        sweep(options, ["demo", "--storage", str(tmp_path), "--name", "../x"], PRESETS)


def test_all_that_may_be_drawn_counts(monkeypatch, tmp_path: Path):
    """For what the cluster must hold and for the length of trials, not only what the options outside the sweep say."""
    expressions = ("train.workers=grid(1,4)", "train.steps=grid(1000,4000)")
    started = execute_with(monkeypatch, SweepOptions(sweep=expressions, metric="val/miou"), 2, tmp_path)
    assert {e.train.workers for e in started["experiments"]} == {1, 4} and started["score"] == ("val/miou", "max")
    assert started["rounds"] == 4000 // demo().train.validate_every
    record = json.loads((tmp_path / "small" / "sweep.json").read_text())
    assert record["sweep"] == list(expressions) and record["samples"] == 1 and "concurrent" not in record


def test_a_population_trains_at_once_and_keeps_what_others_may_take_over(monkeypatch, tmp_path: Path):
    options = SweepOptions(sweep=("optim.lr=loguniform(1e-4,1)",), samples=4, scheduler="pbt")
    few = execute_with(monkeypatch, options, 3, tmp_path / "a")
    assert "--samples 4 must train at once, and 3 trials do; lower --samples to 3" in few["error"] and not few["opened"]
    started = execute_with(monkeypatch, options, 4, tmp_path / "b")
    assert started["error"] == "" and started["plan"].bases["demo"].train.keep == started["rounds"] + 1 == 4


def test_data_that_is_swept_is_prepared_before_anything_starts(monkeypatch, tmp_path: Path):
    """Every set that may be drawn, once; the preset needs none of its own then, and else is refused without."""
    seen: list[str] = []

    def ready(base: Any, *given: Any) -> Any:
        if not base.data.root:
            raise ValueError("data.root: this preset needs data")
        seen.append(base.data.root)
        return base

    monkeypatch.setattr(tune, "prepare_base", ready)
    bare = replace(demo(), data=replace(demo().data, root=""))
    drawn = [replace(bare, data=replace(bare.data, root=root)) for root in ("a", "b", "a")]
    space = search_space.parse(["data.root=grid(a,b)", "optim.lr=grid(1e-3,2e-3)"])
    bases, _ = tune.prepare_bases(SweepOptions(), Trials({"demo": bare}, "demo", space, experiments=tuple(drawn)), 1)
    assert set(seen[:2]) == {"a", "b"} and bases["demo"].data.root == "a" and seen.count("b") == 1
    with pytest.raises(ValueError, match=r"data\.root"):
        tune.prepare_bases(SweepOptions(), Trials({"demo": bare}, "demo", experiments=(bare,)), 1)


def test_the_run_of_a_sweep_names_its_data(mlflow_store: str, tmp_path: Path):
    base = replace(demo(), storage=str(tmp_path), tracking=runs.Tracking(mlflow_store))
    sets = [runs.DataSet("street", "ab12", "/shards/street/train", "train")]
    folder = str(tmp_path / "small")
    parent = tune.open_parent(SweepOptions(), Trials({"demo": base}, "demo"), {"demo": base}, sets, folder, "small", {})
    (used,) = client.connect(mlflow_store).get_run(parent.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("street", "ab12")


def test_scenes_and_a_bucket_are_refused_before_ray(monkeypatch):
    monkeypatch.setattr(tune, "join_cluster", lambda *given: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match="drawn into a local folder, but storage is s3://bucket/x"):
        sweep(SweepOptions(sweep=("optim.lr=uniform(0,1)",)), ["demo", "--storage", "s3://bucket/x"], PRESETS)


def test_an_interrupted_sweep_is_no_finished_one(monkeypatch, tmp_path: Path):
    """Tune returns from the first Ctrl-C as from an end."""
    import ray

    closed: list[Any] = []
    results = [progress.TrialResult("1", "a", "finished"), progress.TrialResult("2", "b", "waiting")]
    monkeypatch.setattr(tune, "tuner_of", lambda *given: SimpleNamespace(fit=lambda: None))
    monkeypatch.setattr(tune, "start_limiter", lambda parent, most: "limiter")
    monkeypatch.setattr(tune, "close_children", closed.append)
    monkeypatch.setattr(tune.progress, "read", lambda folder: results)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "kill", lambda handle: closed.append(handle))
    plan = Plan({"demo": demo()}, "demo", str(tmp_path), Run("", "parent", ""))
    with pytest.raises(KeyboardInterrupt):
        tune.run_trials(SweepOptions(), plan, 1, 1)
    assert closed == [plan.parent, "limiter"]
    results.pop()
    assert tune.run_trials(SweepOptions(), plan, 1, 1) == results
