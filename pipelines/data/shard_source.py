"""Prepared shards as a source: so they are joined with other sets, prepared or not, and mapped, without being unpacked.

Shapes: H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from panoptic.png import decode_segments
from panoptic.segmentation import Categories, Segmentation
from pipelines.cluster import storage
from pipelines.data.absent import KEY as ABSENT
from pipelines.data.absent import absent_of
from pipelines.data.copies import KEY as COPIES
from pipelines.data.manifest import Manifest, former_manifest, is_shards
from pipelines.data.readers.archive import row_column
from pipelines.data.readers.rows import Row, table_of
from pipelines.data.readers.source import Source, Truth
from pipelines.data.shard_index import list_images, load_index


def shard_source(root: storage.Uri, split: str) -> Source | None:
    """The shards of a split in a folder, or in the folder of this name below it; None where there are none.

    Raises:
        ValueError: they are of another split, of an earlier version, or hold augmented copies.
    """
    for folder in (storage.join(root, split), storage.absolute(root)):
        if former := former_manifest(folder):
            raise ValueError(
                f"{folder}: shards of schema version {former['schema_version']}; prepare them again before they are "
                "joined or mapped: jobs/prepare.py"
            )
        if is_shards(folder):
            return _source(Manifest.load(folder), split)
    return None


def _source(manifest: Manifest, split: str) -> Source:
    if manifest.split != split:
        raise ValueError(f"{manifest.uri}: these are shards of split {manifest.split!r}, not of {split!r}")
    if COPIES in manifest.source:
        raise ValueError(
            f"{manifest.uri}: holds augmented copies, which are made after sets are joined or mapped; give shards "
            "without copies"
        )
    index, rows = load_index(manifest.shard_set), []
    for number, (name, image_id) in enumerate(list_images(manifest.shard_set)):
        file, span = manifest.files[index.shard(number)], index.span(number)
        image, segments, labels, crowd = (
            row_column(file, span, column) for column in ("image", "segments", "labels", "crowd")
        )
        record = json.dumps({"labels": labels, "crowd": crowd})
        rows.append(Row(name, image, segments, image_id, record))
    return Source(
        reader=str(manifest.source.get("reader") or "shards"),
        root=manifest.uri,
        split=split,
        categories=manifest.categories,
        rows=table_of(rows),
        problems=(),
        unannotated=(),
        bytes=sum(shard.size for shard in manifest.shards),
        fingerprint=manifest.hash,
        decode=decode_shard_row,
        orientation="applied",  # what EXIF would turn under a map of stored pixels was freed of it
        about={ABSENT: absent_of(manifest.source)},
    )


def decode_shard_row(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is that of a shard, and `record` the addresses of its labels and crowds.

    Raises:
        ValueError: the row is not what was written.
    """
    record = json.loads(row["record"])
    labels, crowd = (json.loads(read(record[column])) for column in ("labels", "crowd"))
    segments = decode_segments(read(row["png"]))
    if len(labels) != len(crowd) or segments.max(initial=0) > len(labels) or max(labels, default=0) >= len(categories):
        raise ValueError(f"{row['name']}: its map and its labels do not fit; prepare these shards again")
    return Truth(Segmentation(segments, np.array(labels, np.int64), np.array(crowd, bool)))
