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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa

from panoptic.segmentation import Categories
from pipelines.cluster import disk, lease, session, storage
from pipelines.cluster.progress import progress
from pipelines.cluster.shared import check_shared
from pipelines.data import resume, statistics
from pipelines.data.classes import with_class_map
from pipelines.data.config import AUTO, OnInvalid, ReaderOptions
from pipelines.data.copies import KEY, Copies
from pipelines.data.duplicates import PHOTOGRAPHS, write_keys
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
from pipelines.data.readers import READERS
from pipelines.data.readers.source import Problem, Source
from pipelines.data.shard_file import SUFFIX
from pipelines.data.shard_index import INDEX, write_index
from pipelines.data.shard_row import read_row
from pipelines.data.shard_writer import Report, write_shard
from pipelines.data.statistics import Statistics

__all__ = ["Manifest", "Shard", "ensure_shards", "is_shards", "prepare", "read_row"]

logger = logging.getLogger(__name__)

FEWEST_ROWS = 16
"""The fewest rows of a shard, where the split has as many."""

FORMER_SUFFIX = ".parquet"
"""Ending of the shards of schema version 1."""

REJECTED = "rejected.jsonl"
"""File beside the manifest that lists the images which were left out."""


COPIES = "photographs are copies of another one of this split"
"""Kind of warning of a manifest."""

PATIENCE = 3.0
"""Seconds between two looks whether another process has prepared what is needed."""

FULL, AWAY = "full", "away"
"""Keys of a report that says only that the disk is full, or the store away."""


