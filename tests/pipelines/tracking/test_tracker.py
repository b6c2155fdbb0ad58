"""Records of a worker: at no cost to the step, once, and delivered after outages, kills and reopening."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.tracking import client as client_module
from pipelines.tracking import runs
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.runs import Run, Tracking, start
from pipelines.tracking.spool import Spool, undelivered
from pipelines.tracking.tracker import Tracker, deliver
from tests.support.mlflow_server import MlflowServer

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def run(mlflow_store: str, tmp_path: Path) -> Run:
    return start(Tracking(name="one"), tmp_path)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server with faults, and a tracker that is in a hurry: a hundredth of the usual intervals."""
    client_module._outages.clear()
    monkeypatch.setattr(client_module, "PAUSE", 0.15)
    monkeypatch.setattr(tracker_module, "INTERVAL", 0.1)
    monkeypatch.setattr(tracker_module, "RETRY", 0.05)
    server = MlflowServer()
    yield server
    server.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing gives up soon: for tests in which it does."""
    monkeypatch.setattr(tracker_module, "CLOSING", 0.6)


@pytest.fixture
def remote(server: MlflowServer) -> Run:
    return Run(server.uri, server.run_id, "0")


def history(run: Run, key: str) -> list[tuple[int, float]]:
    found = client_module.connect(run.tracking_uri).get_metric_history(run.run_id, key)
    return [(metric.step, metric.value) for metric in found]


def artifacts(run: Run, folder: str = "") -> list[str]:
    return [f.path for f in client_module.connect(run.tracking_uri).list_artifacts(run.run_id, folder or None)]


def silent(run: Run, caplog: pytest.LogCaptureFixture) -> bool:
    """No outage of this run's server was told; a thread of an earlier test may still tell of its own server."""
    return not any(run.tracking_uri in line and "does not answer" in line for line in caplog.messages)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def test_metrics_are_written_in_one_request_and_steps_only_once(run, monkeypatch):
    tracker = Tracker(run)
    calls = []
    log_batch = tracker._client.log_batch
    monkeypatch.setattr(tracker._client, "log_batch", lambda *a, **k: (calls.append(1), log_batch(*a, **k)))
    for step in range(5):
        tracker.metrics(step, {"train/loss": step / 2, "val/pq@0.5": float("nan")})
    assert history(run, "train/loss") == []
    assert tracker.close() and calls == [1]
    assert history(run, "train/loss") == [(s, s / 2) for s in range(5)]
    assert "val/pq_0.5" in client_module.connect(run.tracking_uri).get_run(run.run_id).data.metrics
    continued = Tracker(run)
    for step in (3, 4, 5):
        continued.metrics(step, {"train/loss": -1.0, "new": 1.0})
    continued.close()
    assert history(run, "train/loss") == [*((s, s / 2) for s in range(5)), (5, -1.0)]
    assert [step for step, _ in history(run, "new")] == [3, 4, 5]


def test_a_run_that_goes_back_to_another_training_writes_its_steps_again(run):
    """After an exchange, and when it is started again after that: the newest figure is the one that is shown."""
    first = Tracker(run)
    for step in (100, 200):
        first.metrics(step, {"val/pq": step / 10})
    first.close()
    taken = Tracker(run)
    taken.rewind(100)
    taken.metrics(100, {"val/pq": 99.0})  # the donor's, which this run had, too
    taken.metrics(150, {"val/pq": 40.0})
    taken.close()
    assert history(run, "val/pq") == [(100, 10.0), (200, 20.0), (150, 40.0)]
    again = Tracker(run)
    again.metrics(150, {"val/pq": 41.0})  # repeated after a restart
    again.metrics(200, {"val/pq": 50.0})
    again.close()
    assert history(run, "val/pq")[2:] == [(150, 40.0), (200, 50.0)]
    assert client_module.connect(run.tracking_uri).get_run(run.run_id).data.metrics["val/pq"] == 50.0


