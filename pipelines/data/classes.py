"""One list of classes for both splits of a training.

Classes are the same where name and kind (thing or stuff) agree. Colours, ids and the order of a split's list do not
matter: shards whose classes have other positions are copied with the positions of the split that counts. So are shards
that a class map is applied to after they were prepared.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from panoptic.png import decode_segments, encode_segments
from panoptic.segmentation import Categories, Segmentation
from pipelines.cluster import storage
from pipelines.data.absent import KEY as ABSENT
from pipelines.data.absent import absent_of, mapped_absent
from pipelines.data.class_map import ClassesOf, from_record, load, resolve
from pipelines.data.class_mapping import ClassMapping
from pipelines.data.manifest import MANIFEST, Manifest, Shard, content_hash, former_manifest, is_shards
from pipelines.data.shard_file import encode_shard
from pipelines.data.shard_index import Entries, load_index, write_index
from pipelines.data.shard_reader import Rows
from pipelines.data.shard_row import read_row
from pipelines.data.shard_writer import row_digest, stored_schema
from pipelines.data.statistics import Segments, of_images

logger = logging.getLogger(__name__)

SplitOf = Literal["both", "train", "val"]


def with_equal_classes(
    train: Manifest, val: Manifest, classes_of: SplitOf, cache: storage.Uri
) -> tuple[Manifest, Manifest]:
    """The two splits with one list of classes.

    Args:
        train, val: their shards.
        classes_of: the split whose classes count; with "both", they must be the same, or one split's contain the
            other's, and then they count.
        cache: where copies of shards go whose classes have other positions.

    Raises:
        ValueError: each split has classes of its own with "both", a class is a thing in one split and stuff in the
            other, or images use a class that the split that counts does not have; names the classes.
    """
    a, b = (dict(zip(m.categories.names, m.categories.is_thing, strict=True)) for m in (train, val))
    kinds = [name for name in a if name in b and a[name] != b[name]]
    if kinds:
        raise ValueError(
            f"the splits {train.split} and {val.split} have different categories: {_some(kinds)} are things in one and "
            "stuff in the other; correct isthing in one of their annotation files"
        )
    only = [(m.split, [name for name in own if name not in other]) for m, own, other in ((train, a, b), (val, b, a))]
    ours, theirs = (names for _, names in only)
    if classes_of == "both" and bool(ours) != bool(theirs):  # one list contains the other
        classes_of = "train" if ours else "val"
        larger, smaller = (train, val) if ours else (val, train)
        logger.warning(
            "split %s has no %s, which split %s lists; the classes of the latter count for both, unless "
            "--data.classes-of says otherwise",
            *(smaller.split, _some(ours or theirs), larger.split),
        )
    if classes_of == "both" and ours:
        parts = "; ".join(f"only {split} has {_some(names)}" for split, names in only if names)
        raise ValueError(
            f"the splits {train.split} and {val.split} have different categories: {parts}. "
            "Correct the annotation files, or say whose classes count with --data.classes-of train (or val)"
        )
    if classes_of == "val":
        return _with_classes(train, val, cache), val
    return train, _with_classes(val, train, cache)


def _with_classes(manifest: Manifest, counts: Manifest, cache: storage.Uri) -> Manifest:
    """The shards of `manifest` with the classes of `counts`."""
    own, target = manifest.categories, counts.categories
    if (own.names, own.is_thing) == (target.names, target.is_thing):
        return manifest
    positions = {name: position for position, name in enumerate(target.names)}
    used = {n: s for n, s in zip(own.names, manifest.segments, strict=True) if s and n not in positions}
    if used:
        listed = _some([f"{name} ({count} segments)" for name, count in used.items()])
        raise ValueError(
            f"{manifest.uri}: images of split {manifest.split} use classes that split {counts.split} does not have: "
            f"{listed}; add them there, take them out here, or let the other split's classes count (--data.classes-of)"
        )
    mapping = [positions.get(name, -1) for name in own.names]

    def renumber(row: dict[str, Any]) -> None:
        row["labels"] = [mapping[label] for label in row["labels"]]

    key = hashlib.sha256(json.dumps([manifest.hash, target.to_coco()]).encode()).hexdigest()
    return _copy(manifest, target, renumber, storage.join(cache, f"{manifest.split}-classes-{key[:16]}"))


def with_class_map(manifest: Manifest, class_map: str, cache: storage.Uri) -> Manifest:
    """A copy of prepared shards in the classes of a class map.

    Args:
        class_map: its file.
        cache: where the copy goes; the same shards and map find it again.

    Raises:
        ValueError: the map does not fit the classes of the shards.
    """
    resolved = resolve(load(class_map), [_classes(manifest)])
    for note in resolved.notes:
        logger.warning("note: %s", note)
    return _mapped(manifest, resolved.mappings[0], {"file": class_map, **resolved.record}, cache)


def with_recorded_map(manifest: Manifest, record: Mapping[str, Any], cache: storage.Uri) -> Manifest:
    """A copy of prepared shards in the classes that a model was trained on under a class map.

    Args:
        record: what the model keeps of the map (`class_map.Resolved.record`).
        cache: as for `with_class_map`.

    Raises:
        ValueError: the record does not tell what becomes of the shards' classes.
    """
    mapping = from_record(record, _classes(manifest))
    return _mapped(manifest, mapping, dict(record), cache)


def _classes(manifest: Manifest) -> ClassesOf:
    """The classes of shards under the name of their data set."""
    source = manifest.source
    name = str(source.get("root", "")).rsplit("/", 1)[-1]
    return ClassesOf(name, manifest.categories, str(source.get("reader", "")))


def _mapped(manifest: Manifest, mapping: ClassMapping, record: dict[str, Any], cache: storage.Uri) -> Manifest:
    source = manifest.source

    def change(row: dict[str, Any]) -> None:
        segments = decode_segments(row["segments"], (row["height"], row["width"]))
        truth = Segmentation(segments, np.array(row["labels"], np.int64), np.array(row["crowd"], bool))
        truth = mapping.segmentation(truth)
        row["segments"] = encode_segments(truth.segments)
        row["labels"], row["crowd"] = truth.labels.tolist(), truth.is_crowd().tolist()

    key = hashlib.sha256(json.dumps([manifest.hash, record["sha256"]]).encode()).hexdigest()
    out = storage.join(cache, f"{manifest.split}-classes-{key[:16]}")
    absent = mapped_absent(manifest.categories, mapping, absent_of(source))
    about = {"class_map": record, ABSENT: absent}
    return _copy(replace(manifest, source={**source, **about}), mapping.categories, change, out)


def _copy(
    manifest: Manifest, target: Categories, change: Callable[[dict[str, Any]], None], out: storage.Uri
) -> Manifest:
    """A copy of shards in `out`, where `change` gives each row the classes of `target`."""
    out = storage.absolute(out)
    if is_shards(out) and not former_manifest(out):
        return Manifest.load(out)
    reader, starts = Rows(manifest.shard_set), load_index(manifest.shard_set).starts.tolist()
    schema = stored_schema(load_index(manifest.shard_set).image_id, target)
    shards, digests, entries, counted = [], [], [], []
    segments, crowds, empty = np.zeros(len(target), int), 0, 0
    for shard, first, end in zip(manifest.shards, starts[:-1], starts[1:], strict=True):
        rows = reader.rows(range(first, end))
        with ThreadPoolExecutor() as pool:
            list(pool.map(change, rows))
        data, spans = encode_shard(rows, schema)
        storage.write_bytes(storage.join(out, shard.path), data)
        shards.append(Shard(shard.path, shard.rows, len(data), hashlib.sha256(data).hexdigest()))
        entries.append(Entries(spans, [row["name"] for row in rows], [row["image_id"] for row in rows]))
        for row in rows:
            segments += np.bincount(np.array(row["labels"], int), minlength=len(target))
            crowds += sum(row["crowd"])
            empty += not row["labels"]
            truth = read_row(row).truth
            digests.append(row_digest(row, truth))
            counted.append(Segments.of(truth))
    index = write_index(out, entries, load_index(manifest.shard_set).image_id)
    content = content_hash(target, digests)
    copy = replace(
        manifest,
        hash=content,
        categories=target,
        shards=tuple(shards),
        index=index,
        segments=tuple(segments.tolist()),
        crowds=crowds,
        empty=empty,
        statistics=of_images(counted, len(target)),
        uri=out,
    )
    storage.write_bytes(storage.join(out, MANIFEST), copy.to_json())
    return copy


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
