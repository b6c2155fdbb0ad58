"""Data that the driver refuses, and (slow) runs that are killed or continued."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipelines.tracking import client as client_module
from tests.support.training_runs import descendants, driver, history, record, status, wait_for

if TYPE_CHECKING:
    from panoptic.segmentation import Categories
    from pipelines.training.driver import Outcome

ROOT = Path(__file__).resolve().parents[3]

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 4 --train.batch 4 --train.log-every 1
--train.validate-every 10 --train.overlays 1
"""


def test_a_name_is_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    from pipelines.presets import PRESETS
    from pipelines.training import driver

    monkeypatch.setattr(driver.session, "connect", lambda *given: pytest.fail("a session was started"))
    for name in ("../x", "shards", "a\nb"):
        with pytest.raises(ValueError, match=r"^--name"):
            driver.train(replace(PRESETS["demo"](), name=name), "demo")


def test_data_that_cannot_be_found_is_named(tmp_path: Path):
    from pipelines.presets import PRESETS
    from pipelines.training.driver import prepare_data

    demo = PRESETS["demo"]()
    with pytest.raises(ValueError, match=r"data\.root: this preset needs data; .*--data\.root FOLDER"):
        prepare_data(replace(demo, data=replace(demo.data, root="")))
    with pytest.raises(ValueError, match=r"scenes are drawn into a local folder, but storage is s3://bucket/runs"):
        prepare_data(replace(demo, storage="s3://bucket/runs"))
    with pytest.raises(ValueError, match="nowhere"):
        prepare_data(replace(demo, storage=str(tmp_path), data=replace(demo.data, root=str(tmp_path / "nowhere"))))


@pytest.mark.parametrize(("weights", "path"), [("none", ""), ("imagenet", ""), ("timm", ""), ("w.pth", "w.pth")])
def test_a_name_of_weights_is_no_path_that_machines_must_see(weights: str, path: str, monkeypatch: pytest.MonkeyPatch):
    from pipelines.config import override
    from pipelines.presets import PRESETS
    from pipelines.training import driver as training_driver

    asked: list[dict[str, str]] = []
    monkeypatch.setattr(training_driver, "check_shared", lambda read, written: asked.append(read))
    training_driver.check_places(override(PRESETS["demo"](), {"model.backbone.weights": weights}))
    assert asked[0]["--model.backbone.weights"] == path


