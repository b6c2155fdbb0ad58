"""A worker whose disk is full. Every process that works for a preparation imports this module."""

from __future__ import annotations

import errno
from typing import Any
from unittest import mock

import pyarrow as pa

from panoptic.segmentation import Categories
from pipelines.data import prepare as preparation

WRITE = preparation._write_or_tell


def on_a_full_disk(rows: pa.Table, out: str, categories: Categories, **how: Any) -> pa.Table:
    """What a worker does whose disk is full when it writes the second of three shards."""
    if rows["shard"][0].as_py() != 1:
        return WRITE(rows, out, categories, **how)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("pipelines.cluster.storage.os.replace", side_effect=full):
        return WRITE(rows, out, categories, **how)
