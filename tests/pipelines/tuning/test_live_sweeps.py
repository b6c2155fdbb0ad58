"""Whole sweeps on drawn scenes: failures, resumption, signals, pruning."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.tracking import client as client_module
from pipelines.tracking.models_of_run import KIND
from pipelines.tuning import concurrency
from tests.support.train_record import committed

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 2 --train.batch 4 --train.log-every 1
--train.workers 1 --train.steps 4 --train.validate-every 2 --train.overlays 0
"""


def arguments_of(folder: Path, data: Path, template: Path, *more: str) -> list[str]:
    """Arguments of a small sweep with a store of its own."""
    shutil.copy(template, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    places = ["--storage", str(folder), "--data.root", str(data), "--tracking.uri", uri, "--name", "small"]
    return ["demo", *places, *TINY.split(), *more]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_sweep_with_a_pruned_trial_and_one_that_fails(ray_cluster, scenes16, mlflow_template, tmp_path: Path):
    """What learns nothing is ended at its first validation, and the next gets its resources. That one fails: MLflow
    has the reason, and `--resume` repeats it alone. At the end all that trials held is free again."""
    import ray

    from jobs.tune import main

    arguments = arguments_of(tmp_path, scenes16, mlflow_template, "--concurrent", "1", "--train.max-failures", "0")
    arguments += ["--sweep", "optim.lr=grid(5e-3,1e-9,1e30)", "--engine.max-skipped", "1"]
    arguments += ["--scheduler", "asha", "--reduction", "2", "--metric", "val/loss/total", "--mode", "min"]
    done = main(arguments)
    results = {result.label: result for result in done.trials}
    assert {label: (result.state, result.step) for label, result in results.items() if label != "lr=1e+30"} == {
        "lr=0.005": ("finished", 4),
        "lr=1e-09": ("pruned", 2),
    }
    good, pruned, bad = (results[label] for label in ("lr=0.005", "lr=1e-09", "lr=1e+30"))
    assert bad.state == "failed" and "not finite" in bad.reason and done.best == good
    client = client_module.connect(done.parent.tracking_uri)
    query = f"tags.`mlflow.parentRunId` = '{done.parent.run_id}'"
    children = {run.info.run_name: run for run in client.search_runs([done.parent.experiment_id], query)}
    assert {label: (run.info.status, run.data.tags["state"]) for label, run in children.items()} == {
        good.label: ("FINISHED", "finished"),
        pruned.label: ("KILLED", "pruned at step 2 of 4"),
        bad.label: ("FAILED", "failed"),
    }
    assert (
        children[good.label].data.params == {"lr": "0.005"} and "not finite" in children[bad.label].data.tags["reason"]
    )
    assert done.model.startswith("models:/") and done.checkpoint.endswith("step_000004")
    light = [m for m in client.search_logged_models([done.parent.experiment_id]) if m.model_type == KIND]
    assert {m.source_run_id for m in light} == {children[trial.label].info.run_id for trial in (good, pruned)}
    assert all("val/pq" in {metric.key for metric in model.metrics} for model in light)
    stamps = {path: path.stat().st_mtime_ns for path in Path(done.folder).glob("trial-*/step_*/metrics.json")}
    again = main([*arguments, "--resume"])
    assert {result.label for result in again.trials} == set(results) and again.parent.run_id == done.parent.run_id
    mine = [path for path in stamps if f"trial-{bad.identity}" not in str(path)]
    assert len(mine) >= 2 and all(path.stat().st_mtime_ns == stamps[path] for path in mine)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_survives_whatever_ends_it(ray_cluster, scenes16, mlflow_template, tmp_path: Path):
    """Ctrl-C and SIGTERM close the runs of children and say how to go on; SIGKILL leaves them open. Then what waited
    and what ran come to their end, and what had finished is not trained again."""
    from jobs.tune import main

    arguments = arguments_of(tmp_path, scenes16, mlflow_template, "--sweep", "optim.lr=grid(1e-3,2e-3)")
    arguments += ["--concurrent", "1"]

    def ended_by(number: int, ready: Callable[[], object], *more: str) -> int:
        """The exit code of the sweep, which gets a signal as soon as `ready` returns something."""
        job = subprocess.Popen([sys.executable, "jobs/tune.py", *arguments, *more], cwd=Path(__file__).parents[3])
        try:
            deadline = time.monotonic() + 200
            while not ready():
                assert job.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            job.send_signal(number)
            return job.wait(90)
        finally:
            job.kill()

    def begun() -> list[Path]:
        """Trials that have an MLflow run."""
        return list(tmp_path.glob("small/trial-*/run.json"))

    def kept(step: int) -> list[Path]:
        """Trials that go on from this step, if they are ended now."""
        return [trial for trial in tmp_path.glob("small/trial-*") if f"step_{step:06d}" in committed(trial)]

    def stamps() -> dict[Path, int]:
        """When each checkpoint was written, those only that Ray Train lists: others may be torn."""
        trials = {trial: committed(trial) for trial in tmp_path.glob("small/trial-*")}
        files = [trial / name / "metrics.json" for trial, names in trials.items() for name in names]
        return {file: file.stat().st_mtime_ns for file in files}

    def states() -> tuple[str, list[tuple[str, str]]]:
        """Status of the parent, status and state of each child."""
        client = client_module.connect(f"sqlite:///{tmp_path}/mlflow.db")
        parent = json.loads((tmp_path / "small" / "sweep.json").read_text())["run_id"]
        experiment = client.get_experiment_by_name("panoptic").experiment_id
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        statuses = [(child.info.status, child.data.tags.get("state", "")) for child in children]
        return client.get_run(parent).info.status, sorted(statuses)

    assert ended_by(signal.SIGINT, begun) == 130
    assert states() == ("KILLED", [("KILLED", "interrupted")])
    assert ended_by(signal.SIGTERM, lambda: kept(2), "--resume") == 143
    assert states() == ("KILLED", [("KILLED", "interrupted")])
    ended_by(signal.SIGKILL, lambda: kept(4), "--resume")
    first = stamps()
    assert states()[0] == "RUNNING"
    done = main([*arguments, "--resume"])
    assert [(result.state, result.step) for result in done.trials] == [("finished", 4)] * 2
    assert states() == ("FINISHED", [("FINISHED", "finished")] * 2)
    assert len(first) >= 2 and {path: path.stat().st_mtime_ns for path in first} == first


@pytest.mark.slow
def test_the_limiter_is_where_trials_find_it(ray_cluster):
    """In every process of the job, and only as long as the sweep."""
    import ray

    limiter = concurrency.start_limiter("parent", 1)
    assert ray.get(limiter.update.remote(["a", "b"])) == ["a"]
    wait = ray.remote(num_cpus=0)(concurrency.wait_for_turn)
    ray.get(wait.remote("parent", "a"), timeout=60)
    waiting = wait.remote("parent", "b")
    assert ray.wait([waiting], timeout=3)[0] == []
    limiter.update.remote(["b"])
    ray.get(waiting, timeout=60)
    ray.kill(limiter)
    ray.get(wait.remote("other", "b"), timeout=60)