def test_a_driver_ends_what_a_killed_one_of_the_same_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only where that one is gone, and one that is there is not disturbed."""
    from pipelines.cluster import lease, session
    from pipelines.training.driver import occupied

    ended: list[str] = []
    monkeypatch.setattr(session, "end_leftovers", lambda folder: ended.append(folder) or 2)
    monkeypatch.setattr(session, "own_folder", lambda: "/tmp/ray/session_of_mine")
    with occupied(str(tmp_path), "the run x") as note:
        note()
        with pytest.raises(lease.Busy, match="the run x is in use by process"), occupied(str(tmp_path), "the run x"):
            pass
    with occupied(str(tmp_path), "the run x"):
        assert ended == [], "the first has ended as it should, and its process lives"
    monkeypatch.setattr(lease, "is_gone", lambda holding: True)
    with occupied(str(tmp_path), "the run x") as note:
        note()
    with occupied(str(tmp_path), "the run x"):
        pass
    assert ended == ["", "/tmp/ray/session_of_mine"]


def test_splits_of_different_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_categories):
    from pipelines.presets import PRESETS
    from pipelines.training import driver as train

    class Shards:
        def __init__(self, split, categories):
            self.split, self.categories, self.source, self.uri = split, categories, {}, split

    other = replace(small_categories, names=("human", *small_categories.names[1:]))
    found = {"train": Shards("train", small_categories), "val": Shards("val", other)}
    monkeypatch.setattr(train, "ensure_shards", lambda root, split, *rest, **options: found[split])
    demo = PRESETS["demo"]()
    with pytest.raises(
        ValueError,
        match=r"the splits train and val have different categories: only train .* val has human\..*classes-of train",
    ):
        train.prepare_data(replace(demo, storage=str(tmp_path), data=replace(demo.data, root="somewhere")))


def test_a_validation_of_fewer_images_has_its_own_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_categories
):
    from pipelines.presets.panoptic_deeplab import demo as preset
    from pipelines.training import driver
    from tests.support.stored import write_shards

    train_set, val_set = (
        write_shards(tmp_path / name, small_categories, count) for name, count in (("t", 3), ("v", 6))
    )
    monkeypatch.setattr(
        driver, "ensure_shards", lambda root, split, *rest, **more: val_set if split == "val" else train_set
    )
    demo = preset()

    def prepared(limit: int):
        data = replace(demo.data, root=str(tmp_path), limit_val=limit)
        return driver.prepare_data(replace(demo, storage=str(tmp_path), data=data))

    assert prepared(0) == (train_set, val_set)
    same, part = prepared(4)
    assert same == train_set and part.rows == 4 and part.hash != val_set.hash and set(part.chosen) < set(range(6))
    with pytest.raises(ValueError, match=r"data\.limit_val 7 and skip 0: the split has 6 rows"):
        prepared(7)


def test_a_run_whose_mlflow_is_away_says_at_the_end_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At once, with the reason why there is no model, and with the command that sends the rest as the last line."""
    from pipelines.presets import PRESETS
    from pipelines.tracking.runs import Run
    from pipelines.training import driver

    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "demo", "--optim.lr", "0.1"])
    run, demo = Run("http://127.0.0.1:9", "id", "0"), PRESETS["demo"]()
    importlib.import_module("pipelines.tracking.model")  # takes seconds, which are not counted
    begin = time.monotonic()
    model, why = driver._log_model(SimpleNamespace(run=run, experiment=demo), {}, "c")  # type: ignore[arg-type]
    assert time.monotonic() - begin < 10 and model == ""
    assert why.startswith("MLflow at http://127.0.0.1:9 does not answer (")
    shards: Any = SimpleNamespace(uri="shards", rows=8, split="val")
    left = ("288 metrics of steps 11 to 30", "a.csv", "b.csv", "c.csv", "d.csv", "the model")
    outcome = driver.Outcome("one", run, "", "", {}, "PQ 1", "", "", shards, shards, why, left)
    lines = driver.closing_lines(outcome).splitlines()
    assert f"model       not logged: {why}" in lines
    assert lines[-1].startswith(
        "WARNING     not in MLflow: 288 metrics of steps 11 to 30, a.csv, b.csv, c.csv and 2 more;"
    )
    assert lines[-1].endswith("jobs/train.py demo --optim.lr 0.1 --name one")
    assert "WARNING" not in driver.closing_lines(replace(outcome, undelivered=()))


@pytest.mark.parametrize(("last", "finished"), [(8, True), (6, False)])
def test_a_run_whose_scores_fall_has_ended_and_logs_its_best_model(
    last: int, finished: bool, mlflow_store: str, small_categories: Categories, tmp_path: Path
):
    """One checkpoint is kept, the first, which is the best; the last one is not among the best."""
    from ray.train import Checkpoint, Result

    from pipelines.config import Experiment, Train
    from pipelines.tracking import runs
    from pipelines.training.driver import _conclude
    from pipelines.training.state import Job
    from tests.support.small import SMALL_DEEPLAB
    from tests.support.stored import write_model, write_shards

    shards = write_shards(tmp_path, small_categories, 2)
    options = Train(steps=8, validate_every=2, keep=1, overlays=0)
    experiment = Experiment(SMALL_DEEPLAB, "falling", str(tmp_path), train=options)
    job = Job(experiment, shards, shards, runs.start(runs.Tracking(mlflow_store), tmp_path), str(tmp_path), False)
    best = tmp_path / "step_000002"
    write_model(best, small_categories)
    (best / "metrics.json").write_text('{"val/pq": 40.0}')
    (best / "report.txt").write_text("step 2")
    kept = [(Checkpoint(str(best)), {"score": 40.0, "step": 2})]
    metrics = {"score": 10.0, "step": last}
    result = Result(metrics, Checkpoint(str(tmp_path / "last")), None, str(tmp_path), best_checkpoints=kept)
    outcome = _conclude(job, result, log_model=True)
    assert (outcome.checkpoint, outcome.metrics) == (str(best), {"val/pq": 40.0})
    assert outcome.model.startswith("models:/") == finished


