"""What a sweep refuses before anything starts, how many trials a cluster holds, and what it leaves."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.tracking import client
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.runs import Run
from pipelines.tuning import progress, search_space
from pipelines.tuning import sweep as tune
from pipelines.tuning.checks import Checker, check_options
from pipelines.tuning.concurrency import concurrency
from pipelines.tuning.plan import Plan, Sweep, Trials
from pipelines.tuning.resume import read_record, restorable
from pipelines.tuning.sweep import split_preset, sweep


@pytest.mark.parametrize(
    ("there", "workers", "cpus", "gpu", "wanted", "expected"),
    [
        ({"CPU": 4}, 1, 1.2, False, 0, 3),
        ({"CPU": 3}, 1, 1.2, False, 0, 2),
        ({"CPU": 2.42}, 1, 1.2, False, 0, 2),  # with the trials' own 0.01 exactly full
        ({"CPU": 2.41}, 1, 1.2, False, 0, 1),
        ({"CPU": 64, "GPU": 8}, 2, 1.2, True, 0, 4),
        ({"CPU": 5, "GPU": 8}, 2, 1.2, True, 0, 2),
        ({"CPU": 64, "GPU": 8}, 2, 1.2, True, 3, 3),
        ({"CPU": 64}, 2, 1.2, False, 99, 26),
        ({"CPU": 64, "memory": 8 << 30}, 2, 1.2, False, 0, 10),
    ],
)
def test_trials_at_once(there, workers, cpus, gpu, wanted, expected):
    assert concurrency(there, workers, cpus, gpu, wanted) == expected


def test_a_cluster_too_small_for_one_trial():
    with pytest.raises(ValueError, match=r"one trial needs 2\.41 CPUs .* the cluster has 2 CPUs and 0 GPUs; lower"):
        concurrency({"CPU": 2}, 2, 1.2, False)
    with pytest.raises(ValueError, match=r"process takes 768 MiB, and Ray counts 512 MiB"):
        concurrency({"CPU": 64, "memory": 512 << 20}, 2, 1.2, False)
    with pytest.raises(ValueError, match=r"and 4 GPUs"):
        concurrency({"CPU": 64, "GPU": 2}, 4, 1.2, True)


@pytest.mark.parametrize(
    ("options", "space", "message"),
    [
        (Sweep(searcher="grid"), "optim.lr=uniform(0,1)", "--searcher grid enumerates"),
        (Sweep(searcher="optuna"), "optim.lr=grid(1,2)", r"--searcher optuna draws values: write choice\(…\)"),
        (Sweep(scheduler="pbt", samples=4), "optim.lr=grid(1,2)", "--scheduler pbt draws values"),
        (Sweep(scheduler="pbt", samples=1), "optim.lr=uniform(0,1)", "--samples 4"),
        (Sweep(scheduler="pbt", samples=4, searcher="optuna"), "optim.lr=uniform(0,1)", "takes no --searcher optuna"),
        (Sweep(scheduler="pbt", samples=4), "preset=choice(a,b)", "leave preset out"),
        (Sweep(samples=0), "optim.lr=uniform(0,1)", "1 or more"),
    ],
)
def test_combinations_that_are_refused(options: Sweep, space: str, message: str):
    with pytest.raises(ValueError, match=message):
        check_options(options, search_space.parse([space]))


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        (["optim.rate=uniform(0,1)"], r"no option 'optim\.rate': Optim has optimiser"),
        (["optim=grid(1,2)"], "is a group of options"),
        (["train.steps=uniform(100,200)"], r"cannot take train\.steps=100.*use randint"),
        (["train.batch=grid(4,x)"], r"train\.batch"),
        (["optim.optimiser=choice(adam,adagrad)"], r"optim\.optimiser=adagrad"),
        (["model.backbone.freeze=grid(0,7)"], r"freeze=7.*7 is not within 0\.\.5"),
        (["model.backbone.freeze=grid(0,2)"], r"freeze=2.*frozen noise measures nothing.*--model\.backbone\.weights"),
        (["model.backbone.freeze=grid(0,'2 0@9')"], r"frozen noise"),
        (["train.freeze=grid((),('backbone.*',))"], r"frozen noise"),
        (["model.backbone.name=choice(resnet18,resnet1)"], "resnet1"),
        (["preset=choice(demo,dmo)"], "preset dmo is unknown"),
        ([], "nothing to search"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be(expressions: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        sweep(Sweep(sweep=tuple(expressions)), ["demo", "--storage", str(tmp_path)], PRESETS)
    assert list(tmp_path.iterdir()) == []


def test_models_are_built_once_each_and_presets_apply():
    trials = Trials({"demo": demo(), "other": demo()}, "demo")
    checker = Checker(trials)
    space = search_space.parse(
        ["optim.lr=grid(1e-3,1e-2)", "model.aspp_channels=grid(16,32)", "preset=grid(demo,other)"]
    )
    assert search_space.dry_run(space, checker) == 8 == len(checker.experiments)
    assert len(checker._built) == 2 and {e.optim.lr for e in checker.experiments} == {1e-3, 1e-2}
    frozen = {"model.backbone.freeze": 2}
    with pytest.raises(ValueError, match="frozen noise"):
        checker.check("demo", frozen)
    assert Checker(trials, allow_lacking=True).check("demo", frozen).model.backbone.freeze == 2


def test_the_preset_may_be_left_out():
    assert split_preset(["--train.steps", "5"]) == ("demo", ["--train.steps", "5"])
    assert split_preset(["other", "--train.steps", "5"]) == ("other", ["--train.steps", "5"])
    assert split_preset([]) == ("demo", [])


def test_names_of_sweeps(tmp_path: Path):
    folder, record = str(tmp_path / "one"), {"sweep": ["a=1"], "arguments": ["demo"]}
    assert read_record(folder, "one", record, resume=False) == {}
    with pytest.raises(ValueError, match="there is no sweep 'one'"):
        read_record(folder, "one", record, resume=True)
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="exists and is no sweep"):
        read_record(folder, "one", record, resume=False)
    (tmp_path / "one" / "sweep.json").write_text(json.dumps({"run_id": "7", **record}))
    assert read_record(folder, "one", record, resume=True)["run_id"] == "7"
    with pytest.raises(ValueError, match="go on with --resume"):
        read_record(folder, "one", record, resume=False)
    with pytest.raises(ValueError, match="other options: sweep was a=1, is a=2"):
        read_record(folder, "one", {**record, "sweep": ["a=2"]}, resume=True)
    (tmp_path / "one" / "sweep.json").write_text(json.dumps({"run_id": "7", **record, "metric": "val/pq"}))
    with pytest.raises(ValueError, match="metric was val/pq, is val/miou"):
        read_record(folder, "one", {**record, "metric": "val/miou"}, resume=True)


def test_the_job_lists_its_options(capsys):
    from jobs.tune import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and all(
        o in told for o in ("--sweep", "--scheduler", "--study", "--resume", "--seeds")
    )


def execute_with(monkeypatch: pytest.MonkeyPatch, options: Sweep, concurrent: int, folder: Path) -> dict[str, Any]:
    """What `sweep` would start: everything of Ray and MLflow is left out."""
    found: dict[str, Any] = {"opened": False}

    def join(wanted: int, experiments: Any) -> int:
        found["experiments"] = list(experiments)
        return concurrent

    def ready(base: Any, at_once: int, first: Any, metric: str, mode: str) -> Any:
        found["score"] = (metric, mode)
        return base

    def open_parent(*given: Any) -> Run:
        found["opened"] = True
        return Run("", "parent", "")

    def run(options: Sweep, plan: Any, at_once: int, rounds: int) -> list[Any]:
        found.update(plan=plan, rounds=rounds)
        return []

    monkeypatch.setattr(tune, "join_cluster", join)
    monkeypatch.setattr(tune, "ready", ready)
    monkeypatch.setattr(tune, "open_parent", open_parent)
    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "conclude", lambda *given: None)
    monkeypatch.setattr(tune.runs, "ending", lambda parent: nullcontext())
    found["error"] = ""
    try:
        sweep(options, ["demo", "--storage", str(folder), "--name", "small"], PRESETS)
    except ValueError as error:
        found["error"] = str(error)
    return found


def test_all_that_may_be_drawn_counts(monkeypatch, tmp_path: Path):
    """For the cluster's room and for the length of trials, and not only what the options outside the sweep say."""
    expressions = ("train.workers=grid(1,4)", "train.steps=grid(1000,4000)")
    found = execute_with(monkeypatch, Sweep(sweep=expressions, metric="val/miou"), 2, tmp_path)
    assert {e.train.workers for e in found["experiments"]} == {1, 4} and found["score"] == ("val/miou", "max")
    assert found["rounds"] == 4000 // demo().train.validate_every
    record = json.loads((tmp_path / "small" / "sweep.json").read_text())
    assert record["sweep"] == list(expressions) and record["samples"] == 1 and "concurrent" not in record