def test_tables_texts_overlays_tags_and_figures(run, tmp_path):
    tracker = Tracker(run, tmp_path / "run")
    tracker.table("classes", [{"name": "person", "pq": 1.5}, {"name": "sky", "pq": 2.0}], "person 1.5")
    tracker.image(123, "000", PICTURE)
    tracker.tags({"state": "bad"})
    tracker.tags({"state": "good"})
    tracker.figures({"best/val/pq": 50.0})
    assert tracker.close()
    assert sorted(artifacts(run)) == ["classes.csv", "classes.txt", "overlays"]
    assert artifacts(run, "overlays/step_000123") == ["overlays/step_000123/000.png"]
    root = tmp_path / "mlruns" / "panoptic" / run.run_id / "artifacts"
    assert (root / "classes.csv").read_text().splitlines() == ["name,pq", "person,1.5", "sky,2.0"]
    picture = cv2.imread(str(root / "overlays/step_000123/000.png"))
    assert picture is not None and np.array_equal(picture[..., ::-1], PICTURE)
    data = client_module.connect(run.tracking_uri).get_run(run.run_id).data
    assert data.tags["state"] == "good" and data.metrics["best/val/pq"] == 50.0
    assert undelivered(tmp_path / "run") == [] and list((tmp_path / "run").iterdir()) == []


def test_a_picture_of_each_step_is_found_by_mlflows_slider(run, tmp_path):
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

    tracker = Tracker(run, tmp_path)
    tracker.slider(3, "street/a#1", np.repeat(PICTURE, 100, 1))
    assert tracker.close()
    client = client_module.connect(run.tracking_uri)
    assert client.get_run(run.run_id).data.tags[MLFLOW_LOGGED_IMAGES] == "True"
    ours = artifacts(run, "images")
    client.log_image(run.run_id, PICTURE, key="overlays/street_a_1", step=3, synchronous=True)
    theirs = sorted(set(artifacts(run, "images")) - set(ours))
    assert [_shape(name) for name in ours] == [_shape(name) for name in theirs]
    small = client.download_artifacts(run.run_id, next(name for name in ours if name.endswith(".webp")), str(tmp_path))
    assert cv2.imread(small).shape == (2, 256, 3)


def _shape(name: str) -> str:
    """The name of a picture, with each number and random name as a letter."""
    name = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "u", name)
    return re.sub(r"timestamp\+\d+", "timestamp+t", name)


def test_environment_is_left_as_it_was(run):
    before = dict(os.environ)
    tracker = Tracker(run)
    tracker.metrics(0, {"a": 1.0})
    tracker.close()
    assert dict(os.environ) == before


def test_the_step_does_not_wait_for_a_slow_server(server, remote, tmp_path):
    server.delay = 0.3
    tracker = Tracker(remote, tmp_path)
    picture, rows = np.zeros((500, 1500, 3), np.uint8), [{"name": "sky", "pq": 2.0}]
    begin = time.perf_counter()
    for step in range(20):
        tracker.metrics(step, {f"train/{k}": 1.0 for k in range(10)})
    tracker.table("classes", rows)
    tracker.image(19, "a", picture)
    tracker.flush()
    assert time.perf_counter() - begin < 1  # 22 writes, of 0.3 s each
    assert tracker.close()
    assert server.steps("train/3") == list(range(20)) and set(server.received.values()) == {1}
    assert server.uploads == {"classes.csv": 1, "overlays/step_000019/a.png": 1}