def test_a_prolonged_run_logs_its_new_model_and_a_finished_one_registers_it(
    mlflow_store: str, small_categories: Categories, tmp_path: Path
):
    """Four steps, then six under one name: the model is step 6's. The same again, with --tracking.register."""
    import torch
    from ray.train import Checkpoint, Result

    from pipelines.config import Experiment, Train
    from pipelines.tracking import runs
    from pipelines.tracking.model import load_packaged
    from pipelines.training.driver import _conclude, closing_lines
    from pipelines.training.state import Job
    from tests.support.small import SMALL_DEEPLAB
    from tests.support.stored import write_model, write_shards

    shards = write_shards(tmp_path, small_categories, 2)
    run = runs.start(runs.Tracking(mlflow_store), tmp_path)
    kept = []

    def ended(step: int, pq: float, seed: int, **names: str) -> Outcome:
        folder = tmp_path / f"step_{step:06d}"
        if not folder.exists():
            write_model(folder, small_categories, seed)
            (folder / "metrics.json").write_text(f'{{"val/pq": {pq}}}')
            (folder / "report.txt").write_text(f"step {step}")
            kept.append((Checkpoint(str(folder)), {"score": pq, "step": step}))
        tracking = runs.Tracking(mlflow_store, **names)
        options = Train(steps=step, validate_every=2, keep=2, overlays=0)
        job = Job(
            Experiment(SMALL_DEEPLAB, "longer", str(tmp_path), train=options, tracking=tracking),
            *(shards, shards, run, str(tmp_path), False),
        )
        values = {"score": pq, "step": step}
        return _conclude(job, Result(values, kept[-1][0], None, str(tmp_path), best_checkpoints=kept), log_model=True)

    def weight(uri: str) -> Any:
        return next(load_packaged(uri, mlflow_store).model.parameters())

    first = ended(4, 40.0, seed=1)
    again = ended(4, 40.0, seed=1)
    assert first.model == again.model and first.registered == ""
    longer = ended(6, 50.0, seed=2)
    assert longer.model != first.model
    assert not torch.equal(weight(longer.model), weight(first.model))
    finished = ended(6, 50.0, seed=2, register="street", alias="champion")
    assert (finished.model, finished.registered) == (longer.model, "models:/street/1")
    assert "registered  models:/street/1" in closing_lines(finished)
    assert torch.equal(weight("models:/street@champion"), weight(longer.model))
    assert ended(6, 50.0, seed=2, register="street").registered == "models:/street/1"  # once
    version = client_module.connect(mlflow_store).get_model_version("street", "1")
    assert version.description.startswith("Best checkpoint, on 2 images of")
    expected = {"PQ": "50.00", "data_hash": shards.hash, "checkpoint": finished.checkpoint}
    assert expected.items() <= version.tags.items() and len(version.tags["commit"]) == 40