def test_a_population_trains_at_once_and_keeps_what_others_may_take_over(monkeypatch, tmp_path: Path):
    options = Sweep(sweep=("optim.lr=loguniform(1e-4,1)",), samples=4, scheduler="pbt")
    few = execute_with(monkeypatch, options, 3, tmp_path / "a")
    assert "--samples 4 must train at once, and 3 trials do; lower --samples to 3" in few["error"] and not few["opened"]
    found = execute_with(monkeypatch, options, 4, tmp_path / "b")
    assert found["error"] == "" and found["plan"].bases["demo"].train.keep == found["rounds"] + 1 == 4


def test_a_population_has_weights_of_one_shape():
    trials = Trials(
        {"demo": demo()}, "demo", search_space.parse(["optim.lr=uniform(0,1)", "model.aspp_channels=choice(16,32)"])
    )
    with pytest.raises(ValueError, match=r"pbt: model\.aspp_channels changes the shapes"):
        Checker(trials).check_exchange()
    space = search_space.parse(["optim.lr=uniform(0,1)", "model.backbone.freeze=choice(0,2,5)"])
    Checker(replace(trials, space=space), allow_lacking=True).check_exchange()


def test_the_largest_trial_sets_how_many_run_at_once(monkeypatch):
    import ray

    from pipelines.tuning import concurrency as room

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 10.0})
    monkeypatch.setattr(room.session, "connect", lambda *given: None)
    base = demo()

    def needing(**options: Any) -> Any:
        return replace(base, train=replace(base.train, cpus_per_worker=1.0, **options))

    data = base.feed.tasks * base.feed.cpus
    one, four = needing(workers=1), needing(workers=4)
    assert room.join_cluster(0, [one]) == int(10 // (1 + data + 0.01))
    assert room.join_cluster(0, [one, four]) == int(10 // (4 * (1 + data) + 0.01))
    greedy = replace(one, feed=replace(one.feed, tasks=8, cpus=1.0))
    assert room.join_cluster(0, [one, greedy]) == 1


def test_data_that_is_swept_is_prepared_before_anything_starts(monkeypatch, tmp_path: Path):
    """Every set that may be drawn, once; the preset needs none of its own then, and else is refused without."""
    seen: list[str] = []

    def ready(base: Any, *given: Any) -> Any:
        if not base.data.root:
            raise ValueError("data.root: this preset needs data")
        seen.append(base.data.root)
        return base

    monkeypatch.setattr(tune, "ready", ready)
    bare = replace(demo(), data=replace(demo().data, root=""))
    drawn = [replace(bare, data=replace(bare.data, root=root)) for root in ("a", "b", "a")]
    space = search_space.parse(["data.root=grid(a,b)", "optim.lr=grid(1e-3,2e-3)"])
    bases = tune.ready_bases(Sweep(), Trials({"demo": bare}, "demo", space, experiments=tuple(drawn)), 1)
    assert set(seen[:2]) == {"a", "b"} and bases["demo"].data.root == "a" and seen.count("b") == 1
    with pytest.raises(ValueError, match=r"data\.root"):
        tune.ready_bases(Sweep(), Trials({"demo": bare}, "demo", experiments=(bare,)), 1)


def test_scenes_and_a_bucket_are_refused_before_ray(monkeypatch):
    monkeypatch.setattr(tune, "join_cluster", lambda *given: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match="drawn into a local folder, but storage is s3://bucket/x"):
        sweep(Sweep(sweep=("optim.lr=uniform(0,1)",)), ["demo", "--storage", "s3://bucket/x"], PRESETS)


def test_what_tune_left_to_go_on_from(tmp_path: Path, caplog):
    assert not restorable(str(tmp_path))
    state = tmp_path / "tune"
    state.mkdir()
    (state / "tuner.pkl").write_bytes(b"x")
    assert not restorable(str(tmp_path))  # killed before anything was saved
    (state / "experiment_state-2026-01-01_00-00-00.json").write_text('{"trial_data": []}')
    assert restorable(str(tmp_path))
    broken = state / "experiment_state-2026-01-02_00-00-00.json"
    broken.write_text('{"trial_da')
    assert restorable(str(tmp_path)) and not broken.exists() and "cut off" in caplog.text


def test_the_best_model_is_logged_once_with_its_own_view(monkeypatch, mlflow_template, tmp_path: Path):
    """In the size that its own trial saw images, not the one of the first preset."""
    from pipelines.tracking import model, runs
    from pipelines.tuning import results

    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    parent = runs.start(runs.Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    logged: list[int] = []

    def log_model(run: Any, record: Any, resize: Any, **names: Any) -> str:
        logged.append(resize.short)
        return f"models:/m-{len(logged)}"

    monkeypatch.setattr(model, "log_model", log_model)
    monkeypatch.setattr(results, "load_checkpoint", lambda uri: {"experiment": {"resize.short": 64, "optim.lr": 1.0}})
    assert results.log_best(parent, "a/step_000010", demo()) == "models:/m-1"
    assert results.log_best(parent, "a/step_000010", demo()) == "models:/m-1" and logged == [64]
    assert results.log_best(parent, "b/step_000010", demo()) == "models:/m-2"
    tracker = tracker_module.Tracker(parent)
    for value in (50.0, 40.0):
        tracker.figures({"best/val/pq": value})
    run = client.connect(parent.tracking_uri).get_run(parent.run_id)
    assert run.data.tags["best_checkpoint"] == "b/step_000010" and run.data.metrics["best/val/pq"] == 40.0


def test_an_interrupted_sweep_is_no_finished_one(monkeypatch, tmp_path: Path):
    """Tune returns from the first Ctrl-C as from an end."""
    import ray

    closed: list[Any] = []
    lines = [progress.Line("1", "a", "finished"), progress.Line("2", "b", "waiting")]
    monkeypatch.setattr(tune, "tuner_of", lambda *given: SimpleNamespace(fit=lambda: None))
    monkeypatch.setattr(tune, "create_trial_limit", lambda parent, most: "trial_limit")
    monkeypatch.setattr(tune, "close_children", closed.append)
    monkeypatch.setattr(tune.progress, "read", lambda folder: lines)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "kill", lambda handle: closed.append(handle))
    plan = Plan({"demo": demo()}, "demo", str(tmp_path), Run("", "parent", ""))
    with pytest.raises(KeyboardInterrupt):
        tune.run(Sweep(), plan, 1, 1)
    assert closed == [plan.parent, "trial_limit"]
    lines.pop()
    assert tune.run(Sweep(), plan, 1, 1) == lines
