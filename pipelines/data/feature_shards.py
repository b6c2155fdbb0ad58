"""Shards of features: what a frozen backbone makes of every row of other shards, computed once and trained from.

They are shards like any other (manifest, index, checksums), whose column `image` holds the maps (`feature_maps.py`).
Row r has the features of row r, so that a training reads the same samples in the same order. A folder belongs to a
fingerprint: of the shards (pixels, labels and so every option of their copies), of the backbone's weights and of all
else that the features follow from. What differs in any of it has a folder of its own; trainings that agree share one.

An interrupted computation is completed as an interrupted preparation is (`resume.py`), under a lease.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from panoptic.segmentation import Sample
from pipelines.cluster import disk, lease, storage
from pipelines.cluster.actor_pool import Pool, each
from pipelines.cluster.progress import progress
from pipelines.data import resume
from pipelines.data.copies import KEY as COPIES
from pipelines.data.feature_maps import FEATURES, encode_features
from pipelines.data.manifest import MANIFEST, Manifest, Shard, content_hash, is_shards
from pipelines.data.shard_file import SUFFIX, encode_shard
from pipelines.data.shard_index import Entries, load_index, write_index
from pipelines.data.shard_reader import Rows, single_threaded
from pipelines.data.shard_row import read_row
from pipelines.data.shard_writer import stored_schema

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
"""The approximate size of a shard in bytes."""

AT_ONCE = 8
"""Images that go through the backbone together."""

PATIENCE = 3.0
"""Seconds between two looks whether another process has computed what is needed."""

Extract = Callable[[Sequence[Sample]], list[dict[str, np.ndarray]]]
"""The features [C, h, w] of each of a few samples, by name."""


class Chunk(NamedTuple):
    """Neighbouring rows whose features become one shard."""

    number: int
    first: int
    stop: int

    @property
    def path(self) -> str:
        """The shard's file."""
        return f"shard-{self.number:05d}{SUFFIX}"


def folder_of(images: Manifest, cache: storage.Uri, about: Mapping[str, Any]) -> tuple[str, str]:
    """The folder of features in a cache, and their fingerprint.

    Args:
        images: the shards whose features they are.
        cache: folder that trainings share.
        about: all that the features follow from beside the images; plain values.
    """
    content = json.dumps([images.hash, dict(about)], sort_keys=True)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return storage.join(cache, FEATURES, f"{images.split}-{fingerprint[:16]}"), fingerprint


def ensure_features(
    images: Manifest,
    cache: storage.Uri,
    about: Mapping[str, Any],
    build: Callable[..., Extract],
    arguments: tuple,
    row_bytes: int,
    pool: Pool | None = None,
) -> Manifest:
    """The shards of features, computed by actors where they are not there yet.

    Of several processes that need the same ones, one computes and the others wait for it.

    Args:
        images: shards with pixels.
        cache, about: as of `folder_of`.
        build: called once in each actor with `arguments`; gives the function that computes.
        row_bytes: of a row's features.
        pool: the actors; None = one a core, or one a GPU.

    Raises:
        ValueError: the shards that lie there are damaged, or an image cannot be read.
        DiskFull: the disk of the cache is full, or too small.
    """
    out, fingerprint = folder_of(images, storage.absolute(cache), about)
    told = False
    while True:
        if is_shards(out):
            return _load(out)
        try:
            with lease.hold(resume.lease_folder(out), f"the folder {out}") as held:
                if not is_shards(out):  # else by the process that held the lease before
                    made = {**about, "fingerprint": fingerprint}
                    _compute(images, out, made, (build, arguments), row_bytes, pool or Pool(), held)
            resume.forget(out, lease=True)
            return _load(out)
        except lease.Busy as busy:
            if not told:
                logger.info("waiting: %s", busy)
            told = True
        time.sleep(PATIENCE)


def _load(out: str) -> Manifest:
    """The finished shards.

    Raises:
        ValueError: files are missing or have another size.
    """
    try:
        return Manifest.load(out)
    except ValueError as error:
        raise ValueError(
            f"{error}. Features of a frozen backbone: delete {out}, and they are computed again"
        ) from error


