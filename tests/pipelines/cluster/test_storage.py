"""Local and S3 paths through one set of functions."""

from __future__ import annotations

import gc
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cluster import storage
from pipelines.evaluation.inputs import photographs
from tests.support.s3_proxy import S3Proxy, one_in
from tests.support.s3_server import ENVIRONMENT, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The endpoint of an S3 of our own."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """`s3://…`, a bucket of the test's own."""
    import boto3

    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": s3}.items():
        monkeypatch.setenv(name, value)
    name = "b" + request.node.name.lower().replace("_", "-")[:40].replace("[", "-").strip("]-")
    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket=name)
    return f"s3://{name}"


def upload(local: str | Path, uri: str) -> None:
    """Copy the files below a local folder."""
    for file in (path for path in Path(local).rglob("*") if path.is_file()):
        storage.write_bytes(storage.join(uri, file.relative_to(local).as_posix()), file.read_bytes())


def check_round_trip(root: str) -> None:
    """Everything that a store must do."""
    file = storage.join(root, "a", "b.bin")
    assert not storage.exists(file)
    storage.write_bytes(file, b"one")
    storage.write_bytes(file, b"two")
    assert storage.read_bytes(file) == b"two"
    assert storage.exists(file) and storage.exists(storage.join(root, "a"))
    storage.write_bytes(storage.join(root, "a", "deep", "c"), b"")
    assert storage.list_files(storage.join(root, "a")) == ["b.bin", "deep/c"]
    assert storage.list_stamps(storage.join(root, "a"))["b.bin"][0] == 3

    storage.delete(file)
    assert not storage.exists(file)
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "deep", "c"))


def test_local(tmp_path: Path) -> None:
    check_round_trip(str(tmp_path / "root"))


def test_s3(bucket: str) -> None:
    check_round_trip(storage.join(bucket, "prefix"))
    with pytest.raises(ValueError, match="whole bucket"):
        storage.delete(bucket)
    with pytest.raises(FileNotFoundError, match=r"s3://.*/nothing"):
        storage.read_bytes(storage.join(bucket, "nothing"))


def test_dataset_and_shards_on_s3(bucket: str, tmp_path: Path) -> None:
    from pipelines.data.readers.coco_panoptic import coco_panoptic
    from pipelines.data.shard_writer import write_shard
    from tests.support.coco_folder import write_folder

    write_folder(tmp_path / "data", "val", count=2)
    upload(tmp_path / "data", storage.join(bucket, "data"))
    source = coco_panoptic(storage.join(bucket, "data"), "val")
    assert source.rows.num_rows == 2 and not source.problems
    import pyarrow as pa

    rows = source.rows.append_column("shard", pa.array([0, 0]))
    write_shard(rows, storage.join(bucket, "shards"), source.categories)
    assert storage.list_files(storage.join(bucket, "shards")) == ["shard-00000.arrow"]


def test_shards_are_read_from_s3(bucket: str, tmp_path: Path) -> None:
    from pipelines.data.loader import FeedConfig, read_ahead
    from pipelines.data.manifest import Manifest
    from pipelines.data.ray_source import Reading
    from pipelines.data.sampler import Stream
    from pipelines.data.verify import verify
    from tests.support.shards import write_shards

    upload(write_shards(tmp_path), storage.join(bucket, "shards"))
    manifest = Manifest.load(storage.join(bucket, "shards"))
    assert verify(manifest.uri) == manifest
    for window in (0, 4):
        stream = Stream(seed=0, rows=8, batch=4, steps=4, window=window)
        found = [row["name"] for rows in read_ahead(Reading(stream, manifest.shard_set), FeedConfig()) for row in rows]
        assert found == [f"{stream.locate(position)[1]:03d}.jpg" for position in range(16)]
    storage.delete(storage.join(manifest.uri, "shard-00001.arrow"))
    with pytest.raises(ValueError, match=r"shard-00001\.arrow +the shard is missing; prepare the shards again"):
        verify(manifest.uri)


