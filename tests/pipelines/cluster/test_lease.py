"""Leases: one of many gets it, an expired one passes on, and nobody else's is touched."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.cluster import lease as leases
from pipelines.cluster import storage
from pipelines.cluster.lease import Busy, acquire, hold, holder, is_gone, last, wait


def test_one_of_many_gets_it(tmp_path: Path):
    found, barrier = [], threading.Barrier(8)

    def contender() -> None:
        barrier.wait()
        found.append(acquire(tmp_path / "lease", 60))

    threads = [threading.Thread(target=contender) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [lease for lease in found if lease is not None]
    assert len(found) == 8 and len(held) == 1
    assert holder(tmp_path / "lease") == held[0].owner and held[0].held()


def test_the_dead_are_followed(tmp_path: Path):
    first = acquire(tmp_path, 0.05)
    assert first is not None and acquire(tmp_path, 60) is None
    time.sleep(0.06)
    second = acquire(tmp_path, 60)
    assert second is not None and second.held() and not first.held()
    assert acquire(tmp_path, 60) is None


def test_a_holder_stays_alive_while_it_works_and_gives_up_at_the_end(tmp_path: Path):
    lease = acquire(tmp_path, 0.3)
    assert lease is not None
    with lease.kept():
        time.sleep(0.8)
        assert acquire(tmp_path, 60) is None
    assert acquire(tmp_path, 60) is not None


def test_who_was_presumed_dead_leaves_the_follower_alone(tmp_path: Path):
    first = acquire(tmp_path, 0.01)
    time.sleep(0.02)
    second = acquire(tmp_path, 60)
    assert first is not None and second is not None
    with first.kept():
        pass
    assert second.held() and holder(tmp_path) == second.owner
    assert acquire(tmp_path, 60) is None


def test_a_file_without_content_is_young(tmp_path: Path):
    assert storage.create(tmp_path / "000001.json", b"")
    assert acquire(tmp_path, 60) is None and holder(tmp_path) == "another process"
    (tmp_path / "000001.json").write_text(json.dumps({"owner": "x", "expires": 0}))
    lease = acquire(tmp_path, 60)
    assert lease is not None and lease.number == 2


def test_errors_of_the_store_end_neither_renewal_nor_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    lease, write, calls = acquire(tmp_path, 1.0), storage.write_bytes, []

    def failing(uri: storage.Uri, data: bytes) -> None:
        calls.append(json.loads(data)["expires"])
        if len(calls) in (1, 3):
            raise OSError("slow down")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", failing)
    assert lease is not None
    with lease.kept():
        while len(calls) < 2:  # fails after a third of a second, is repeated a tenth later
            time.sleep(0.01)
        assert acquire(tmp_path, 60) is None
        calls[:] = calls[:2]
    assert len(calls) == 3 and "not renewed (slow down)" in caplog.text and "left to expire (slow down)" in caplog.text
    with monkeypatch.context() as another:  # process, for which it has to expire
        another.setattr(leases, "_left", set())
        assert acquire(tmp_path, 60) is None
    assert acquire(tmp_path, 60) is not None  # this one knows that it has left


def test_a_store_that_is_away_is_not_asked_once_more_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lease, calls = acquire(tmp_path, 0.3), []
    assert lease is not None

    def away(folder: storage.Uri) -> bool:
        calls.append(folder)
        raise storage.Unavailable("gone")

    with lease.kept(), monkeypatch.context() as patch:
        patch.setattr(storage, "exists", away)
        while not calls:
            time.sleep(0.01)
        time.sleep(0.05)
        before = len(calls)
    assert len(calls) - before <= 1  # a renewal that was on its way
    assert acquire(tmp_path, 60) is not None


def test_waiting_ends_when_the_holder_is_done_or_patience_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.1)
    first = acquire(tmp_path, 60)
    assert first is not None
    with pytest.raises(Busy, match=f"is held by {first.owner}; try again"):
        wait(tmp_path, 60)
    monkeypatch.setattr(leases, "PATIENCE", 10.0)
    threading.Timer(0.1, lambda: first.renew(0)).start()
    assert wait(tmp_path, 60).number == 2


HOLDER = """
import sys, time
from pipelines.cluster.lease import hold
with hold(sys.argv[1], "the run"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_the_holder_of_a_place_is_named_and_followed_at_once_when_it_is_killed(tmp_path: Path):
    with other_process(tmp_path) as process:
        began = time.monotonic()
        told = rf"the run is in use by process {process.pid} on {socket.gethostname()} since 2\d{{3}}-.*--name"
        with pytest.raises(Busy, match=told), hold(tmp_path, "the run"):
            pass
        lease = last(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert is_gone(lease)
        with hold(tmp_path, "the run") as held:
            assert last(tmp_path)["pid"] == os.getpid() and held.number == 2
        assert time.monotonic() - began < 5
    with hold(tmp_path, "the run") as held:  # given up, though this process lives
        assert held.number == 3


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_holder_that_is_halted_for_long_still_holds_its_place(tmp_path: Path):
    """Ctrl-Z, or a machine that slept: its lease has expired meanwhile."""
    with other_process(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        file = tmp_path / "000001.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"expires": time.time() - 100}))
        with pytest.raises(Busy), hold(tmp_path, "the run"):
            pass
        process.send_signal(signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_process_of_the_same_number_is_not_the_holder(tmp_path: Path):
    with hold(tmp_path, "the run"):
        holding = last(tmp_path)
    assert not is_gone(holding) and is_gone(holding | {"began": "1"})
    assert not is_gone(holding | {"began": "1", "machine": "another"}), "nobody here can say"


def write_foreign(folder: Path, seconds: float) -> None:
    """The lease of a process on another machine."""
    content = {"owner": "far:7:abc", "expires": time.time() + seconds, "machine": "far", "pid": 7, "began": "1"}
    folder.mkdir(exist_ok=True)
    (folder / "000001.json").write_text(json.dumps(content | {"since": time.time(), "released": False}))


def test_a_holder_on_another_machine_shows_that_it_lives_by_renewing(tmp_path: Path):
    write_foreign(tmp_path, 1)
    threading.Timer(0.3, lambda: write_foreign(tmp_path, 60)).start()
    with pytest.raises(Busy, match="process 7 on far"), hold(tmp_path, "the run", 1):
        pass


def test_a_holder_on_another_machine_that_shows_no_life_is_followed(tmp_path: Path):
    write_foreign(tmp_path, 0.5)
    with hold(tmp_path, "the run", 1) as held:
        assert held.number == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"owner": 3, "expires": 0}',
        b'{"owner": "x", "expires": null}',
        b'{"owner": "x", "expires": "soon"}',
        b'{"owner": "x", "expires": NaN}',
        b'{"owner": "x", "expires": Infinity}',
        b'{"owner": "x", "expires": 1e18}',
        b'{"owner": "x", "expires": 1e400, "pid": "many", "since": []}',
    ],
)
def test_a_lease_that_was_edited_holds_for_its_time_from_its_writing(content: bytes, tmp_path):
    """It neither ends whoever asks, nor holds the place for ever, as one that expires in a thousand years did."""
    file = tmp_path / "000001.json"
    file.write_bytes(content)
    assert acquire(tmp_path, 30.0) is None
    assert isinstance(holder(tmp_path), str)
    os.utime(file, (time.time() - 40, time.time() - 40))
    held = acquire(tmp_path, 30.0)
    assert held is not None and held.number == 2
    with pytest.raises(Busy, match="the run is in use by process"), hold(tmp_path, "the run", 1.0):
        raise AssertionError
