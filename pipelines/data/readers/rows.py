"""What the readers share whose formats keep a label file for each image instead of one JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from panoptic.segmentation import Segmentation, renumber
from pipelines.data.readers.source import COLUMNS, Stamps
from pipelines.data.readers.tree import Folder


class Row(NamedTuple):
    """One light row; see `Source.rows`."""

    name: str
    image: str
    png: str
    image_id: int | str
    record: str = "{}"
    height: int | None = None
    width: int | None = None


def table_of(rows: Sequence[Row]) -> pa.Table:
    """The light rows, column by column."""
    ids = [row.image_id for row in rows]
    types = {"height": pa.int32(), "width": pa.int32()}
    types["image_id"] = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
    columns = [pa.array([getattr(row, name) for row in rows], types.get(name, pa.string())) for name in COLUMNS]
    return pa.table(columns, names=list(COLUMNS))


def fingerprint_of(*parts: Any) -> str:
    """The sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def by_key(folder: Folder, key: Callable[[str], str | None]) -> dict[str, str]:
    """The file of each key, where `key(path)` gives the key of a file, or None for files of another kind.

    Raises:
        ValueError: two files have one key; names both.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.stamps):
        name = key(path)
        if name is None:
            continue
        if name in found:
            raise ValueError(
                f"{folder.uri}: {found[name]} and {path} are files of one image ({name}); keep one of them"
            )
        found[name] = path
    return found


def size_of(folders: Sequence[tuple[Folder, Sequence[str]]]) -> int:
    """Bytes of some files."""
    return sum(folder.stamps[path][0] for folder, paths in folders for path in paths)


def stamps_of(folder: Folder, paths: Sequence[str]) -> Stamps:
    """Size and time of some files of a folder."""
    return {path: folder.stamps[path] for path in paths}


class Kept(NamedTuple):
    """One value of a label map that becomes a segment."""

    value: int
    label: int
    crowd: bool = False


def segmentation_of(values: np.ndarray, kept: Sequence[Kept]) -> Segmentation:
    """The map whose segment k is the k-th of the values kept; all others are void.

    Args:
        values: int [H, W], from 0.
        kept: distinct values.
    """
    segments, _, _ = renumber(values + 1, [entry.value + 1 for entry in kept])  # 0 may be a value, and is void there
    return Segmentation(
        segments,
        labels=np.array([entry.label for entry in kept], np.int64),
        crowd=np.array([entry.crowd for entry in kept], bool),
    )


def counted(values: np.ndarray, wrong: Sequence[int], limit: int = 10) -> str:
    """Some values of a map with their pixels, for messages: `34 (12 pixels), 40 (1 pixel)`."""
    counts = [(value, int((values == value).sum())) for value in wrong[:limit]]
    rest = f" and {len(wrong) - limit} more" if len(wrong) > limit else ""
    return ", ".join(f"{value} ({count} pixel{'s' * (count != 1)})" for value, count in counts) + rest
