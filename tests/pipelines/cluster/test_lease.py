"""Leases: one of many gets it, an expired one passes on, and nobody else's is touched."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from pipelines.cluster import lease as leases
from pipelines.cluster import storage
from pipelines.cluster.lease import Busy, acquire, holder, wait


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
    assert acquire(tmp_path, 60) is None
    time.sleep(1.1)
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