def test_what_mlflow_lacks_on_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays in the run's folder while the server is away."""
    from pipelines.tracking import tracker as tracker_module
    from pipelines.tracking.runs import Run
    from pipelines.tracking.spool import undelivered
    from tests.support.mlflow_server import MlflowServer

    monkeypatch.setattr(tracker_module, "CLOSING", 1.0)
    server, folder = MlflowServer(), f"{bucket}/run"
    server.stop()
    tracker = tracker_module.Tracker(Run(server.uri, server.run_id, "0"), folder)
    tracker.metrics(0, {"loss": 0.0})
    tracker.image(0, "a", np.zeros((2, 2, 3), np.uint8))
    assert not tracker.close()
    assert undelivered(folder) == ["1 metrics of steps 0 to 0", "overlays/step_000000/a.png"]
    server.start()
    assert tracker_module.deliver(tracker.run, folder) == []
    server.stop()
    assert server.steps("loss") == [0] and len(server.artifacts) == 1


def test_a_data_set_in_zips_on_s3(bucket: str, tmp_path: Path) -> None:
    from pipelines.data.readers import read_source
    from pipelines.data.readers.archive import read_file
    from tests.support.trees import CITY_FILES, zipped

    upload(zipped(tmp_path / "zips", CITY_FILES), f"{bucket}/cityscapes")
    source, local = (read_source("auto", root, "train") for root in (f"{bucket}/cityscapes", tmp_path / "zips"))
    assert (
        source.reader == "cityscapes" and source.rows["name"].equals(local.rows["name"]) and source.rows.num_rows == 2
    )
    for row, other in zip(source.rows.to_pylist(), local.rows.to_pylist(), strict=True):
        assert read_file(row["image"]) == read_file(other["image"]) and row["image"].startswith(f"zip:{bucket}/")
        truth, expected = (one.decode(r, read_file, one.categories) for one, r in ((source, row), (local, other)))
        np.testing.assert_array_equal(truth.segmentation.segments, expected.segmentation.segments)


def test_predictions_of_photographs_on_s3(bucket: str, tmp_path: Path, small_categories) -> None:
    """Model, photographs and results, none of them on this machine."""
    import json

    import cv2
    import numpy as np

    from jobs import predict
    from panoptic.png import from_coco
    from tests.support.stored import write_model

    model, photos, out = (storage.join(bucket, name) for name in ("model", "photos", "out"))
    upload(write_model(tmp_path / "model", small_categories), model)
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    for name in ("a.png", "below/b.png"):
        storage.write_bytes(storage.join(photos, name), cv2.imencode(".png", picture)[1].tobytes())
    arguments = [model, photos, "--out", out, "--formats", "coco", "overlay", "--actors", "0"]
    assert len(predict.main([*arguments, "--tracking.uri", "unused"])) == 2
    names = {"panoptic.json", *(f"panoptic/{k}.png" for k in ("a", "below/b"))}
    assert set(storage.list_files(out)) == names | {f"overlays/{k}.jpg" for k in ("a", "below/b")}
    content = json.loads(storage.read_bytes(storage.join(out, "panoptic.json")))
    for entry in content["annotations"]:
        png = storage.read_bytes(storage.join(out, "panoptic", entry["file_name"]))
        found = from_coco(png, entry, small_categories, entry["file_name"], (50, 70))
        assert found.areas().tolist() == [info["area"] for info in entry["segments_info"]]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.resolve("b")[1] == str(tmp_path / "b")
    assert storage.absolute(f"file://{tmp_path}/b") == str(tmp_path / "b")
    assert storage.absolute(f"file://{tmp_path}/a%20b%23") == str(tmp_path / "a b#")
    assert storage.absolute(f"file://localhost{tmp_path}/b") == str(tmp_path / "b")
    assert storage.absolute(f"{tmp_path}/a%20b?#") == str(tmp_path / "a%20b?#")  # a path, and no URI
    assert storage.absolute("~/x") == os.path.join(os.path.expanduser("~"), "x")
    assert storage.absolute("s3://bucket/key/") == "s3://bucket/key"