def _compute(
    images: Manifest,
    out: str,
    about: Mapping[str, Any],
    work: tuple[Callable[..., Extract], tuple],
    row_bytes: int,
    pool: Pool,
    held: lease.Lease,
) -> None:
    """Write the shards that are missing, then index and manifest."""
    each_shard = max(1, min(SHARD_BYTES // max(1, row_bytes), -(-images.rows // 8)))
    starts = range(0, images.rows, each_shard)
    chunks = [Chunk(k, start, min(start + each_shard, images.rows)) for k, start in enumerate(starts)]
    written = sum(count for count, _ in storage.list_stamps(out).values()) if storage.exists(out) else 0
    disk.check_room(out, images.rows * row_bytes - written, "the features of the training images")
    resume.begin(out, about)
    reports: list[dict[str, Any]] = []
    key = str(about["fingerprint"])
    with progress("computed features of", images.rows) as state:
        for report in each(_build_writer, (images, out, key, *work), chunks, pool):
            reports.append(report)
            state.advance(report["rows"], report["before"])
    reports.sort(key=lambda report: report["path"])
    entries = [Entries(report["spans"], report["names"], report["image_ids"]) for report in reports]
    index = write_index(out, entries, load_index(images.shard_set).image_id)
    source = {name: value for name, value in images.source.items() if name != COPIES}
    manifest = replace(
        images,
        hash=content_hash(images.categories, [digest for report in reports for digest in report["digests"]]),
        shards=tuple(Shard(r["path"], r["rows"], r["size"], r["sha256"]) for r in reports),
        index=index,
        source={**source, FEATURES: dict(about)},
    )
    if not held.held():
        raise lease.Busy(f"{out}: this process was halted for so long that another one took over; it writes nothing")
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json())


def _build_writer(
    images: Manifest, out: str, key: str, build: Callable[..., Extract], arguments: tuple
) -> Callable[[Chunk], dict[str, Any]]:
    """The function of an actor: it writes the shard of a chunk and reports it."""
    single_threaded()
    rows, extract = Rows(images.shard_set), build(*arguments)

    def write(chunk: Chunk) -> dict[str, Any]:
        own = hashlib.sha256(json.dumps([key, *chunk]).encode()).hexdigest()
        if finished := resume.finished_report(out, chunk.path, own):
            return {**finished, "before": True}
        try:
            return _write_chunk(images, rows, extract, out, chunk, own)
        except OSError as error:
            if disk.find_full(error) is None:
                raise
            raise ValueError(f"{out}: the disk is full; make room there, and the same command goes on") from error

    return write


def _write_chunk(images: Manifest, rows: Rows, extract: Extract, out: str, chunk: Chunk, key: str) -> dict[str, Any]:
    """Read the images of a chunk, compute their features and write them as a shard."""
    columns: list[dict[str, Any]] = []
    for first in range(chunk.first, chunk.stop, AT_ONCE):
        read = rows.rows(range(first, min(first + AT_ONCE, chunk.stop)))
        features = extract([read_row(row) for row in read])
        columns += [{**row, "image": encode_features(maps)} for row, maps in zip(read, features, strict=True)]
    encoded = encode_shard(columns, stored_schema(rows.index.image_id, images.categories))
    storage.write_bytes(storage.join(out, chunk.path), encoded.data)
    report = {
        "path": chunk.path,
        "rows": len(columns),
        "size": len(encoded.data),
        "sha256": hashlib.sha256(encoded.data).hexdigest(),
        "spans": [list(span) for span in encoded.spans],
        "names": [row["name"] for row in columns],
        "image_ids": [row["image_id"] for row in columns],
        "digests": [_digest(row) for row in columns],
        "before": False,
    }
    resume.keep_report(out, chunk.path, key, report, len(encoded.data))
    return report


def _digest(row: Mapping[str, Any]) -> str:
    """The sha256 of a row's content."""
    digest = hashlib.sha256(json.dumps([row["name"], row["labels"], row["crowd"]]).encode())
    digest.update(row["image"])
    digest.update(row["segments"])
    return digest.hexdigest()