def test_a_server_that_is_slow_and_then_errs_costs_less_than_two_percent_and_nothing_is_lost(
    server, remote, tmp_path, monkeypatch
):
    """Steps of 100 ms with ten metrics each, and a picture now and then: two seconds an answer, then 500, then well.

    The share is that of the CPU, which other processes of the machine do not change; a call that waited for the server
    would take seconds of the clock.
    """
    monkeypatch.setattr(tracker_module, "INTERVAL", 0.5)
    monkeypatch.setattr(client_module, "PAUSE", 0.5)
    tracker = Tracker(remote, tmp_path)
    picture, steps, step_seconds = np.zeros((96, 128, 3), np.uint8), 50, 0.1
    cpu = clock = 0.0
    for step in range(steps):
        server.delay, server.status = (2.0, 200) if step < 25 else (0.0, 500 if step < 40 else 200)
        time.sleep(step_seconds)
        before, begin = time.thread_time(), time.perf_counter()
        tracker.metrics(step, {f"train/{k}": step + k / 16 for k in range(10)})
        if step % 10 == 0:
            tracker.image(step, "a", picture)
        cpu, clock = cpu + time.thread_time() - before, clock + time.perf_counter() - begin
    assert cpu < 0.02 * steps * step_seconds and clock < 1.0, (cpu, clock)
    assert tracker.close()
    for k in range(10):
        assert sorted((s, v) for key, s, v, _ in server.metrics if key == f"train/{k}") == [
            (step, step + k / 16) for step in range(steps)
        ]
    assert sorted(server.artifacts) == [f"overlays/step_{step:06d}/a.png" for step in range(0, steps, 10)]
    assert undelivered(tmp_path) == []


def test_metrics_arrive_while_the_run_goes_on(server, remote, tmp_path):
    tracker = Tracker(remote, tmp_path)
    for step in range(3):
        tracker.metrics(step, {"loss": 1.0})
        wait_for(lambda step=step: server.steps("loss") == list(range(step + 1)))
    tracker.close()


@pytest.mark.parametrize("fault", ["refuses", "500", "hangs"])
def test_an_outage_loses_nothing_and_is_two_lines(fault, server, remote, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracker_module, "TIMEOUT", 1)
    tracker = Tracker(remote, tmp_path)
    tracker.metrics(0, {"loss": 0.0})
    wait_for(lambda: server.steps("loss") == [0])
    if fault == "refuses":
        server.stop()
    elif fault == "500":
        server.status = 500
    else:
        server.delay = 1.3
    for step in range(1, 4):
        tracker.metrics(step, {"loss": float(step)})
        tracker.table(f"classes/step_{step}", [{"pq": step}])
        tracker.image(step, "a", PICTURE)
        time.sleep(0.2)
    wait_for(lambda: any("does not answer" in line for line in caplog.messages))
    time.sleep(0.5)  # several attempts
    if fault == "refuses":
        server.start()
    server.delay, server.status = 0.0, 200
    wait_for(lambda: len(server.artifacts) == 6 and server.steps("loss") == [0, 1, 2, 3])
    assert tracker.close()
    assert fault == "hangs" or max(server.received.values()) == 1  # what hung had arrived; MLflow stores it once
    assert server.artifacts["classes/step_3.csv"] == b"pq\r\n3\r\n"
    lines = [line for line in caplog.messages if server.uri in line]
    reason = {"refuses": "Connection refused", "500": "500 error responses", "hangs": "timed out"}[fault]
    assert reason in lines[0]
    assert len(lines) == 2 and "does not answer" in lines[0] and "is back after" in lines[1]
    assert "Retrying" not in caplog.text + "".join(capfd.readouterr())
    assert undelivered(tmp_path) == []


def test_an_answer_that_is_lost_writes_nothing_twice(server, remote, tmp_path):
    server.lost_answers = 2
    tracker = Tracker(remote, tmp_path)
    for step in range(3):
        tracker.metrics(step, {"loss": float(step)})
    tracker.text("a.txt", "once")
    assert tracker.close()
    assert server.steps("loss") == [0, 1, 2] and server.artifacts == {"a.txt": b"once"}


