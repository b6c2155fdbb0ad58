"""Shards: a dataset checked once and written as Arrow files, with a manifest that says what is in it.

A shard row is one image: its bytes as they came, and its id map renumbered 1..N as a single-channel PNG
(segment k is entry k of `labels` and `crowd`). `manifest.json` is written last, so a folder without one is
an unfinished preparation. Ray Data reads, checks and writes; the content does not depend on its workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from panoptic.segmentation import Categories
from pipelines.cluster import disk, session, storage
from pipelines.data.classes import with_class_map
from pipelines.data.copies import Copies
from pipelines.data.join import Roots, with_copies
from pipelines.data.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    content_hash,
    former_manifest,
    is_shards,
    problem_table,
)
from pipelines.data.readers import AUTO, READERS, ReaderOptions
from pipelines.data.readers.source import Decode, Orientation, Problem, Source
from pipelines.data.shard_file import SUFFIX
from pipelines.data.shard_index import INDEX, write_index
from pipelines.data.shard_row import read_row
from pipelines.data.shard_writer import Report, write_shard

__all__ = ["Manifest", "Shard", "ensure_shards", "is_shards", "prepare", "read_row"]

logger = logging.getLogger(__name__)

FEWEST_ROWS = 16
"""Rows of a shard at least, where there are so many."""

FORMER_SUFFIX = ".parquet"
"""Ending of the shards of schema version 1."""

FULL, AWAY = "full", "away"
"""Keys of a report that says only that the disk is full, or the store away."""


def prepare(
    source: Source,
    out: storage.Uri,
    *,
    rows_per_shard: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    on_invalid: Literal["stop", "skip"] = "stop",
) -> Manifest:
    """Check every image of a source and write its shards and manifest to the folder `out`.

    Shards of the same source and options that lie there already are returned as they are. What an
    interrupted preparation left is overwritten.

    Args:
        source: what a reader of `READERS` found.
        out: a folder of its own for this split, local or on S3, that every worker can write to.
        rows_per_shard: None = about 64 MiB, 16 to 256 rows, and eight shards where the rows suffice.
        shuffle: whether to shuffle the rows once; None = for splits whose name starts with "train".
        seed: of the shuffle.
        on_invalid: whether an image that fails validation stops the preparation or is left out.

    Raises:
        ValueError: images failed validation (a table of file names and reasons), nothing valid is left, or
            `out` holds something else.
        DiskFull: the disk of `out` is full, or too small for the images and maps.
    """
    out = storage.absolute(out)
    shuffle = source.split.startswith("train") if shuffle is None else shuffle
    rows_per_shard = rows_per_shard or _rows_per_shard(source)
    options = [SCHEMA_VERSION, source.fingerprint, rows_per_shard, seed if shuffle else None, on_invalid]
    origin = {"reader": source.reader, "root": source.root, "split": source.split, **source.about}
    origin["fingerprint"] = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    finished = _finished(out, origin)
    if finished:
        return finished
    if source.problems:
        logger.warning("%d images cannot be used; reading the others before listing all", len(source.problems))
    rows = source.rows
    if shuffle:
        rows = rows.take(np.random.default_rng(seed).permutation(rows.num_rows))
    _check_room(source, out)
    try:
        reports = _write_all(rows, out, rows_per_shard, source)
    except disk.DiskFull as error:
        raise disk.full(out, source.bytes, f"the shards of split {source.split}") from error
    entries = [report.entries for report in reports if report.rows]
    index = write_index(out, entries, rows.schema.field("image_id").type) if entries else ""
    manifest = _manifest(source, origin, reports, index)
    if (manifest.skipped and on_invalid == "stop") or not manifest.rows:
        for name in (INDEX, *(shard.path for shard in manifest.shards)):
            storage.delete(storage.join(out, name))
        raise ValueError(_refusal(source, manifest.skipped))
    _drop_leftovers(out, manifest)
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json())
    return replace(manifest, uri=out)


def ensure_shards(
    root: storage.Uri | Sequence[str],
    split: str,
    cache: storage.Uri,
    reader: str | Sequence[str] = AUTO,
    seed: int = 0,
    on_invalid: Literal["stop", "skip"] = "stop",
    class_map: str = "",
    options: ReaderOptions | None = None,
    copies: Copies | None = None,
) -> Manifest:
    """The shards of a split, prepared on the fly where `root` is a dataset that is not shards yet.

    Args:
        root: a folder of shards of this split, a folder with one such folder per split, or a dataset; several datasets
            (each alone or as NAME=FOLDER) are joined.
        split: which split.
        cache: where shards prepared on the fly go; the same dataset finds them again.
        reader: the format of a dataset, or of each; "auto" = found by what the folder holds.
        seed: of the shuffle.
        class_map: file of a class map; "" = the classes as they are.
        options: of the reader.
        copies: augmented copies that are written, too, where shards are prepared on the fly.

    Raises:
        ValueError: `root` holds neither, or shards of another split, or an image fails validation, or shards are to be
            joined or mapped, or shards of an earlier version whose data set is not there.
    """
    roots = Roots.of(root, reader, class_map, options)
    if len(roots.roots) > 1:
        _refuse_shards(roots, split)
        return _prepare_in_cache(roots, split, cache, seed, on_invalid, copies)
    (root,) = roots.places
    if class_map and any(is_shards(folder) for folder in (storage.join(root, split), root)):
        return with_class_map(ensure_shards(root, split, cache, reader, seed, on_invalid), class_map, cache)
    for folder in (storage.join(root, split), root):
        if former_manifest(folder):
            return _prepare_again(folder, split, cache, seed, on_invalid)
    if is_shards(storage.join(root, split)):
        return Manifest.load(storage.join(root, split))
    if is_shards(root):
        manifest = Manifest.load(root)
        if manifest.split != split:
            raise ValueError(f"{root}: these are shards of split {manifest.split!r}, not of {split!r}")
        return manifest
    if any(storage.exists(storage.join(root, f"shard-00000{suffix}")) for suffix in (SUFFIX, FORMER_SUFFIX)):
        raise ValueError(f"{root}: shards without a {MANIFEST}; their preparation did not finish, run it again")
    return _prepare_in_cache(roots, split, cache, seed, on_invalid, copies)


def _prepare_in_cache(
    roots: Roots,
    split: str,
    cache: storage.Uri,
    seed: int,
    on_invalid: Literal["stop", "skip"],
    copies: Copies | None,
) -> Manifest:
    source, folder = roots.open(split), split
    if copies is not None:
        source = with_copies(source, copies)
        folder = f"{split}-copies-{source.fingerprint[:8]}"
    manifest = prepare(source, storage.join(cache, roots.folder, folder), seed=seed, on_invalid=on_invalid)
    for note in manifest.notes:
        logger.warning("%s of %s: %s", split, ", ".join(roots.places), note)
    return manifest


def _refuse_shards(roots: Roots, split: str) -> None:
    """Refuse to join shards: their images would be written once more."""
    for place in roots.places:
        if is_shards(storage.join(place, split)) or is_shards(place):
            raise ValueError(
                f"{place}: holds prepared shards; data sets are joined before: give the folder that these were "
                "prepared from"
            )


def _prepare_again(
    folder: str, split: str, cache: storage.Uri, seed: int, on_invalid: Literal["stop", "skip"]
) -> Manifest:
    """Shards of the present version in place of those of an earlier one, which stay as they are."""
    old = former_manifest(folder)
    assert old is not None
    version, source = old["schema_version"], old["source"]
    said = f"{folder}: shards of schema version {version}, while this software reads {SCHEMA_VERSION}"
    if source.get("split") != split:
        raise ValueError(f"{folder}: these are shards of split {source.get('split')!r}, not of {split!r}")
    root, reader = source.get("root") or "", source.get("reader")
    if reader not in READERS or {"class_map", "options"} & source.keys() or not root or not storage.exists(root):
        where = f"{root} that they were prepared from is not there" if root else "they were prepared from is unknown"
        raise ValueError(f"{said}, and the data set {where}; prepare the shards again with jobs/prepare.py")
    logger.warning("%s. Preparing them again from %s", said, root)
    manifest = ensure_shards(root, split, cache, reader, seed, on_invalid)
    if manifest.hash != old["hash"]:
        logger.warning(
            "%s: other content than the shards of schema version %d had (hash %s, then %s): a run that began on those "
            "cannot go on with these",
            *(manifest.uri, version, manifest.hash[:16], old["hash"][:16]),
        )
    return manifest


def _rows_per_shard(source: Source) -> int:
    """Shards of about 64 MiB, but enough of them to keep a few workers busy."""
    count = max(1, source.rows.num_rows)
    by_size = (64 << 20) * count // max(1, source.bytes)
    if source.copies is not None:  # a row of the source is several of a shard, and large
        return min(max(by_size, 1), max(-(-count // 8), 1), 256)
    return min(max(by_size, FEWEST_ROWS), max(-(-count // 8), FEWEST_ROWS), 256)


def _finished(out: str, origin: dict) -> Manifest | None:
    """The manifest at `out` if it is of this source and complete. Otherwise makes way for a new preparation."""
    names = set(storage.list_files(out)) if storage.exists(out) else set()
    foreign = sorted(name for name in names if not name.lstrip(".").startswith((MANIFEST, INDEX, "shard-")))
    if foreign:
        raise ValueError(f"{out}: holds other files ({', '.join(foreign[:3])}); give the shards a folder of their own")
    if MANIFEST not in names:
        return None
    old = former_manifest(out)
    if old:
        _require_same(out, old["source"], origin)
        logger.warning(
            "%s: shards of schema version %d, while this software reads %d. Preparing them again from %s",
            *(out, old["schema_version"], SCHEMA_VERSION, origin["root"]),
        )
        storage.delete(storage.join(out, MANIFEST))
        for name in names:
            if name.endswith(FORMER_SUFFIX):  # not later: the disk may not hold both
                storage.delete(storage.join(out, name))
        return None
    try:
        manifest = Manifest.load(out, files=False)
    except ValueError as error:
        logger.warning("%s", error)
    else:
        whole = names.issuperset((INDEX, *(shard.path for shard in manifest.shards)))
        if whole and manifest.source.get("fingerprint") == origin["fingerprint"]:
            return manifest
        _require_same(out, manifest.source, origin)
        logger.warning("%s: files or options changed since these shards were written; writing them again", out)
    storage.delete(storage.join(out, MANIFEST))
    return None


def _require_same(out: str, there: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Refuse to replace the shards of another data set."""
    if any(there.get(key) != origin[key] for key in ("reader", "root", "split")):
        what = f"split {there.get('split')} of {there.get('root')}"
        raise ValueError(f"{out}: holds the shards of {what}; give another folder, or delete this one first")