def prepare(
    source: Source,
    out: storage.Uri,
    *,
    rows_per_shard: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    on_invalid: OnInvalid = "stop",
    replace_others: bool = False,
) -> Manifest:
    """Check every image of a source and write its shards and manifest to the folder `out`.

    Shards of the same source and options that lie there already are returned as they are. Of an interrupted
    preparation with the same options, the shards that are finished stay, and the result is the same to the last byte as
    without the interruption. One process at a time prepares in a folder, under a lease.

    Args:
        source: what a reader of `READERS` found.
        out: a folder of its own for this split, local or on S3, that every worker can write to.
        rows_per_shard: None = about 64 MiB, 16 to 256 rows, and eight shards where the rows suffice.
        shuffle: whether to shuffle the rows once; None = for splits whose name starts with "train".
        seed: of the shuffle.
        on_invalid: whether an image that fails validation stops the preparation, after all were checked, and leaves
            nothing written; or is left out and listed in `rejected.jsonl` beside the manifest.
        replace_others: write anew what was prepared there from the same split with other options, instead of refusing.

    Raises:
        ValueError: images failed validation (a table of file names, reasons and remedies), nothing valid is left, or
            `out` holds something else, or the same split with other options.
        DiskFull: the disk of `out` is full, or too small for the images and maps.
        Busy: another process prepares shards in `out`.
    """
    out = storage.absolute(out)
    shuffle = source.split.startswith("train") if shuffle is None else shuffle
    options = {"rows_per_shard": rows_per_shard, "seed": seed if shuffle else None, "on_invalid": on_invalid}
    rows_per_shard = rows_per_shard or _rows_per_shard(source)
    inputs = [SCHEMA_VERSION, source.fingerprint, rows_per_shard, seed if shuffle else None, on_invalid]
    inputs += [source.categories.to_coco(), source.orientation]
    origin = {"reader": source.reader, "root": source.root, "split": source.split, **source.about}
    origin["fingerprint"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    about = {**origin, "preparation": options}
    if finished := _finished(out, about, replace_others):
        return finished
    _check_room(source, out)
    remedy = "give another folder with --out"
    with lease.hold(resume.lease_folder(out), f"the folder {out}", otherwise=remedy) as held:
        manifest = _finished(out, about, replace_others)  # by the process that held the lease before
        refused = False
        if manifest is None:
            manifest = _prepare(source, out, about, rows_per_shard, replace_others, held)
            refused = _is_refused(manifest, on_invalid)
    resume.forget(out, lease=True)
    if refused:
        raise ValueError(_refusal(source, manifest.skipped))
    return replace(manifest, uri=out)


def _is_refused(manifest: Manifest, on_invalid: OnInvalid) -> bool:
    """True where images failed validation and may not be left out, or none is left that has a segment."""
    return (on_invalid == "stop" and bool(manifest.skipped)) or manifest.empty == manifest.rows


def _prepare(
    source: Source, out: str, about: dict, rows_per_shard: int, replace_others: bool, held: lease.Lease
) -> Manifest:
    """The shards and, unless images were refused, the manifest, written under the lease."""
    _begin(out, about, replace_others)
    try:
        reports = _write_all(_ordered(source, about["preparation"]["seed"]), out, rows_per_shard, source, about)
    except disk.DiskFull as error:
        raise disk.full(out, source.bytes, f"the shards of split {source.split}") from error
    entries = [report.entries for report in reports if report.rows]
    index = write_index(out, entries, source.rows.schema.field("image_id").type) if entries else ""
    write_keys(out, (key for report in reports for key in report.photographs))
    manifest = _manifest(source, about, reports, index)
    if _is_refused(manifest, about["preparation"]["on_invalid"]):
        for name in (INDEX, PHOTOGRAPHS, *(shard.path for shard in manifest.shards)):
            storage.delete(storage.join(out, name))
        resume.forget(out)
        return manifest
    if not held.held():
        raise lease.Busy(f"{out}: this process was halted for so long that another one took over; it writes nothing")
    _drop_leftovers(out, manifest)
    if manifest.skipped:
        storage.write_bytes(storage.join(out, REJECTED), rejected_lines(manifest.skipped))
    storage.write_bytes(storage.join(out, MANIFEST), manifest.to_json())
    return manifest


def check(source: Source, on_invalid: OnInvalid = "stop") -> Manifest:
    """Check every image of a source as `prepare` does, and write nothing.

    Returns:
        the manifest that `prepare` would write, without shards and hash.

    Raises:
        ValueError: as `prepare`.
    """
    reports = _write_all(source.rows, None, _rows_per_shard(source), source, {})
    origin = {"reader": source.reader, "root": source.root, "split": source.split, **source.about}
    manifest = replace(_manifest(source, origin, reports, ""), hash="", shards=())
    if _is_refused(manifest, on_invalid):
        raise ValueError(_refusal(source, manifest.skipped))
    return manifest


def rejected_lines(problems: Sequence[Problem]) -> bytes:
    """The content of `rejected.jsonl`: a line for each image left out, a JSON object of its name, reason and remedy."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems).encode()


def ensure_shards(
    root: storage.Uri | Sequence[str],
    split: str | Sequence[str],
    cache: storage.Uri,
    reader: str | Sequence[str] = AUTO,
    seed: int = 0,
    on_invalid: OnInvalid = "stop",
    class_map: str = "",
    options: ReaderOptions | None = None,
    copies: Copies | None = None,
) -> Manifest:
    """The shards of a split, prepared on the fly where `root` is a dataset that is not shards yet.

    Args:
        root: a folder of shards of this split, a folder with one such folder per split, or a dataset; several datasets
            (each alone or as NAME=FOLDER) are joined, and may be shards themselves.
        split: which split, or one for each data set.
        cache: where shards prepared on the fly go; the same dataset finds them again.
        reader: the format of a dataset, or of each; "auto" = found by what the folder holds.
        seed: of the shuffle.
        class_map: file of a class map; "" = the classes as they are.
        options: of the reader.
        copies: augmented copies that are written, too, where shards are prepared on the fly.

    Raises:
        ValueError: `root` holds neither, or shards of another split, or an image fails validation, or shards of an
            earlier version whose data set is not there.
    """
    roots = Roots.of(root, reader, class_map, options)
    if len(roots.roots) > 1:
        return _prepare_in_cache(roots, split, cache, seed, on_invalid, copies)
    (root,) = roots.places
    if not isinstance(split, str):
        if len(split) != 1:
            raise ValueError(f"{len(split)} splits ({', '.join(split)}) for one data set; give one for each root")
        (split,) = split
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
    split: str | Sequence[str],
    cache: storage.Uri,
    seed: int,
    on_invalid: OnInvalid,
    copies: Copies | None,
) -> Manifest:
    """Prepare in a cache that several trainings share: whoever comes second waits, and finds the shards finished."""
    splits = [split] if isinstance(split, str) else list(split)
    source, told = roots.open(split), False
    name = folder = splits[0] if len(set(splits)) == 1 else "+".join(splits)
    if copies is not None:
        source = with_copies(source, copies)
        folder = f"{name}-copies-{source.fingerprint[:8]}"
    out = storage.join(cache, roots.folder, folder)
    while True:
        try:
            manifest = prepare(source, out, seed=seed, on_invalid=on_invalid, replace_others=True)
            break
        except lease.Busy as busy:
            if not told:
                logger.info("waiting: %s", busy)
            told = True
        time.sleep(PATIENCE)
    for note in manifest.notes:
        logger.warning("%s of %s: %s", name, ", ".join(roots.places), note)
    return manifest


def _prepare_again(folder: str, split: str, cache: storage.Uri, seed: int, on_invalid: OnInvalid) -> Manifest:
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


def _finished(out: str, about: dict, replace_others: bool) -> Manifest | None:
    """The manifest at `out` if it is complete, of this source and made with these options; None where it must be made.

    Raises:
        ValueError: other files lie there, or the shards of something else.
    """
    names = set(storage.list_files(out)) if storage.exists(out) else set()
    ours = (MANIFEST, INDEX, PHOTOGRAPHS, REJECTED, "shard-", resume.STATE[1:])
    foreign = sorted(name for name in names if not name.lstrip(".").startswith(ours))
    if foreign:
        raise ValueError(f"{out}: holds other files ({', '.join(foreign[:3])}); give the shards a folder of their own")
    if MANIFEST not in names:
        return None
    old = former_manifest(out)
    if old:
        _check_same(out, old["source"], about, replace_others)
        logger.warning(
            "%s: shards of schema version %d, while this software reads %d. Preparing them again from %s",
            *(out, old["schema_version"], SCHEMA_VERSION, about["root"]),
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
        return None
    whole = names.issuperset((INDEX, *(shard.path for shard in manifest.shards)))
    if whole and manifest.source.get("fingerprint") == about["fingerprint"]:
        return manifest
    _check_same(out, manifest.source, about, replace_others)
    logger.warning("%s: files or options changed since these shards were written; writing them again", out)
    return None


def _check_same(out: str, there: Mapping[str, Any], about: dict, replace_others: bool) -> None:
    """Refuse to mix two data sets in one folder, or two sets of options.

    Raises:
        ValueError: names what lies there, or the options that differ.
    """
    if any(there.get(key) != about[key] for key in ("reader", "root", "split")):
        owner = f"split {there.get('split')} of {there.get('root')}"
        raise ValueError(f"{out}: holds the shards of {owner}; give another folder, or delete this one first")
    before, now = (_spelt(one, about["preparation"]) for one in (there, about))
    differing = [
        f"{key} was {_shown(before.get(key))} and is now {_shown(now.get(key))}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    if differing and not replace_others:
        raise ValueError(
            f"{out}: was prepared with other options ({'; '.join(differing)}); give the same ones, or another folder, "
            "or delete this one first"
        )


def _spelt(about: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a preparation: its own, the reader's, the class map and the copies."""
    options = dict(about.get("preparation", preparation))
    given = json.loads(json.dumps(about.get("options", {})))  # a manifest has lists for tuples
    options |= {f"data.{key}": value for key, value in given.items()}
    options["class map (sha256)"] = about.get("class_map", {}).get("sha256")
    copies = about.get(KEY)
    options["augmentation of copies"] = None if copies is None else json.dumps(copies, sort_keys=True)
    return options


def _shown(option: object) -> str:
    return "its default" if option is None else str(option)


def _begin(out: str, about: dict, replace_others: bool) -> None:
    """Make way for a preparation, or go on with one that was interrupted.

    Raises:
        ValueError: one with other options, or of another data set, was interrupted here.
    """
    there = resume.begin(out, about)
    if there != about:
        _check_same(out, there, about, replace_others)
        if there.get("preparation") != about["preparation"]:
            resume.forget(out)
        resume.note(out, about)
    storage.delete(storage.join(out, MANIFEST))
    storage.delete(storage.join(out, REJECTED))


def _ordered(source: Source, seed: int | None) -> pa.Table:
    """The rows in the order of the shards; None is that of the annotations."""
    if source.problems:
        logger.warning("%d images cannot be used; reading the others before listing all", len(source.problems))
    rows = source.rows
    return rows if seed is None else rows.take(np.random.default_rng(seed).permutation(rows.num_rows))


def _check_room(source: Source, out: str) -> None:
    """Refuse to begin what will fill the disk. Shards hold the bytes of the images, and smaller maps.

    Raises:
        DiskFull: names what is needed and what is free.
    """
    written = sum(count for count, _ in storage.list_stamps(out).values()) if storage.exists(out) else 0
    disk.check_room(out, source.bytes - written, f"the shards of split {source.split}")


def _write_or_tell(rows: pa.Table, out: str | None, categories: Categories, **how: Any) -> pa.Table:
    """`write_shard`; a full disk or an absent store comes back as a row: an error would make Ray Data print pages."""
    try:
        return write_shard(rows, out, categories, **how)
    except storage.Unavailable as error:
        return pa.table({"report": [json.dumps({AWAY: str(error)})]})
    except OSError as error:
        if disk.find_full(error) is None:
            raise
        return pa.table({"report": [json.dumps({FULL: str(error)})]})


def _drop_leftovers(out: str, manifest: Manifest) -> None:
    """Remove what an earlier preparation with more shards, or an interrupted one, left behind."""
    for name in set(storage.list_files(out)) - {INDEX, PHOTOGRAPHS, *(shard.path for shard in manifest.shards)}:
        if not name.startswith(f"{resume.STATE}/"):
            storage.delete(storage.join(out, name))


def _refusal(source: Source, problems: Sequence[Problem]) -> str:
    total = source.rows.num_rows + len(source.problems)
    if total and not problems:
        return (
            f"split {source.split} of {source.root}: none of its {total} images has a segment; is this a test split, "
            "whose labels are not public? jobs/predict.py reads photographs without labels"
        )
    if not total:
        return f"split {source.split} of {source.root}: the annotations hold no annotated image; check the split"
    advice = f"Correct these files, or leave the images out with --data.on-invalid skip ({REJECTED} then lists them)."
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
    repairs, warnings, photographs = Counter(source.repairs), Counter(), Counter()
    for report in reports:
        segments += report.segments
        repairs.update(report.repairs)
        warnings.update(report.warnings)
        photographs.update(report.photographs)
    copies = sum(count - 1 for count in photographs.values())
    if copies and source.copies is None:  # padding makes the last bytes of augmented copies alike
        warnings[COPIES] = copies
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
        warnings=dict(warnings),
        statistics=statistics.added((Statistics(**report.statistics) for report in reports), len(source.categories)),
    )


def _write_all(rows: pa.Table, out: str | None, rows_per_shard: int, source: Source, about: dict) -> list[Report]:
    """Ray Data over the light rows, one block a shard; the reports in the order of the shards.

    Args:
        rows: in the order of the shards.
        out: the folder; None to check and write nothing.
        about: with `fingerprint`, of all that the content of the shards follows from.
    """
    if not rows.num_rows:
        return []
    session.connect()
    import ray.data

    roots = [one["root"] for one in source.about.get("sets", ())] or [source.root]
    check_shared(
        {f"--data.root {number or ''}".strip(): root for number, root in enumerate(roots)}, {"--out": out or ""}
    )
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
            "inputs": about.get("fingerprint", ""),
        },
    )
    reports: list[Report] = []
    rejected = len(source.problems)
    with progress("checked" if out is None else "prepared", rows.num_rows) as state:
        for row in dataset.iter_rows():
            content = json.loads(row["report"])
            if FULL in content:
                raise disk.DiskFull(content[FULL])
            if AWAY in content:
                raise storage.Unavailable(content[AWAY])
            report = Report(**content)
            reports.append(report)
            rejected += len(report.problems)
            state.advance(report.images, report.before, rejected=rejected)
    return sorted(reports, key=lambda report: report.path)