def test_what_an_ended_run_could_not_deliver_is_delivered_when_it_is_opened_again(
    impatient, server, remote, tmp_path, caplog
):
    server.stop()
    tracker = Tracker(remote, tmp_path)
    for step in range(11, 31):
        tracker.metrics(step, {"loss": float(step)})
    tracker.table("classes/step_000030", [{"pq": 1}], "pq 1")
    tracker.image(30, "a", PICTURE)
    tracker.tags({"state": "good"})
    begin = time.monotonic()
    assert not tracker.close()
    assert time.monotonic() - begin < 2
    left = ["20 metrics of steps 11 to 30", "tag state"]
    left += ["classes/step_000030.csv", "classes/step_000030.txt", "overlays/step_000030/a.png"]
    assert undelivered(tmp_path) == left
    assert "not in MLflow: 20 metrics of steps 11 to 30, tag state, classes/step_000030.csv" in caplog.text
    assert f"kept in {tmp_path} and sent by the same command" in caplog.text
    assert deliver(remote, tmp_path) == left  # still away

    for thread in threading.enumerate():  # one that has given up may still ask, and would then be heard
        if thread.name == f"mlflow-{remote.run_id}":
            thread.join(30)
    server.start()
    assert deliver(remote, tmp_path) == []
    assert server.steps("loss") == list(range(11, 31)) and set(server.received.values()) == {1}
    assert server.tags == {"state": "good"} and set(server.uploads.values()) == {1} and len(server.uploads) == 3
    assert list(tmp_path.iterdir()) == []
    asked = len(server.requests)
    assert deliver(remote, tmp_path) == [] and len(server.requests) == asked


def test_a_run_that_goes_on_delivers_what_was_left_and_repeats_no_step(impatient, server, remote, tmp_path):
    server.status = 500
    tracker = Tracker(remote, tmp_path)
    for step in range(11, 31):
        tracker.metrics(step, {"loss": float(step)})
    thread = tracker._thread
    tracker.close()
    assert thread is not None
    thread.join()  # a request may be under way, which would be taken from now on
    server.status = 200
    continued = Tracker(remote, tmp_path)
    for step in range(21, 41):  # from the checkpoint of step 20
        continued.metrics(step, {"loss": -float(step)})
    assert continued.close()
    assert server.steps("loss") == list(range(11, 41)) and set(server.received.values()) == {1}


def test_a_process_that_is_killed_leaves_everything_in_the_folder(server, remote, tmp_path):
    """Before anything was tried: the interval had not passed, or the request hangs."""
    server.delay = 3.0
    tracker = Tracker(remote, tmp_path)
    tracker.metrics(7, {"loss": 1.0})
    tracker.text("a.txt", "kept")
    wait_for(lambda: undelivered(tmp_path) == ["1 metrics of steps 7 to 7", "a.txt"], 2)


def test_a_torn_spool_delivers_the_rest(server, remote, tmp_path, caplog):
    entries = [{"key": "loss", "value": float(s), "step": s, "timestamp": 1000 + s} for s in range(4)]
    lines = [json.dumps(entry) for entry in entries]
    file = tmp_path / f"mlflow-{server.run_id}.jsonl"
    file.write_text(f"{lines[0]}\n{lines[1]}\n\0\0\0\0\n{lines[2][:20]}")
    (tmp_path / f"mlflow-{server.run_id}" / "classes").mkdir(parents=True)
    (tmp_path / f"mlflow-{server.run_id}" / "classes" / ".a.csv.0123abcd.tmp").write_text("to")
    (tmp_path / f"mlflow-{server.run_id}" / "classes" / "b.csv").write_text("whole")
    tracker = Tracker(remote, tmp_path)
    tracker.metrics(3, {"loss": 3.0})
    assert tracker.close()
    assert server.steps("loss") == [0, 1, 3] and server.artifacts == {"classes/b.csv": b"whole"}
    assert "a spooled line was torn" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_metric_behind_a_torn_line_is_kept(impatient, server, remote, tmp_path):
    """The next process does not write into the torn line."""
    server.stop()
    (tmp_path / f"mlflow-{server.run_id}.jsonl").write_text('{"key": "lo')
    tracker = Tracker(remote, tmp_path)
    tracker.metrics(3, {"loss": 3.0})
    tracker.close()
    assert undelivered(tmp_path) == ["1 metrics of steps 3 to 3"]


