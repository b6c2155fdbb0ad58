"""Trainings whose store is away, silent, faulty or full at a checkpoint: what they wait for, what the next start does.

All are slow. The times are compressed: the patience with S3 is 6 s instead of 60 (8 attempts with pauses of 3.15 s, 1 s
for an answer).
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines.cluster import storage
from pipelines.tracking import client as client_module
from tests.support.s3_proxy import S3Proxy, one_in
from tests.support.s3_server import ENVIRONMENT, s3_server

if TYPE_CHECKING:
    import torch

    from pipelines.training.driver import Outcome

TINY = """
--model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --resize.short 96 --optim.warmup-steps 4 --train.batch 2
--train.log-every 1 --train.validate-every 2 --train.steps 8 --train.stop-after 6 --train.overlays 0
--train.workers 1 --train.deterministic True
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def proxy(own_ray: Callable[[], None]) -> Iterator[S3Proxy]:
    """S3 behind a proxy, and a Ray whose processes know it."""
    import boto3

    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        proxy = S3Proxy(endpoint)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": proxy.uri, storage.PATIENCE: "6"}.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="trainings")
        own_ray()
        yield proxy
        proxy.stop()


@pytest.fixture(scope="module")
def run(
    proxy: S3Proxy, scenes16: Path, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """`run("name")` trains a tiny model; runs, checkpoints and shards lie on S3 or in a folder, MLflow in a file."""
    from jobs import train

    folder = tmp_path_factory.mktemp("faulty")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    places = ["--data.root", str(scenes16), "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]

    def start(name: str, place: str = "s3://trainings/runs") -> Outcome:
        return train.main(["demo", "--storage", place, *places, *TINY.split(), "--name", name])

    return start


@pytest.fixture(scope="module")
def whole(run: Callable[..., Outcome]) -> Outcome:
    """The training that nothing happened to."""
    return run("whole")


@pytest.fixture(autouse=True)
def well_again(proxy: S3Proxy) -> Iterator[None]:
    yield
    proxy.fault = lambda method, path: ""
    proxy.stop()
    proxy.start()


def history(outcome: Outcome, key: str) -> list[tuple[int, float]]:
    client = client_module.connect(outcome.run.tracking_uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(outcome.run.run_id, key)]


def tensors(outcome: Outcome) -> dict[str, torch.Tensor]:
    """Weights, average and optimiser's state of the last checkpoint."""
    import torch

    from pipelines.training.checkpoints import load_checkpoint

    found = load_checkpoint(f"{outcome.folder}/step_000006")
    assert found["step"] == 6 and found["position"] == 12

    def walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from walk(entry, f"{name}.{key}")

    return {name: value for key in ("weights", "ema", "optimiser") for name, value in walk(found[key], key)}


def check_equal(outcome: Outcome, whole: Outcome) -> None:
    """Weights, average, optimiser, metrics and what MLflow holds are those of the training that nothing happened to."""
    import torch

    expected, found = tensors(whole), tensors(outcome)
    assert expected.keys() == found.keys() and any(name.startswith("optimiser") for name in expected)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not outcome.undelivered
    for key, steps in (("train/loss/total", [1, 2, 3, 4, 5, 6]), ("val/pq", [2, 4, 6]), ("val/loss/total", [2, 4, 6])):
        assert [step for step, _ in history(outcome, key)] == steps
        assert history(outcome, key) == history(whole, key)
    assert client_module.connect(outcome.run.tracking_uri).get_run(outcome.run.run_id).info.status == "FINISHED"


def at(proxy: S3Proxy, part: str, then: Callable[[], str]) -> list[float]:
    """Do something at the first request whose path contains `part`, and answer it and all later ones with its fault."""
    met: list[float] = []
    fault = ""

    def choose(method: str, path: str) -> str:
        nonlocal fault
        if not met and method in ("PUT", "POST") and part in path:
            met.append(time.monotonic())
            fault = then()
        return fault

    proxy.fault = choose
    return met


def test_faults_that_pass_cost_time_only(
    run: Callable[..., Outcome], whole: Outcome, proxy: S3Proxy, capfd: pytest.CaptureFixture[str]
) -> None:
    """One request in ten is refused, dropped, or done and then dropped; S3 is away while a checkpoint is written."""
    kinds = [one_in(30, "busy"), one_in(30, "drop"), one_in(30, "lose")]
    for number, choose in enumerate(kinds):  # not all at the same request
        for _ in range(10 * number):
            choose("", "")

    def restart() -> None:
        proxy.stop()
        time.sleep(1.5)
        proxy.start()

    outage: list[threading.Thread] = []

    def fault(method: str, path: str) -> str:
        if not outage and method == "POST" and "/faulty/step_000004" in path:
            outage.append(threading.Thread(target=restart, daemon=True))
            outage[0].start()
        return next(filter(None, [choose(method, path) for choose in kinds]), "")

    asked, proxy.fault = len(proxy.requests), fault
    outcome = run("faulty")
    failed = [fault for *_, fault in proxy.requests[asked:] if fault]
    assert outage and set(failed) == {"busy", "drop", "lose"} and len(failed) > 0.08 * (len(proxy.requests) - asked)
    check_equal(outcome, whole)
    assert "continuing at step" not in "".join(capfd.readouterr())  # no worker was started again


@pytest.mark.nightly
def test_a_store_that_is_gone_ends_the_run_and_the_same_command_goes_on(
    run: Callable[..., Outcome], whole: Outcome, proxy: S3Proxy
) -> None:
    """Gone at the first checkpoint, silent at the second: each time the run ends in bounded time with one line.

    Afterwards weights, optimiser and metrics are those of the run that nothing happened to.
    """

    def refuse() -> str:
        threading.Thread(target=proxy.stop, daemon=True).start()
        return ""

    for place, then in (("step_000002", refuse), ("step_000004", lambda: "silent")):
        met = at(proxy, f"/gone/{place}", then)
        with pytest.raises(storage.Unavailable) as told:
            run("gone")
        assert met and time.monotonic() - met[0] < 60
        line = str(told.value)
        assert line.startswith("s3://trainings/runs/gone") and "\n" not in line
        assert line.endswith(". When the store is back, the same command goes on") and line.count("same command") == 1
        proxy.fault = lambda method, path: ""
        proxy.stop()
        proxy.start()
    check_equal(run("gone"), whole)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_disk_that_is_full_ends_the_run_and_the_same_command_goes_on(
    run: Callable[..., Outcome], whole: Outcome, tmp_path: Path
) -> None:
    """The second checkpoint meets a full disk; what it left is removed when there is room."""
    from pipelines.cluster.disk import DiskFull

    folder = tmp_path / "runs" / "full"
    torn = folder / ".step_000004" / "checkpoint.pt"  # which is renamed when it is whole

    def fill() -> None:
        while not (folder / "step_000002").exists():
            time.sleep(0.01)
        torn.parent.mkdir()
        torn.symlink_to("/dev/full")

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    try:
        with pytest.raises(DiskFull, match=r"full.*; a checkpoint's files need .*the same command goes on$") as told:
            run("full", str(tmp_path / "runs"))
    finally:
        filling.join(5)
    assert not filling.is_alive() and torn.is_symlink() and "\n" not in str(told.value)
    torn.unlink()  # reading it would never end; a disk that is full leaves a part of the file
    torn.write_bytes(b"PK\3\4")
    outcome = run("full", str(tmp_path / "runs"))
    assert not torn.parent.exists() and (folder / "step_000004" / "checkpoint.pt").stat().st_size > 1000
    check_equal(outcome, whole)
