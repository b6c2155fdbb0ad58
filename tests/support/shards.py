"""Shards of a tiny data set, written without Ray, and ways to change them afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data import prepare
from pipelines.data.manifest import Manifest
from pipelines.data.readers import coco_panoptic
from pipelines.data.shard_writer import Report, write_shard
from tests.support.coco_folder import write_folder

ROWS = 4
"""Of each of the two shards."""


def write_shards(folder: Path) -> Path:
    """Two shards of four images each, in `folder`/out."""
    write_folder(folder / "data", "val", count=2 * ROWS)
    source, out = coco_panoptic(folder / "data", "val"), folder / "out"
    rows = source.rows.append_column("shard", pa.array(np.arange(2 * ROWS) // ROWS))
    parts = [write_shard(rows.slice(first, ROWS), str(out), source.categories) for first in (0, ROWS)]
    reports = [Report(**json.loads(part["report"][0].as_py())) for part in parts]
    manifest = prepare._manifest(source, {"reader": "coco", "root": "", "split": "val", "fingerprint": ""}, reports)
    (out / "manifest.json").write_bytes(manifest.to_json())
    return out


def change_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the content of `manifest.json` in place."""
    file = folder / "manifest.json"
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def forge(folder: Path, data: bytes, shard: int = 0) -> Manifest:
    """Replace a shard and let the manifest agree: an attack that no hash shows."""
    (folder / f"shard-{shard:05d}.parquet").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_manifest(folder, lambda content: content["shards"][shard].update(sha256=digest))
    return Manifest.load(folder)