def test_an_artifact_that_is_refused_does_not_hold_up_the_others(server, remote, tmp_path, caplog):
    server.refused = "bad.txt"
    tracker = Tracker(remote, tmp_path)
    for name in ("bad.txt", "good.txt"):
        tracker.text(name, name)
    tracker.metrics(0, {"loss": 0.0})
    assert not tracker.close()
    assert server.artifacts == {"good.txt": b"good.txt"} and server.steps("loss") == [0]
    assert undelivered(tmp_path) == ["bad.txt"] and caplog.text.count("bad.txt is not written") == 1
    server.refused = ""
    assert deliver(remote, tmp_path) == [] and "bad.txt" in server.artifacts


def test_an_artifact_that_fails_silences_nothing_else(server, remote, tmp_path, caplog, monkeypatch):
    """No outage of the store is made of it: metrics and other artifacts, of everything in the process, go on at once.

    Before, all waited for `PAUSE` after each attempt.
    """
    monkeypatch.setattr(client_module, "PAUSE", 60.0)
    server.broken = "bad.txt"
    tracker = Tracker(remote, tmp_path)
    tracker.text("bad.txt", "bad.txt")
    wait_for(lambda: any(path.endswith("bad.txt") for path in server.requests))
    tracker.text("good.txt", "good.txt")
    tracker.metrics(1, {"loss": 1.0})
    wait_for(lambda: "good.txt" in server.artifacts and server.steps("loss") == [1], 5)
    assert runs.describe(remote, "at once") and silent(remote, caplog)
    assert not tracker.close() and undelivered(tmp_path) == ["bad.txt"]
    assert caplog.text.count("bad.txt is not written") == 1
    server.broken = ""
    assert deliver(remote, tmp_path) == [] and server.artifacts["bad.txt"] == b"bad.txt"


def test_an_artifact_that_fails_for_a_moment_is_sent_again(server, remote, tmp_path):
    server.broken = "bad.txt"
    tracker = Tracker(remote, tmp_path)
    tracker.text("bad.txt", "bad.txt")
    wait_for(lambda: any(path.endswith("bad.txt") for path in server.requests))
    server.broken = ""
    wait_for(lambda: "bad.txt" in server.artifacts)
    assert tracker.close()


def test_pictures_whose_names_mean_something_in_uris(server, remote, tmp_path, run):
    """The server once got `a` for `a#1`, and nothing where a name held a percent sign."""
    names = ["a#1", "a?2", "a%203", "../b", "ä 日", "c\nd", "e" * 300]
    for one in (remote, run):
        tracker = Tracker(one, tmp_path / one.run_id)
        for name in names:
            tracker.image(1, name, PICTURE)
        assert tracker.close()
    safe = ["a_1", "a_2", "a_203", "_._b", "ä 日", "c_d"]
    found = sorted(path.split("/")[-1] for path in server.artifacts)
    assert set(found) >= {f"{name}.png" for name in safe} and len(found) == len(names)
    assert sorted(path.split("/")[-1] for path in artifacts(run, "overlays/step_000001")) == found


def test_one_file_that_cannot_be_kept_does_not_keep_others_from_it(tmp_path):
    spool = Spool(tmp_path, "run")
    (tmp_path / "mlflow-run").mkdir()
    (tmp_path / "mlflow-run" / "folder").write_text("a file")
    spool.put("folder/a.txt", b"a")
    spool.put("b.txt", b"b")
    with pytest.raises(OSError, match=r"folder/a\.txt: could not be written"):
        spool.save()
    assert (tmp_path / "mlflow-run" / "b.txt").read_bytes() == b"b" and spool.path("folder/a.txt") is None


def test_a_folder_that_cannot_be_written_costs_a_warning(server, remote, tmp_path, caplog):
    (tmp_path / "full").write_text("a file where the folder should be")
    tracker = Tracker(remote, tmp_path / "full")
    tracker.metrics(0, {"loss": 0.0})
    tracker.text("a.txt", "sent")
    assert tracker.close()
    assert server.steps("loss") == [0] and server.artifacts == {"a.txt": b"sent"}
    assert "cannot be kept" in caplog.text


