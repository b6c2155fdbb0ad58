"""Shards of a tiny data set, written without Ray, and ways to change them afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data import prepare
from pipelines.data.manifest import Manifest, Shard
from pipelines.data.readers import coco_panoptic
from pipelines.data.shard_file import Encoded, encode_shard, shard_schema
from pipelines.data.shard_index import Entries, write_index
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
    origin = {"reader": "coco", "root": "", "split": "val", "fingerprint": ""}
    index = write_index(out, [report.entries for report in reports], pa.int64())
    (out / "manifest.json").write_bytes(prepare._manifest(source, origin, reports, index).to_json())
    return out


def store(root: Path, parts: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[tuple[Shard, ...], str]:
    """Rows as shards and their index in a folder: what a manifest says about them."""
    schema = shard_schema(pa.string() if isinstance(parts[0][0]["image_id"], str) else pa.int64())
    shards, entries = [], []
    for number, rows in enumerate(parts):
        data, spans = encode_shard(rows, schema)
        path = f"shard-{number:05d}.arrow"
        (root / path).write_bytes(data)
        shards.append(Shard(path, len(rows), len(data), hashlib.sha256(data).hexdigest()))
        entries.append(Entries(spans, [row["name"] for row in rows], [row["image_id"] for row in rows]))
    return tuple(shards), write_index(root, entries, schema.field("image_id").type)


def change_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the content of `manifest.json` in place."""
    file = folder / "manifest.json"
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def read_table(folder: Path, shard: int = 0) -> pa.Table:
    """A shard, as any Arrow tool reads it."""
    return pa.ipc.open_file(folder / f"shard-{shard:05d}.arrow").read_all()


def forge(folder: Path, encoded: Encoded, shard: int = 0) -> Manifest:
    """Replace a shard and let index and manifest agree: an attack that no hash shows."""
    data, spans = encoded
    (folder / f"shard-{shard:05d}.arrow").write_bytes(data)
    old = pa.ipc.open_file(folder / "_index.arrow").read_all()
    entries = []
    for number in range(old["shard"][-1].as_py() + 1):
        part = old.filter(pc.equal(old["shard"], number)).to_pydict()
        places = list(zip(part["offset"], part["length"], part["crc32"], strict=True))
        if number == shard:  # as many rows as the forged file has, under the old names
            places, count = list(spans), len(part["name"])
            part["name"] = [part["name"][k % count] for k in range(len(places))]
            part["image_id"] = [part["image_id"][k % count] for k in range(len(places))]
        entries.append(Entries(places, part["name"], part["image_id"]))
    digest = write_index(folder, entries, old.schema.field("image_id").type)

    def agree(content: dict) -> None:
        content["index"] = digest
        content["shards"][shard].update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    change_manifest(folder, agree)
    return Manifest.load(folder)