def _check_room(source: Source, out: str) -> None:
    """Refuse to begin what will fill the disk. Shards hold the bytes of the images, and smaller maps.

    Raises:
        DiskFull: names what is needed and what is free.
    """
    written = sum(count for count, _ in storage.list_stamps(out).values()) if storage.exists(out) else 0
    disk.check_room(out, source.bytes - written, f"the shards of split {source.split}")


def _write_or_tell(
    rows: pa.Table,
    out: str,
    categories: Categories,
    decode: Decode,
    orientation: Orientation,
    copies: Copies | None,
) -> pa.Table:
    """`write_shard`; a full disk or an absent store comes back as a row: an error would make Ray Data print pages."""
    try:
        return write_shard(rows, out, categories, decode, orientation, copies)
    except storage.Unavailable as error:
        return pa.table({"report": [json.dumps({AWAY: str(error)})]})
    except OSError as error:
        if disk.find_full(error) is None:
            raise
        return pa.table({"report": [json.dumps({FULL: str(error)})]})


def _drop_leftovers(out: str, manifest: Manifest) -> None:
    """Remove what an earlier preparation with more shards, or an interrupted one, left behind."""
    for name in set(storage.list_files(out)) - {INDEX, *(shard.path for shard in manifest.shards)}:
        storage.delete(storage.join(out, name))


