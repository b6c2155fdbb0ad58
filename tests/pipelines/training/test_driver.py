"""Data that the driver refuses, and (slow) runs that are killed or continued."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipelines.tracking import client as client_module

if TYPE_CHECKING:
    import torch

    from pipelines.training.driver import Outcome

ROOT = Path(__file__).resolve().parents[3]

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 4 --train.batch 4 --train.log-every 1
--train.validate-every 10 --train.overlays 1
"""


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


def test_splits_of_different_classes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_categories):
    from pipelines.presets import PRESETS
    from pipelines.training import driver as train

    class Shards:
        def __init__(self, split, categories):
            self.split, self.categories = split, categories

    other = replace(small_categories, names=("human", *small_categories.names[1:]))
    found = {"train": Shards("train", small_categories), "val": Shards("val", other)}
    monkeypatch.setattr(train, "ensure_shards", lambda root, split, *rest, **options: found[split])
    demo = PRESETS["demo"]()
    with pytest.raises(
        ValueError,
        match=r"the splits train and val have different categories: only train .* val has human\..*classes-of train",
    ):
        train.prepare_data(replace(demo, storage=str(tmp_path), data=replace(demo.data, root="somewhere")))


# Runs that end otherwise than planned. Slow.


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


def history(outcome: Outcome, key: str) -> list[tuple[int, float]]:

    client = client_module.connect(outcome.run.tracking_uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(outcome.run.run_id, key)]


def status(outcome: Outcome) -> str:

    return client_module.connect(outcome.run.tracking_uri).get_run(outcome.run.run_id).info.status


def record(outcome: Outcome, step: int) -> dict[str, Any]:
    from panoptic.training.checkpoint import load

    file = Path(outcome.folder) / f"step_{step:06d}" / "checkpoint.pt"
    return load(str(file), file.parent.name)


def check_consistent(outcome: Outcome, steps: int) -> None:
    """Every checkpoint is whole and every step stands in the MLflow run exactly once."""
    kept = sorted(Path(outcome.folder).glob("step_*"))
    assert kept[-1].name == f"step_{steps:06d}"
    for folder in kept:
        step = int(folder.name.removeprefix("step_"))
        found = record(outcome, step)
        assert (found["step"], found["position"], found["run_id"]) == (step, 4 * step, outcome.run.run_id)
        written = json.loads((folder / "metrics.json").read_text())
        assert written["val/pq"] == pytest.approx(dict(history(outcome, "val/pq"))[step], abs=0, nan_ok=True)
    assert [step for step, _ in history(outcome, "train/loss/total")] == list(range(1, steps + 1))
    assert [step for step, _ in history(outcome, "val/pq")] == list(range(10, steps + 1, 10))
    assert status(outcome) == "FINISHED" and outcome.model.startswith("models:/")


def descendants(root: int) -> dict[int, str]:
    """Process id to command line of everything that a process started, directly or not."""
    parents, commands = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    found, level = {}, {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= {pid: commands[pid] for pid in level if pid in commands}
    return found


def wait_for(ready: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    return None


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def weights(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    averaged = {f"average {name}": value for name, value in (found["ema"] or {}).items()}
    return found["weights"] | averaged


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_continued_run_is_the_uninterrupted_one(run: Callable[..., Outcome], workers: str):
    """Bit for bit, with batch norm, dropout, averaged weights, bfloat16 and colour augmentation."""
    import torch

    options = ["--train.workers", workers, "--train.steps", "20", "--train.deterministic", "True"]
    whole = run(f"whole-{workers}", *options)
    halves = f"halves-{workers}"
    first = run(halves, *options, "--train.stop-after", "10")
    assert first.model == "" and len(history(first, "train/loss/total")) == 10
    second = run(halves, *options)
    assert second.run.run_id == first.run.run_id != whole.run.run_id
    check_consistent(second, 20)
    for key in ("train/loss/total", "train/grad_norm", "train/lr", "val/pq", "val/loss/total"):
        np.testing.assert_equal(history(second, key), history(whole, key))
    expected, found = weights(record(whole, 20)), weights(record(second, 20))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
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
    expected, found = record(one, 10)["weights"], record(two, 10)["weights"]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@linux
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_costs_nothing_but_time(run: Callable[..., Outcome], places: list[str]):
    folder, killed = Path(places[1]) / "worker-killed", []

    def kill() -> None:
        if not wait_for((folder / "step_000010" / "metrics.json").exists, 200):
            return
        time.sleep(1)  # some steps on
        workers = [pid for pid, command in descendants(os.getpid()).items() if "RayTrainWorker" in command]
        if workers and not (folder / "step_000030").exists():
            os.kill(workers[-1], signal.SIGKILL)
            killed.append(workers[-1])

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    outcome = run("worker-killed", "--train.steps", "30")
    thread.join(timeout=5)
    assert killed, "the run was over before a worker could be killed"
    check_consistent(outcome, 30)


@contextlib.contextmanager
def driver(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """jobs/train.py with a Ray of its own; on leaving, nothing that it started is left."""
    begun: set[int] = set()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "jobs/train.py", "demo", *arguments], cwd=ROOT, stdout=out, stderr=out
        )
        try:
            yield process
        finally:
            begun |= set(descendants(process.pid))
            process.kill()
            process.wait()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in begun), 15)
            for pid in begun:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@linux
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_driver_goes_on_under_its_name(places: list[str], tmp_path: Path):
    """Machine lost: the same command again continues from the last checkpoint, in the same MLflow run."""
    folder, log = Path(places[1]) / "driver-killed", tmp_path / "log"
    arguments = [*places, *TINY.split(), "--name", "driver-killed", "--train.steps", "30", "--train.workers", "1"]
    with driver(arguments, log) as process:
        assert wait_for((folder / "step_000010" / "metrics.json").exists, 150), log.read_text()
        time.sleep(0.5)
        assert process.poll() is None and not (folder / "step_000030").exists()
    first = json.loads((folder / "run.json").read_text())
    with driver(arguments, log) as process:
        assert process.wait(timeout=200) == 0, log.read_text()
    text = log.read_text()
    assert "continuing at step" in text and json.loads((folder / "run.json").read_text()) == first
    assert "driver-killed: best checkpoint, on 8 images of val" in text
    check_run(first["run_id"], places)


def check_run(run_id: str, places: list[str]) -> None:

    client = client_module.connect(places[-1])
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss/total")]
    assert steps == list(range(1, 31)) and client.get_run(run_id).info.status == "FINISHED"
    found = client.search_runs([client.get_run(run_id).info.experiment_id], "tags.mlflow.runName = 'driver-killed'")
    assert [one.info.run_id for one in found] == [run_id]
