"""Preparing from S3 to S3: a store that fails or goes away, a driver that is killed, two at once. All slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster import lease, session, storage
from pipelines.data.prepare import prepare
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.source import Source
from pipelines.data.verify import verify
from tests.conftest import ROOT
from tests.support.coco_folder import write_folder
from tests.support.s3_proxy import S3Proxy, one_in
from tests.support.s3_server import ENVIRONMENT, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPTIONS: dict[str, Any] = {"rows_per_shard": 4}


@pytest.fixture(scope="module")
def proxy(ray_cluster: None) -> Iterator[S3Proxy]:
    """S3 behind a proxy, and a Ray whose processes know it; the session's own Ray is back afterwards."""
    import boto3
    import ray

    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        proxy = S3Proxy(endpoint)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": proxy.uri}.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="sets")
        ray.shutdown()
        session.connect(cpus=2, object_store=200_000_000)
        yield proxy
        ray.shutdown()
    session.connect(cpus=4, object_store=300_000_000)
    proxy.stop()


@pytest.fixture(autouse=True)
def well_again(proxy: S3Proxy) -> Iterator[None]:
    yield
    proxy.fault = lambda method, path: ""


@pytest.fixture(scope="module")
def source(proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """48 photographs and maps on S3, of 12 shards."""
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder, "train", count=48, height=200, width=300)
    for file in folder.rglob("*.*"):
        storage.write_bytes(f"s3://sets/data/{file.relative_to(folder)}", file.read_bytes())
    return coco_panoptic("s3://sets/data", "train")


def contents(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}


@pytest.fixture(scope="module")
def undisturbed(source: Source) -> dict[str, bytes]:
    manifest = prepare(source, "s3://sets/undisturbed", **OPTIONS)
    assert verify(manifest.uri) == manifest and len(manifest.shards) == 12
    return contents(manifest.uri)


def mixed(count: int) -> Callable[[str, str], str]:
    """Every `count`-th request fails, by turns in each of three ways."""
    busy, kinds = one_in(count), 0

    def choose(method: str, path: str) -> str:
        nonlocal kinds
        if not busy(method, path):
            return ""
        kinds += 1
        return ("busy", "drop", "lose")[kinds % 3]

    return choose


def test_one_failing_request_in_ten_changes_nothing(
    proxy: S3Proxy, source: Source, undisturbed: dict[str, bytes]
) -> None:
    before = len(proxy.requests)
    proxy.fault = mixed(10)
    prepare(source, "s3://sets/faulty", **OPTIONS)
    proxy.fault = lambda method, path: ""
    faults = [fault for *_, fault in proxy.requests[before:]]
    assert len(faults) > 100 and faults.count("") < 0.91 * len(faults) and {"busy", "drop", "lose"} < set(faults)
    assert contents("s3://sets/faulty") == undisturbed


@pytest.mark.nightly
def test_a_store_that_goes_away_for_20_s_changes_nothing(
    proxy: S3Proxy, source: Source, undisturbed: dict[str, bytes]
) -> None:
    gone = threading.Event()

    def goes_away(method: str, path: str) -> str:
        if method == "PUT" and "/shard-" in path and not gone.is_set():
            gone.set()
            threading.Thread(target=proxy.stop).start()
            return "drop"
        return ""

    def comes_back() -> None:
        assert gone.wait(120)
        time.sleep(20)
        proxy.start()

    proxy.fault = goes_away
    returning = threading.Thread(target=comes_back)
    returning.start()
    begin = time.monotonic()
    prepare(source, "s3://sets/away", **OPTIONS)
    returning.join()
    assert time.monotonic() - begin > 20
    assert contents("s3://sets/away") == undisturbed


PREPARE = """
import sys
from pipelines.cluster import session
from pipelines.data.prepare import prepare
from pipelines.data.readers import coco_panoptic
session.connect(cpus=1, object_store=100_000_000)
print(session.own_folder(), flush=True)
prepare(coco_panoptic("s3://sets/data", "train"), sys.argv[1], rows_per_shard=4)
"""


def test_a_driver_that_is_killed_is_followed_by_another_and_never_joined(
    proxy: S3Proxy, source: Source, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """While the first works the second refuses; once it is dead others finish, with its options only."""
    out, go_on = "s3://sets/killed", threading.Event()

    def waits(method: str, path: str) -> str:
        """Hold the workers at the eighth shard until the driver is killed."""
        if method == "PUT" and f"{out.removeprefix('s3:/')}/shard-00007" in path:
            go_on.wait(100)
            return "drop"
        return ""

    proxy.fault = waits
    driver = subprocess.Popen([sys.executable, "-c", PREPARE, out], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = ""
    try:
        assert driver.stdout is not None
        folder = driver.stdout.readline().strip()
        end = time.monotonic() + 120
        state = storage.join(out, ".prepare")
        while sum("shard-" in name for name in _listed(state)) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        with pytest.raises(lease.Busy, match=rf"{out} is in use by .*, or give another folder with --out"):
            prepare(source, out, **OPTIONS)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        go_on.set()
        if folder:
            session.end_leftovers(folder)
    proxy.fault = lambda method, path: ""
    finished = {name.partition(".")[0] for name in _listed(state) if name.startswith("shard-")}
    assert 3 <= len(finished) < 12 and not storage.exists(storage.join(out, "manifest.json"))
    with pytest.raises(ValueError, match=r"other options \(seed was 0 and is now 7\)"):
        prepare(source, out, seed=7, **OPTIONS)
    before = len(proxy.requests)
    prepare(source, out, **OPTIONS)
    written = [path for _, method, path, _ in proxy.requests[before:] if method == "PUT"]
    assert not [path for path in written if any(f"/{name}.arrow" in path for name in finished)]
    assert contents(out) == undisturbed


def _listed(folder: str) -> list[str]:
    return storage.list_files(folder) if storage.exists(folder) else []