def test_writing_leaves_no_part(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(tmp_path / "file", "text")  # type: ignore[arg-type]
    assert storage.list_files(tmp_path) == ["file"]
    assert storage.read_bytes(tmp_path / "file") == b"old"


@pytest.mark.parametrize("uri", ["gs://bucket/key", "s3://", "", "file://server/share"])
def test_bad_uris(uri: str) -> None:
    with pytest.raises(ValueError, match=r"local path or s3|no bucket|empty path|names the machine 'server'"):
        storage.resolve(uri)


def test_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for call in (storage.read_bytes, storage.list_files):
        with pytest.raises(FileNotFoundError, match="missing: no such file"):
            call(tmp_path / "missing")
    with pytest.raises(OSError, match="file/below: could not be written"):
        storage.write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(ValueError, match="refuses to delete"):
        storage.delete("/")


def test_names_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path / "a") + b"\xff.jpg", "wb"):
        pass
    for call in (storage.list_files, photographs):
        with pytest.raises(ValueError, match=f"{tmp_path.name}: a name there is not UTF-8 .*rename the file"):
            call(str(tmp_path))


def check_create(root: str) -> None:
    """Of eight who create one file one succeeds, and its content stays."""
    from concurrent.futures import ThreadPoolExecutor

    file = storage.join(root, "below", "one.json")
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda k: storage.create(file, f"number {k}".encode()), range(8)))
    assert sum(done) == 1
    assert storage.read_bytes(file) == f"number {done.index(True)}".encode()
    assert not storage.create(file, b"late") and storage.read_bytes(file) != b"late"


def test_a_local_file_is_created_once(tmp_path: Path):
    check_create(str(tmp_path))


def test_an_object_is_created_once(bucket: str):
    check_create(bucket)
    with pytest.raises(OSError, match="could not be created"):
        storage.create("s3://no-such-bucket-of-ours/key", b"x")


def test_a_put_whose_answer_was_lost_is_our_own(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore sends it again and is told that the object exists."""
    import boto3

    real = boto3.client

    def repeating(*arguments, **options):
        client: Any = real(*arguments, **options)
        put = client.put_object
        client.put_object = lambda **wanted: (put(**wanted), put(**wanted))[1]
        return client

    monkeypatch.setattr(boto3, "client", repeating)
    file = storage.join(bucket, "lease.json")
    assert storage.create(file, b"mine")
    assert not storage.create(file, b"another's") and storage.read_bytes(file) == b"mine"


def test_a_store_that_is_away_is_an_os_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", storage.PATIENCE: "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="could not be created"):
        storage.create(storage.join(bucket, "key"), b"x")


@pytest.fixture
def proxy(bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """Between us and the S3 of our own, with little patience: 4 attempts with pauses of 0.15 s, 1 s for an answer."""
    proxy = S3Proxy(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.uri)
    monkeypatch.setenv(storage.PATIENCE, "0.2")
    yield proxy
    proxy.stop()


def test_each_row_on_s3_is_one_request_also_from_a_store_that_fails(
    bucket: str, proxy: S3Proxy, tmp_path: Path
) -> None:
    """Two workers that go on at a position where one stopped read the same rows; every fifth request fails."""
    from pipelines.data.loader import FeedConfig, read_ahead
    from pipelines.data.manifest import Manifest
    from pipelines.data.ray_source import Reading
    from pipelines.data.sampler import Stream
    from tests.support.shards import write_shards

    def read(stream: Stream) -> dict[int, str]:
        rows = read_ahead(Reading(stream, manifest.shard_set), FeedConfig())
        return {row["position"]: row["name"] for found in rows for row in found}

    def of_shards() -> int:
        return sum(method == "GET" and ".arrow" in path and not fault for _, method, path, fault in proxy.requests)

    upload(write_shards(tmp_path), storage.join(bucket, "shards"))
    manifest = Manifest.load(storage.join(bucket, "shards"))
    whole = Stream(seed=0, rows=8, batch=4, steps=10)
    proxy.requests.clear()
    found = read(whole)
    assert found == {position: f"{whole.locate(position)[1]:03d}.jpg" for position in range(40)}
    # beside the rows: each of the two shards is opened once, whatever the number of threads, and the index
    assert 40 < of_shards() <= 40 + 2 * 3 + 1
    proxy.fault = one_in(5)
    rest: dict[int, str] = {}
    for rank in range(2):
        rest |= read(replace(whole, start=12, steps=7, world=2, rank=rank))
    assert rest == {position: found[position] for position in range(12, 40)}
    assert proxy.times("busy") >= 5


def test_a_write_that_is_interrupted_leaves_no_part_of_a_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, which ends Ray's workers by an exception, comes when the upload has begun and nothing is sent yet."""
    file, whole = f"{bucket}/file", b"whole" * 100
    storage.write_bytes(file, b"old")
    filesystem, path = storage.resolve(file)

    class Interrupting:
        def open_output_stream(self, path: str) -> Any:
            stream = filesystem.open_output_stream(path)
            os.kill(os.getpid(), signal.SIGUSR1)
            return stream

    def leave(*_: object) -> None:
        raise SystemExit(1)

    former = signal.signal(signal.SIGUSR1, leave)
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit):
            patched.setattr(storage, "resolve", lambda uri: (Interrupting(), path))
            storage.write_bytes(file, whole)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert storage.read_bytes(file) == whole