def _refusal(source: Source, problems: Sequence[Problem]) -> str:
    total = source.rows.num_rows + len(source.problems)
    if not total:
        return f"split {source.split} of {source.root}: the annotations hold no annotated image; check the split"
    advice = "Correct these files, or leave the images out with --on-invalid skip (the manifest then lists them)."
    if len(problems) == total:
        advice = "None is left. Correct the annotations, or name their folders with --data.images and --data.pngs."
    return (
        f"{len(problems)} of {total} images failed validation (split {source.split} of {source.root}):\n"
        f"{problem_table(problems)}\n{advice}"
    )


def _manifest(source: Source, origin: dict, reports: Sequence[Report], index: str) -> Manifest:
    """The reports of all shards, in order, added up; `index` is the hash of the index that lists their rows."""
    sizes = [size for report in reports for size in report.sizes]
    segments = np.zeros(len(source.categories), int)  # the sum over no report, too, has an entry for each class
    repairs = Counter(source.repairs)
    for report in reports:
        segments += report.segments
        repairs.update(report.repairs)
    problems = [Problem(*problem) for report in reports for problem in report.problems]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        split=source.split,
        rows=sum(report.rows for report in reports),
        hash=content_hash(source.categories, [digest for report in reports for digest in report.digests]),
        categories=source.categories,
        shards=tuple(Shard(r.path, r.rows, r.size, r.sha256) for r in reports if r.rows),
        index=index,
        maximum_height=max((height for height, _ in sizes), default=0),
        maximum_width=max((width for _, width in sizes), default=0),
        segments=tuple(segments.tolist()),
        crowds=sum(report.crowds for report in reports),
        empty=sum(report.empty for report in reports),
        unannotated=len(source.unannotated),
        skipped=(*source.problems, *sorted(problems, key=lambda problem: problem.name)),
        area_mismatches=sum(report.area_mismatches for report in reports),
        source=origin,
        repairs=dict(repairs),
    )


