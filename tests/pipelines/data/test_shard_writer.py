"""The work on one shard: how many images are read and how many are decoded at the same time."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data import shard_writer
from pipelines.data.readers.coco_panoptic import coco_panoptic
from tests.support.coco_folder import write_folder


class AtOnce:
    """Counts the calls of a function that run at the same time."""

    def __init__(self, function) -> None:
        self._function, self._running, self._lock = function, 0, threading.Lock()
        self.most = 0

    def __call__(self, *arguments):
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(0.05)
        try:
            return self._function(*arguments)
        finally:
            with self._lock:
                self._running -= 1


def test_eight_images_are_read_and_two_decoded_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is slow and has many at once; a core is fastest with few."""
    write_folder(tmp_path, "val", count=24)
    source = coco_panoptic(tmp_path, "val")
    rows = source.rows.append_column("shard", pa.array([0] * 24))
    read, decode = AtOnce(shard_writer.read_file), AtOnce(source.decode)
    monkeypatch.setattr(shard_writer, "read_file", read)
    report = json.loads(shard_writer.write_shard(rows, None, source.categories, decode)["report"][0].as_py())
    assert report["rows"] == 24 and not report["problems"]
    assert decode.most <= 2 < read.most <= 8
