"""Free bytes of disks, and errors that say that there are none."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from ray.train.v2.api.exceptions import ControllerError

from pipelines.cluster import disk
from tests.support.worker_failures import GLOO, KILLED, group_error, unhealthy

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def test_free_bytes_are_those_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    free = disk.free_bytes(tmp_path / "runs" / "new")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert disk.free_bytes("s3://bucket/runs") is None


def test_too_little_room_is_told_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda uri: 300 << 20)
    disk.check_room(tmp_path, 300 << 20, "the shards")
    with pytest.raises(disk.DiskFull) as refused:
        disk.check_room(tmp_path, 5 << 29, "the shards")
    assert str(refused.value) == (
        f"{tmp_path}: the shards need 2.5 GiB, 300 MiB are free. Make room there, and the same command goes on"
    )
    monkeypatch.setattr(disk, "free_bytes", lambda uri: None)
    disk.check_room("s3://bucket/runs", 1 << 60, "the shards")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (NO_SPACE, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("shard: could not be written: [Errno 28] Error writing bytes. No space left on device"), True),
        (group_error({0: GLOO, 1: NO_SPACE}), True),
        (ControllerError(caused(ValueError("checkpoint"), NO_SPACE)), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (group_error({0: GLOO, 1: KILLED}), False),
        (ControllerError(RuntimeError("no room")), False),
    ],
)
def test_a_full_disk_is_found_in_what_it_caused(error: Exception, full: bool) -> None:
    assert (disk.find_full(error) is not None) == full


def test_what_says_the_most_is_found_first() -> None:
    told = disk.full("s3://bucket/runs", 1 << 20, "a checkpoint's files")
    assert disk.find_full(group_error({0: NO_SPACE, 1: caused(told, NO_SPACE)})) is told
    assert disk.find_full(group_error({0: GLOO, 1: unhealthy(told)})) is told
    assert str(told) == (
        "s3://bucket/runs: the disk is full; a checkpoint's files need 1 MiB. "
        "Make room there, and the same command goes on"
    )