def test_a_write_that_is_interrupted_while_its_thread_starts_goes_on_for_nobody(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"{bucket}/file"
    storage.write_bytes(file, b"old")
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_and_leave(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        raise SystemExit(1)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(threading.Thread, "start", start_and_leave)
        storage.write_bytes(file, b"new")
    # The abandoned thread ends when its executor is collected; had it anything to upload, it would do so now.
    gc.collect()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    assert storage.read_bytes(file) == b"old"


OPERATIONS = {
    "read": lambda root: storage.read_bytes(f"{root}/file"),
    "write": lambda root: storage.write_bytes(f"{root}/file", b"x"),
    "list": lambda root: storage.list_files(root),
    "exists": lambda root: storage.exists(f"{root}/file"),
    "delete": lambda root: storage.delete(f"{root}/file"),
    "create": lambda root: storage.create(f"{root}/new", b"x"),
}


@pytest.mark.parametrize("fault", ["refuse", "busy", "drop", "silent"])
def test_nothing_waits_without_end_for_a_store(
    bucket: str, proxy: S3Proxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation asks again, gives up within its bound, and works once the store does."""
    if fault == "silent":  # whose attempts take a second each
        monkeypatch.setenv(storage.PATIENCE, "0")
    storage.write_bytes(f"{bucket}/a/file", b"one")
    patience = storage.waits()
    longest = sum(patience.pauses()) + (patience.retries + 1) * (patience.answer if fault == "silent" else 0)
    for name in ("read", "create") if fault == "silent" else OPERATIONS:
        if fault == "refuse":
            proxy.stop()
        else:
            proxy.fault = lambda method, path: fault
        asked, begin = proxy.times(fault), time.monotonic()
        with pytest.raises(storage.Unavailable, match=r"^s3://\S+: could not be .*\w") as told:
            OPERATIONS[name](f"{bucket}/a")
        assert sum(patience.pauses()) <= time.monotonic() - begin < longest + 1.5, name
        assert "\n" not in str(told.value) and "AWS Error" not in str(told.value)
        assert fault == "refuse" or proxy.times(fault) - asked > patience.retries
        if fault == "refuse":
            proxy.start()
        proxy.fault = lambda method, path: ""
    assert storage.read_bytes(f"{bucket}/a/file") == b"one" and storage.create(f"{bucket}/a/new", b"x")


@pytest.mark.slow  # libcurl measures the speed over some seconds
def test_an_answer_that_stops_half_way_is_asked_for_again(bucket: str, proxy: S3Proxy) -> None:
    storage.write_bytes(f"{bucket}/file", bytes(range(256)))
    proxy.fault = lambda method, path: "stall" if method == "GET" and not proxy.times("stall") else ""
    assert storage.read_bytes(f"{bucket}/file") == bytes(range(256)) and proxy.times("stall") == 1


@pytest.mark.parametrize("fault", ["busy", "drop", "lose"])
def test_what_fails_now_and_then_is_done(bucket: str, proxy: S3Proxy, fault: str) -> None:
    """Every fourth request fails, some of them after they were done."""
    proxy.fault = one_in(4, fault)
    check_round_trip(f"{bucket}/prefix")
    for number in range(2):
        assert storage.create(f"{bucket}/leases/{number}", b"mine")
        assert not storage.create(f"{bucket}/leases/{number}", b"another's")
    assert proxy.times(fault) >= 5


def test_a_filesystem_takes_its_patience_along(bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """To Ray's processes, whose environment may lack it; pyarrow's own keeps its timeouts and loses its attempts."""
    sent = pickle.loads(pickle.dumps(storage.resolve(bucket)[0]))
    monkeypatch.delenv(storage.PATIENCE)
    proxy.fault = lambda method, path: "busy"
    with pytest.raises(OSError):
        sent.get_file_info(f"{bucket.removeprefix('s3://')}/x")
    assert proxy.times("busy") == 4


def test_the_patience_with_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(storage.PATIENCE, raising=False)
    assert storage.waits() == (11, 5.0, 5.0) and math.isclose(sum(storage.waits().pauses()), 51.15)
    for seconds in (0.0, 1.0, 30.0, 60.0, 1000.0):
        monkeypatch.setenv(storage.PATIENCE, str(seconds))
        found = storage.waits()
        longer = sum(found._replace(retries=found.retries + 1).pauses())
        assert len(found.pauses()) == found.retries and sum(found.pauses()) <= seconds < longer
    for wrong in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(storage.PATIENCE, wrong)
        with pytest.raises(ValueError, match=f"^{storage.PATIENCE}={wrong}: give the seconds"):
            storage.resolve("s3://bucket/key")


def test_places_that_vanish_with_a_submitted_job_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`ray job submit --working-dir .` runs in a copy of the code that Ray deletes."""
    from pipelines.tracking.runs import Tracking, check_store

    copy = tmp_path / "session_x" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for uri in ("runs", "s3://bucket/runs", str(tmp_path)):
        storage.check_lasting(uri, "--storage")
    check_store(Tracking(), "runs")
    monkeypatch.chdir(copy)
    told = "--storage runs: lies in Ray's temporary copy .* give a place that lasts .*--storage s3://bucket/folder"
    with pytest.raises(ValueError, match=told):
        storage.check_lasting("runs", "--storage")
    for uri in ("s3://bucket/runs", str(tmp_path)):
        storage.check_lasting(uri, "--storage")
    for tracking in (Tracking(), Tracking(uri="sqlite:///mlflow.db")):
        with pytest.raises(ValueError, match=r"--tracking\.uri .*mlflow\.db: lies in Ray's temporary copy"):
            check_store(tracking, "runs")
    check_store(Tracking(uri="http://mlflow:5000"), "runs")
    check_store(Tracking(), tmp_path)


def test_a_store_is_named_where_several_machines_write_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from pipelines.tracking.runs import Tracking, check_store

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    remedy = r".*: give --tracking\.uri http://HOST:5000, or export MLFLOW_TRACKING_URI$"
    check_store(Tracking(), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="^--tracking.uri: missing, though results go to s3://bucket/runs" + remedy):
        check_store(Tracking(), "runs", "s3://bucket/runs")
    check_store(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), "runs", "s3://bucket/runs")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match=r"^--tracking.uri: missing, though a cluster works \(RAY_ADDRESS\)" + remedy):
        check_store(Tracking(), tmp_path, tmp_path)
    check_store(Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db"), "runs", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    check_store(Tracking(), "runs", "s3://bucket/runs")