def test_closing_is_bounded_when_the_server_hangs(impatient, server, remote, tmp_path):
    server.delay = 5.0
    tracker = Tracker(remote, tmp_path)
    tracker.metrics(0, {"loss": 0.0})
    tracker.text("a.txt", "kept")
    begin = time.monotonic()
    assert not tracker.close()
    assert 0.5 < time.monotonic() - begin < 2
    assert undelivered(tmp_path) == ["1 metrics of steps 0 to 0", "a.txt"]


def test_closing_goes_on_while_the_server_takes_things(server, remote, tmp_path, monkeypatch):
    """Longer than its patience without an answer, until all is delivered or the time is over."""
    monkeypatch.setattr(tracker_module, "CLOSING", 1.0)
    server.delay = 0.1
    tracker = Tracker(remote, tmp_path)
    for k in range(12):
        tracker.text(f"{k}.txt", "slowly")
    begin = time.monotonic()
    assert tracker.close() and time.monotonic() - begin > tracker_module.CLOSING
    assert len(server.artifacts) == 12
    for k in range(12, 24):
        tracker.text(f"{k}.txt", "slowly")
    assert not tracker.close(longest=0.3)
    left = len(undelivered(tmp_path))
    assert 0 < left < 12


def test_last_words_heed_one_outage(server, remote, caplog, monkeypatch):
    """Status, description and model of a run whose server went: one attempt for all, then none for a while."""
    monkeypatch.setattr(client_module, "PAUSE", 60.0)
    server.stop()
    begin = time.monotonic()
    assert not runs.describe(remote, "PQ 50")
    runs.finish(remote, "FINISHED")
    runs.tag(remote, {"state": "finished"})
    with pytest.raises(ConnectionError, match="does not answer"):
        client_module.reach(remote.tracking_uri)
    assert time.monotonic() - begin < 2
    told = [line for line in caplog.messages if line.startswith(f"tracking: MLflow at {remote.tracking_uri} ")]
    reason = "[Errno 111] Connection refused"
    assert told == [
        f"tracking: MLflow at {remote.tracking_uri} does not answer ({reason}); what it lacks is sent when it does"
    ]
    client_module._outages.clear()
    server.start()
    assert runs.describe(remote, "PQ 50") and server.tags["mlflow.note.content"] == "PQ 50"
    runs.finish(remote, "FINISHED")
    assert server.run_status == "FINISHED"
    with client_module.answering(remote.tracking_uri) as client:
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
        assert client.get_run(remote.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        '{"key": 1, "value": 0.5, "step": 1, "timestamp": 1}',
        '{"key": "loss", "value": "much", "step": 1, "timestamp": 1}',
        '{"tag": "x"}',
        '{"rewind": null}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:20],
)
def test_a_line_of_the_spool_that_was_edited_is_left_out_and_the_rest_sent(line, server, remote, tmp_path, caplog):
    """The request would fail for ever, as if the store were away."""
    good = '{"key": "loss", "value": 0.5, "step": 2, "timestamp": 1}'
    (tmp_path / f"mlflow-{remote.run_id}.jsonl").write_text(f"{line}\n{good}\n")
    assert deliver(remote, tmp_path) == [] and server.steps("loss") == [2]
    assert "was torn or changed and is left out" in caplog.text
    assert silent(remote, caplog)


def test_what_is_kept_outlives_the_machine_on_s3_too(impatient, server, remote, tmp_path):
    """Before `keep`, what waits for S3 is in memory alone: a folder on S3 is written when a delivery has failed."""
    server.delay = 3.0
    tracker = Tracker(remote, tmp_path)
    tracker._spool.local = False  # as on S3
    tracker.metrics(7, {"loss": 1.0})
    wait_for(lambda: bool(tracker._spool.records), 2)
    assert undelivered(tmp_path) == []
    assert tracker.keep().wait(10)
    assert undelivered(tmp_path) == ["1 metrics of steps 7 to 7"]