def test_a_full_disk_ends_a_run_at_once_in_one_line(
    mlflow_store: str, small_categories: Categories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray Train's callback ends it in place of a restart, and what that raises in the driver is one line."""
    from ray.train.v2.api.exceptions import ControllerError

    from pipelines.cluster import disk, session
    from pipelines.config import Experiment, Train
    from pipelines.tracking.runs import Tracking
    from pipelines.training import driver as train
    from tests.support.small import SMALL_DEEPLAB
    from tests.support.stored import write_shards
    from tests.support.worker_failures import GLOO, KILLED

    told = disk.full(tmp_path, 1 << 20, "a checkpoint's files")
    full = OSError(errno.ENOSPC, "Error writing bytes\nNo space left on device")
    callback = train.stop_at_once()
    context = SimpleNamespace(run_config=SimpleNamespace(name="full"))
    callback.after_exception(context, {0: GLOO, 1: KILLED})  # restarts
    with pytest.raises(disk.DiskFull, match=r"^full: No space left on device\. Make room there"):
        callback.after_exception(context, {0: full})
    with pytest.raises(disk.DiskFull) as stopped:
        callback.after_exception(context, {0: GLOO, 1: told})
    assert str(stopped.value) == str(told)

    def fit(job: Any, callbacks: Any) -> None:
        raise ControllerError(stopped.value)

    (tmp_path / "runs" / "full" / "step_000002").mkdir(parents=True)
    (tmp_path / "runs" / "full" / "step_000002" / "checkpoint.pt").touch()
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", small_categories, 2)
    monkeypatch.setattr(session, "connect", lambda *_: None)
    monkeypatch.setattr(train, "check_cluster", lambda _: False)
    monkeypatch.setattr(train, "check_places", lambda *_: None)
    monkeypatch.setattr(train, "prepare_data", lambda _: (shards, shards))
    monkeypatch.setattr(train, "_fit", fit)
    experiment = Experiment(SMALL_DEEPLAB, "full", str(tmp_path / "runs"), train=Train(workers=1))
    experiment = replace(experiment, tracking=Tracking(mlflow_store))
    with pytest.raises(disk.DiskFull) as ended:
        train.train(experiment, "demo")
    assert str(ended.value) == str(told) and "\n" not in str(told)
    assert not (tmp_path / "runs" / "full" / "step_000002").exists()  # torn
    run_id = json.loads((tmp_path / "runs" / "full" / "run.json").read_text())["run_id"]
    assert client_module.connect(mlflow_store).get_run(run_id).info.status == "FAILED"


def test_a_store_that_is_away_ends_a_run_at_once_in_one_line(monkeypatch: pytest.MonkeyPatch):
    """Whether a worker meets it or Ray Train's controller, whose error is pyarrow's own."""
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from pipelines.cluster import storage
    from pipelines.config import Train
    from pipelines.training import attempts, driver
    from tests.support.worker_failures import GLOO

    monkeypatch.setattr(attempts, "newest_step", lambda folder: -1)
    job = SimpleNamespace(folder="s3://b/runs/x", experiment=SimpleNamespace(name="x", train=Train()))
    away = storage.Unavailable("s3://b/runs/x/step_000002: could not be written: no answer")
    callback = driver.stop_at_once()
    context = SimpleNamespace(run_config=SimpleNamespace(name="x"))
    with pytest.raises(storage.Unavailable, match=f"^{away}$"):
        callback.after_exception(context, {0: GLOO, 1: away})
    raw = OSError("When initiating upload:\nAWS Error NETWORK_CONNECTION")
    for error in (WorkerGroupError("failed", {0: GLOO, 1: away}), ControllerError(away), ControllerError(raw)):

        def fit(job: Any, callbacks: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(driver, "_fit", fit)
        with pytest.raises(storage.Unavailable) as told:
            driver._fit_or_tell(job, ())  # type: ignore[arg-type]
        assert re.fullmatch(
            r"s3://b/runs/x\S*: could not be .*\. When the store is back, the same command goes on", str(told.value)
        )
    callback.after_exception(context, {0: raw})  # of a worker, and none of ours: it is started again


# Runs that end otherwise than planned. Slow.


@pytest.mark.parametrize(("step", "trial", "filled"), [(5, False, True), (10, False, True), (5, True, False)])
def test_a_run_that_is_stopped_shows_its_kept_checkpoints_too(
    step: int, trial: bool, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model comes at the last step alone; trials of a sweep have neither."""
    from pipelines.training import driver

    pages: list[tuple[Any, ...]] = []
    stubs = {
        "load_checkpoint": lambda uri: {"step": 5},
        "build_model": lambda record: None,
        "read_metrics": lambda uri: {"val/pq": 40.0},
        "pictures": lambda *_: [],
        "deliver": lambda *_: [],
        "_log_model": lambda *_: ("models:/m-1", ""),
        "fill_pages": lambda job, kept, model, *rest: pages.append((kept, model, *rest)) or True,
        "storage": SimpleNamespace(join=lambda *parts: "/".join(parts), read_bytes=lambda file: b"all 40.0"),
        "runs": SimpleNamespace(describe=lambda *_: True),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(driver, name, stub)
    options = SimpleNamespace(steps=10, overlays=0)
    experiment = SimpleNamespace(name="x", storage="/r", train=options, tracking=SimpleNamespace(register=""))
    job: Any = SimpleNamespace(
        experiment=experiment, folder="/r/x", run=None, train=None, val=SimpleNamespace(rows=4, split="val")
    )
    best = [(SimpleNamespace(path="/r/x/step_000005"), {"score": 40.0, "step": 5})]
    outcome = driver._conclude(job, SimpleNamespace(best_checkpoints=best, metrics={"step": step}), not trial)
    model = "models:/m-1" if step == 10 else ""
    assert outcome.model == model and outcome.undelivered == ()
    assert pages == [(["/r/x/step_000005"], model, 5, {"val/pq": 40.0})] * filled


@pytest.fixture(scope="module")
def places(scenes16: Path, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of one folder for all runs of this file: they share shards and MLflow store."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return ["--storage", str(folder), "--data.root", str(scenes16), "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]


@pytest.fixture(scope="module")
def run(ray_cluster: None, places: list[str]) -> Callable[..., Outcome]:
    """`run("name", "--option", "value")` trains a tiny model in this session's Ray."""
    from jobs import train

    def start(name: str, *options: str) -> Outcome:
        return train.main(["demo", *places, *TINY.split(), "--name", name, *options])

    return start


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_number_of_workers_changes_rounding_only(run: Callable[..., Outcome]):
    """Where every term is a mean over all pixels and no norm looks at the batch; SGD, since Adam amplifies rounding."""
    options = [
        *("--model.norm", "group", "--model.backbone.norm", "group", "--model.dropout", "0"),
        *("--model.semantic-loss", "top_k"),
        *("--model.top-k-fraction", "1", "--model.centre-weight", "0", "--model.offset-weight", "0"),
        *("--engine.precision", "float32", "--optim.optimiser", "sgd", "--optim.lr", "0.01", "--train.steps", "10"),
    ]
    one, two = (run(f"by-{workers}", *options, "--train.workers", workers) for workers in ("1", "2"))
    # a unit whose input is 0 but for rounding has one of two gradients, so the norm drifts first
    for key, tolerance in (("train/loss/total", 1e-5), ("train/grad_norm", 1e-2), ("train/lr", 0.0)):
        np.testing.assert_allclose(history(two, key), history(one, key), rtol=tolerance, err_msg=key)
    np.testing.assert_allclose(history(two, "train/grad_norm")[:2], history(one, "train/grad_norm")[:2], rtol=1e-5)
    expected, found = record(one.folder, 10)["weights"], record(two.folder, 10)["weights"]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@dataclass(frozen=True)
class Killed:
    """A run whose driver was killed."""

    arguments: list[str]
    log: Path
    folder: Path
    run_id: str
    memory: dict[int, dict[str, float]]
    """MiB of each of its processes, at some steps."""


def kill_driver(places: list[str], folder: Path, name: str, steps: int, looks: Sequence[int]) -> Killed:
    """Start a training with a validation, its table and pictures every second step, and kill its driver.

    Args:
        folder: place for the log.
        looks: steps at which to measure memory; the driver is killed at the last.
    """
    run, log = Path(places[1]) / name, folder / "log"
    arguments = [*places, *TINY.split(), "--name", name, "--train.workers", "1", "--train.batch", "2"]
    arguments += ["--train.steps", str(steps), "--train.validate-every", "2", "--resize.short", "96"]
    memory: dict[int, dict[str, float]] = {}
    with driver(arguments, log) as process:
        for step in looks:
            assert wait_for(lambda step=step: last_kept(run) >= step or process.poll() is not None, 280), (
                log.read_text()
            )
            assert process.poll() is None, log.read_text()
            commands = {process.pid: "driver", **descendants(process.pid)}
            memory[last_kept(run)] = {
                part: private_mib(pid)
                for part in ("driver", "TrainController", "RayTrainWorker")
                for pid, command in commands.items()
                if part in command
            }
        assert process.poll() is None and not (run / f"step_{steps:06d}").exists(), log.read_text()
    return Killed(arguments, log, run, json.loads((run / "run.json").read_text())["run_id"], memory)


@linux
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_neither_driver_nor_controller_grows_with_steps_and_validations(places: list[str], tmp_path: Path):
    """100 steps, 50 validations with their tables and pictures, into a SQLite store.

    Five MiB are found, a step's 0.05 or a validation's 0.1. In 2000 steps with 200 validations the driver grew by 0.9
    MiB from step 150 on and the controller by 0.8 from step 390 on, the worker by 30 from step 300 on and by 2 from
    step 1310 on (AMD EPYC, 2 cores).
    """
    # by the first look everything is imported and warm; at its end the driver builds a model
    memory = kill_driver(places, tmp_path, "driver-measured", 150, looks=(40, 140)).memory
    first, last = sorted(memory)
    assert memory[first].keys() == memory[last].keys() == {"driver", "TrainController", "RayTrainWorker"}
    growth = {name: memory[last][name] - memory[first][name] for name in memory[first]}
    validations = (last - first) / 2
    assert growth["driver"] < 0.1 * validations and growth["TrainController"] < 0.1 * validations, growth
    assert growth["RayTrainWorker"] < 1.2 * validations, growth  # its allocator's pool goes up and down by 30 MiB


@linux
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_under_its_name(places: list[str], tmp_path: Path):
    """Machine lost: the same command again continues from the last checkpoint, in the same MLflow run."""
    killed = kill_driver(places, tmp_path, "driver-killed", 40, looks=(10,))
    with driver(killed.arguments, killed.log) as process:
        assert process.wait(timeout=280) == 0, killed.log.read_text()
    text = killed.log.read_text()
    (step,) = map(int, re.findall(r"continuing at step (\d+)", text))
    assert 10 <= step < 40 and json.loads((killed.folder / "run.json").read_text())["run_id"] == killed.run_id
    assert "driver-killed: best checkpoint, on 8 images of val" in text
    client = client_module.connect(places[-1])
    steps = [metric.step for metric in client.get_metric_history(killed.run_id, "train/loss/total")]
    assert steps == list(range(1, 41)) and client.get_run(killed.run_id).info.status == "FINISHED"
    experiment = client.get_run(killed.run_id).info.experiment_id
    found = client.search_runs([experiment], "tags.mlflow.runName = 'driver-killed'")
    assert [one.info.run_id for one in found] == [killed.run_id]


@linux
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_driver_that_is_told_to_end_saves_and_goes_on(places: list[str], tmp_path: Path):
    """SIGTERM, as of a machine that is taken away: a checkpoint of the newest step in time, and no step twice."""
    from pipelines.training.attempts import GRACE

    steps, folder = 300, Path(places[1]) / "driver-told"
    arguments = [*places, *TINY.split(), "--name", "driver-told", "--train.workers", "1", "--train.batch", "2"]
    arguments += ["--train.steps", str(steps), "--train.validate-every", str(steps), "--train.checkpoint-every", "10"]
    first, second = tmp_path / "first", tmp_path / "second"
    with driver(arguments, first) as process:
        assert wait_for(lambda: last_kept(folder) >= 20 or process.poll() is not None, 500), first.read_text()
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(timeout=120) == 128 + signal.SIGTERM, first.read_text()
        taken = time.monotonic() - begin
    text = first.read_text()
    assert taken < GRACE + 15, text  # Ray's own end comes after the checkpoint
    assert "SIGTERM; saving a checkpoint" in text and "interrupted by SIGTERM; the same command goes on" in text
    assert "Traceback" not in text
    reached = last_kept(folder)
    assert max(map(int, re.findall(rf"step (\d+)/{steps} \|", text))) == reached < steps, text
    with driver(arguments, second) as process:
        assert process.wait(timeout=500) == 0, second.read_text()
    text = second.read_text()
    assert re.findall(r"continuing at step (\d+)", text) == [str(reached)], text
    assert [int(step) for step in re.findall(rf"step (\d+)/{steps} \|", text)] == list(range(reached + 1, steps + 1))
    client = client_module.connect(places[-1])
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    counted = [metric.step for metric in client.get_metric_history(run_id, "train/loss/total")]
    assert counted == list(range(1, steps + 1)) and client.get_run(run_id).info.status == "FINISHED"


def last_kept(folder: Path) -> int:
    """The step of a run's last checkpoint, 0 where it has none."""
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)


def private_mib(pid: int) -> float:
    """Memory of a process that no file backs, its share of what several processes map."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024


@contextlib.contextmanager
def mlflow_server(database: Path, port: int) -> Iterator[subprocess.Popen]:
    """MLflow's own server on a migrated database."""
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(database.parent / "server.log", "ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert time.monotonic() < end and server.poll() is None, (database.parent / "server.log").read_text()
            time.sleep(0.3)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_mlflow_that_goes_in_mid_run_is_filled_by_the_same_command(
    run: Callable[..., Outcome], mlflow_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The run ends soon and says what is missing; when it is done already, the same command delivers it."""
    from pipelines.tracking.spool import undelivered

    shutil.copy(mlflow_template, tmp_path / "server.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--tracking.uri", f"http://127.0.0.1:{port}", "--train.steps", "30"]
    local = client_module.connect(f"sqlite:///{tmp_path}/server.db")
    with mlflow_server(tmp_path / "server.db", port) as server:

        def kill_after_the_first_validation() -> None:
            while not any("val/pq" in found.data.metrics for found in local.search_runs(local_experiments(local))):
                time.sleep(0.1)
            os.killpg(server.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_after_the_first_validation, daemon=True)
        killer.start()
        outcome = run("outage", *options)
        killer.join(1)
    assert not killer.is_alive() and not outcome.model and "does not answer" in outcome.no_model
    assert capsys.readouterr().out.splitlines()[-1].startswith("WARNING     not in MLflow: ")
    assert undelivered(outcome.folder)
    with mlflow_server(tmp_path / "server.db", port):
        again = run("outage", *options)
        assert again.model and not again.undelivered and not undelivered(again.folder)
        assert status(again) == "FINISHED" and again.run == outcome.run
        assert [step for step, _ in history(again, "train/loss/total")] == list(range(1, 31))
        assert [step for step, _ in history(again, "val/pq")] == [10, 20, 30]
        client = client_module.connect(again.run.tracking_uri)
        tables = [file.path for file in client.list_artifacts(again.run.run_id, "classes")]
        assert tables == [f"classes/step_0000{step}.{kind}" for step in (10, 20, 30) for kind in ("csv", "txt")]
        overlays = [file.path for file in client.list_artifacts(again.run.run_id, "overlays")]
        assert overlays == [f"overlays/step_0000{step}" for step in (10, 20, 30)]
    assert "WARNING" not in capsys.readouterr().out


def local_experiments(client: Any) -> list[str]:
    return [experiment.experiment_id for experiment in client.search_experiments()]
