"""What a sweep refuses before anything starts, how many trials a cluster holds, and (slow) a whole sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.presets import PRESETS
from pipelines.presets.deeplab import demo
from pipelines.sweeps import search
from pipelines.sweeps.room import concurrency
from pipelines.tune import Checker, Sweep, Trials, check_options, read_record, split_preset, sweep

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 2 --train.batch 4 --train.log-every 1
--train.workers 1 --train.steps 4 --train.validate-every 2 --train.overlays 0
"""


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
    ],
)
def test_trials_at_once(there, workers, cpus, gpu, wanted, expected):
    assert concurrency(there, workers, cpus, gpu, wanted) == expected


def test_a_cluster_too_small_for_one_trial():
    with pytest.raises(ValueError, match=r"one trial needs 2\.41 CPUs .* the cluster has 2 CPUs and 0 GPUs; lower"):
        concurrency({"CPU": 2}, 2, 1.2, False)
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
        check_options(options, search.parse([space]))


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
    space = search.parse(["optim.lr=grid(1e-3,1e-2)", "model.aspp_channels=grid(16,32)", "preset=grid(demo,other)"])
    assert search.dry_run(space, checker) == 8 == len(checker.experiments)
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
    with pytest.raises(ValueError, match="was started with a=1, not a=2"):
        read_record(folder, "one", {**record, "sweep": ["a=2"]}, resume=True)


def test_the_job_lists_its_options(capsys):
    from jobs.tune import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and all(
        o in told for o in ("--sweep", "--scheduler", "--study", "--resume", "--seeds")
    )


@pytest.mark.parametrize("kind", ["none", "asha", "hyperband", "median", "pbt"])
def test_every_scheduler_is_made(kind: str):
    from pipelines.sweeps.schedulers import scheduler
    from pipelines.sweeps.trial import Plan
    from pipelines.tracking import Run

    space = search.parse(["optim.lr=loguniform(1e-4,1e-2)", "model.backbone.freeze=choice(0,2,5)"])
    plan = Plan({"demo": demo()}, "demo", "/nowhere", Run("", "", ""), space)
    made = scheduler(Sweep(scheduler=kind, samples=4), plan)  # type: ignore[arg-type]
    assert (made is None) == (kind == "none")
    if kind == "pbt":
        changed = made._custom_explore_fn({"optim.lr": 1.0, "model.backbone.freeze": 2, "seed": 1})
        assert changed == {"optim.lr": 1e-2, "model.backbone.freeze": 2, "seed": 1}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_with_a_trial_that_fails_and_its_resumption(ray_cluster, scenes16, mlflow_template, tmp_path, capsys):
    """Trial by trial in MLflow, the failed one with its reason; `--resume` repeats that one alone."""
    import shutil

    from jobs.tune import main
    from pipelines import tracking

    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    places = ["--storage", str(tmp_path), "--data.root", str(scenes16), "--tracking.uri", uri, "--name", "small"]
    arguments = ["demo", *places, *TINY.split(), "--sweep", "optim.lr=grid(1e-3,1e12)", "--concurrent", "2"]
    arguments += ["--train.max-failures", "0"]
    done = main(arguments)
    lines = {line.label: line for line in done.lines}
    good = lines["lr=0.001"]
    assert good.state == "finished" and good.step == good.total == 4 and done.best == good
    client = tracking.connect(uri)
    runs = client.search_runs([client.get_experiment_by_name("panoptic").experiment_id], "")
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == done.parent.run_id}
    assert set(children) == set(lines) and children["lr=0.001"].info.status == "FINISHED"
    assert children["lr=0.001"].data.params == {"lr": "0.001"} and children["lr=0.001"].data.tags["state"] == "finished"
    if lines["lr=1e+12"].state == "failed":
        assert children["lr=1e+12"].info.status == "FAILED" and children["lr=1e+12"].data.tags["reason"]
    assert done.model.startswith("models:/") and done.checkpoint.endswith("step_000004")
    stamps = {path: path.stat().st_mtime_ns for path in Path(done.folder).glob("trial-*/step_*/metrics.json")}
    again = main([*arguments, "--resume"])
    assert {line.label for line in again.lines} == set(lines) and again.parent.run_id == done.parent.run_id
    mine = [path for path in stamps if f"trial-{good.identity}" in str(path)]
    assert mine and all(path.stat().st_mtime_ns == stamps[path] for path in mine)