def _write_all(rows: pa.Table, out: str, rows_per_shard: int, source: Source) -> list[Report]:
    """Ray Data over the light rows, one block a shard; the reports in the order of the shards."""
    if not rows.num_rows:
        return []
    session.connect()
    import ray.data

    if source.copies is not None:
        rows = rows.append_column("number", pa.array(np.arange(rows.num_rows)))
    rows = rows.append_column("shard", pa.array(np.arange(rows.num_rows) // rows_per_shard))
    blocks = [rows.slice(start, rows_per_shard) for start in range(0, rows.num_rows, rows_per_shard)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _write_or_tell,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out functions with fn_kwargs
        batch_size=None,  # a whole block
        batch_format="pyarrow",
        fn_kwargs={
            "out": out,
            "categories": source.categories,
            "decode": source.decode,
            "orientation": source.orientation,
            "copies": source.copies,
        },
    )
    reports = []
    for row in _narrated(dataset.iter_rows(), len(blocks)):
        content = json.loads(row["report"])
        if FULL in content:
            raise disk.DiskFull(content[FULL])
        if AWAY in content:
            raise storage.Unavailable(content[AWAY])
        reports.append(Report(**content))
    return sorted(reports, key=lambda report: report.path)


def _narrated(rows: Iterable[dict], total: int) -> Iterator[dict]:
    """Say every ten seconds how far a long preparation has come."""
    last = time.monotonic()
    for count, row in enumerate(rows, 1):
        if time.monotonic() - last > 10:
            last = time.monotonic()
            logger.info("prepared %d of %d shards", count, total)
        yield row
