"""Our feed beside what users would pick instead (rows feeds and feeds-bytes).

The same rows in every form of storage, each way in a process of its own (`feed_ways`), in turn. These are figures of
the whole machine: nothing else should run. WebDataset and MosaicML streaming are no dependencies: they are measured
where DIR/site-packages holds them (`pip install --target DIR/site-packages webdataset mosaicml-streaming`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster import session
from pipelines.data.manifest import Manifest
from pipelines.data.prepare import prepare
from pipelines.data.readers import READERS
from pipelines.data.shard_reader import Rows
from tests.benchmarks import throughput
from tests.benchmarks.feed_ways import WAYS, WORKERS
from tests.benchmarks.timing import Row

DRAWN = 64
"""Images that are drawn; further ones are copies of them."""
ROWS_PER_FILE = 128
"""Of tar and Parquet files."""
ROW_GROUP = 16
MODULES = {"WebDataset": "webdataset", "MosaicML streaming": "streaming"}
WORKS = {"feeds": "views", "feeds-bytes": "bytes"}


def rows(
    names: list[str], folder: Path, peers: Path | None, size: tuple[int, int], side: int, images: int, rounds: int
) -> list[Row]:
    """Images a second, CPU milliseconds an image and bytes read for each byte used, of all ways.

    Args:
        names: which of the two rows.
        folder: for the data set in all its forms.
        peers: folder whose site-packages holds WebDataset and MosaicML streaming.
        size: (H, W) of the images.
        side: of the crop.
        images: in the data set.
        rounds: of each way.
    """
    site = peers / "site-packages" if peers else None
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, [Path.cwd(), site])))}
    ways = [way for way in WAYS if way not in MODULES or (site and (site / MODULES[way]).is_dir())]
    _write(folder, size, images)
    if "MosaicML streaming" in ways:
        _run(["write", "mds", str(folder), "0"], environment)
    table = []
    for name in names:
        figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                lines = _run([way, WORKS[name], str(folder), str(side)], environment).splitlines()
                figures[way].append(json.loads(lines[-1]))
                print(f"measured {name}, {way}: {lines[-1]}", file=sys.stderr, flush=True)
        table += _rows(name, figures, f"{size[1]}x{size[0]}", side)
    return table


def _rows(name: str, figures: dict[str, list[dict[str, float]]], size: str, side: int) -> list[Row]:
    def median(way: str, figure: str) -> float:
        return statistics.median(found[figure] for found in figures[way])

    work = f"{size} to {side}x{side}" if WORKS[name] == "views" else "as stored"
    peers = [way for way in figures if way != "ours"]
    table = []
    for peer in peers:
        # pair by pair, so that what else the machine does falls on both
        pairs = zip(figures["ours"], figures[peer], strict=True)
        ratio = statistics.median(a["rate"] / b["rate"] for a, b in pairs)
        table.append(Row(name, f"rows {work}", median("ours", "rate"), "img/s", peer, median(peer, "rate"), ratio))
    for peer in peers:
        ours, theirs = median("ours", "cpu"), median(peer, "cpu")
        table.append(Row(name, f"CPU an image, {work}", ours, "ms", peer, theirs, theirs / ours))
    for peer in peers:
        ours, theirs = median("ours", "read"), median(peer, "read")
        # what Ray Data's tasks read goes through memory maps, and cannot be counted from outside
        counted = () if peer == "plain Ray Data" else (theirs, theirs / ours)
        table.append(Row(name, f"bytes read for each byte used, {work}", ours, "", peer, *counted))
    return table


def _run(arguments: list[str], environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.feed_ways", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def _write(folder: Path, size: tuple[int, int], images: int) -> None:
    """The data set as shards, and their rows in the other forms."""
    import ray

    session.connect(cpus=WORKERS)
    drawn = min(images, DRAWN)
    throughput.write_folder(folder, size, drawn)
    _copies(folder, drawn, images)
    prepare(READERS["coco"](str(folder), "train"), folder / "shards")
    ray.shutdown()
    write_other_forms(folder)


def write_other_forms(folder: Path) -> None:
    """The rows of `folder`/shards as files, tar files and Parquet."""
    manifest = Manifest.load(folder / "shards")
    reader = Rows(manifest.shard_set)
    for kind in ("files", "tar", "parquet"):
        (folder / kind).mkdir()
    known, total = [], 0
    for first in range(0, manifest.rows, ROWS_PER_FILE):
        part = [reader.row(k) for k in range(first, min(first + ROWS_PER_FILE, manifest.rows))]
        pq.write_table(
            pa.Table.from_pylist(part),
            folder / "parquet" / f"{first:06d}.parquet",
            compression="none",
            row_group_size=ROW_GROUP,
        )
        with tarfile.open(folder / "tar" / f"{first:06d}.tar", "w") as tar:
            for k, row in enumerate(part, first):
                image, segments = row.pop("image"), row.pop("segments")
                total += len(image) + len(segments)
                row["name"] = f"{k:06d}"
                known.append(row)
                for suffix, data in (("jpg", image), ("png", segments), ("json", json.dumps(row).encode())):
                    entry = tarfile.TarInfo(f"{k:06d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                    if suffix != "json":
                        (folder / "files" / entry.name).write_bytes(data)
    (folder / "files" / "rows.json").write_text(json.dumps(known))
    (folder / "stored.json").write_text(json.dumps({"rows": manifest.rows, "bytes": total / manifest.rows}))


def _copies(folder: Path, drawn: int, images: int) -> None:
    """More images of other names and the same content."""
    file = folder / "annotations" / "panoptic_train.json"
    content = json.loads(file.read_text())
    for k in range(drawn, images):
        record, image = content["annotations"][k % drawn], content["images"][k % drawn]
        for place, suffix in ((folder / "images" / "train", "jpg"), (file.with_suffix(""), "png")):
            shutil.copyfile(place / f"{k % drawn:06d}.{suffix}", place / f"{k:06d}.{suffix}")
        content["images"].append(image | {"id": k, "file_name": f"{k:06d}.jpg"})
        content["annotations"].append(record | {"image_id": k, "file_name": f"{k:06d}.png"})
    file.write_text(json.dumps(content))
