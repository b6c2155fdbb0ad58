"""The parts that readers share whose formats keep a label file for each image instead of one JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from panoptic.segmentation import Categories, Segmentation, renumber
from pipelines.data.config import Orientation
from pipelines.data.readers.faults import FETCH
from pipelines.data.readers.source import COLUMNS, Decode, Problem, Source
from pipelines.data.readers.tree import Folder, folded

RESPELT = "label files whose name differs from the photograph's in case or Unicode form"
"""Kind of repair, as the manifest counts it."""


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


def stem(path: str, endings: tuple[str, ...]) -> str | None:
    """The name of a file without folders and ending; None where it has none of some endings."""
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if name.lower().endswith(endings) else None


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


def label_files(
    reader: str,
    root: str,
    split: str,
    categories: Categories,
    photographs: tuple[Folder, Mapping[str, str]],
    maps: tuple[Folder, Mapping[str, str]],
    *,
    decode: Decode,
    orientation: Orientation,
    records: Mapping[str, str] = MappingProxyType({}),
    names: Callable[[str], str] | None = None,
    extra: Any = None,
) -> Source:
    """The source of a format with a photograph and a label file for each key.

    Args:
        reader, root, split, categories, decode, orientation: of the source.
        photographs, maps: a folder, and its file of each key.
        records: the record of each key, where `decode` needs one.
        names: the name of a key's row; by default the path of its photograph.
        extra: what the content depends on beside the files, for the fingerprint; a value that JSON can hold.

    Raises:
        ValueError: no key has both files.
    """
    (images, image_of), (labels, label_of) = photographs, maps
    label_of, respelt = _spelt_alike(label_of, image_of)
    records = {respelt.get(key, key): record for key, record in records.items()}
    rows, problems, used = [], [], []
    for key in sorted(image_of.keys() | label_of.keys()):
        if key not in image_of:
            reason = f"its image is missing: {images.lacks(key)} (partial download?)"
            problems.append(Problem(label_of[key], reason, FETCH))
        elif key not in label_of:
            reason = f"its label map is missing: {labels.lacks(key)} (partial download?)"
            problems.append(Problem(image_of[key], reason, FETCH))
        else:
            image, label = image_of[key], label_of[key]
            name = names(key) if names else image
            rows.append(Row(name, images.address(image), labels.address(label), key, records.get(key, "{}")))
            used.append((images.stamps[image], labels.stamps[label]))
    if not rows:
        why = problems[0].reason if problems else "both are empty"
        raise ValueError(f"no image of {images.uri} has a label map in {labels.uri}: {why}; are both of one split?")
    return Source(
        reader=reader,
        root=root,
        split=split,
        categories=categories,
        rows=table_of(rows),
        problems=tuple(problems),
        unannotated=(),
        bytes=sum(image[0] + label[0] for image, label in used),
        fingerprint=fingerprint_of(reader, [row.name for row in rows], used, dict(records), extra),
        repairs={RESPELT: len(respelt)} if respelt else {},
        decode=decode,
        orientation=orientation,
    )


def _spelt_alike(label_of: Mapping[str, str], image_of: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The label files by the keys of the photographs, also where file systems or archivers spelt a name in other ways.

    Returns:
        the file of each key; for each key that was replaced, the one that stands in its place.
    """
    alone: dict[str, list[str]] = {}
    for key in image_of.keys() - label_of.keys():
        alone.setdefault(folded(key), []).append(key)
    others = Counter(folded(key) for key in label_of.keys() - image_of.keys())
    respelt = {
        key: alone[folded(key)][0]
        for key in label_of.keys() - image_of.keys()
        if len(alone.get(folded(key), ())) == 1 == others[folded(key)]
    }
    return {respelt.get(key, key): path for key, path in label_of.items()}, respelt
