"""Parquet files of the form that Hugging Face's `datasets` writes: columns image, mask and segments_info.

A row has the bytes of its photograph and of its id map (`image`, `mask`: {bytes, path}) and `segments_info`, a list of
{id, category_id, …}, or text that is one as JSON. There are no categories in it: a JSON gives them. COCONut, which has
no photographs, is read by `coconut`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow.parquet as pq
import pydantic_core

from panoptic.segmentation import Categories, shown
from pipelines.cluster import storage
from pipelines.data.config import Orientation
from pipelines.data.readers.archive import cell, read_file, readable
from pipelines.data.readers.coconut import parquet_files
from pipelines.data.readers.rows import Row, fingerprint_of, table_of
from pipelines.data.readers.source import Problem, Source
from pipelines.data.readers.tree import Tree, given

_COLUMNS = ("image", "mask", "segments_info")


def huggingface(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    things: Sequence[str] = (),
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of a data set with masks and segments_info in Parquet files.

    Args:
        root: a folder with `data/{split}-*.parquet`, or with Parquet files.
        split: the first part of the names of its files.
        json_file: the categories, a list of {id, name, isthing, color}, alone or as `categories` of an object.
        things: names of the classes that are things, where the JSON does not say it.
        exif: the frame of the maps where sizes do not tell it; by default the upright image.

    Raises:
        ValueError: there are no Parquet files, they lack a column, or the categories are missing or wrong.
    """
    tree = Tree(root)
    files = parquet_files(tree, split)
    if not files:
        raise ValueError(f"{tree.root}: no Parquet files; looked for data/*.parquet and *.parquet")
    if not json_file:
        raise ValueError(
            f"{tree.root}: the files do not name their classes; give a JSON with a list of id, name and isthing: "
            "--data.json-file FILE"
        )
    at, path = given(tree, json_file, "--data.json-file")
    categories = _categories(read_file(at.address(path)), readable(at.address(path)), things)
    rows, problems, taken = [], [], set()
    for file, group, number, row in _entries(tree, files):
        name = _name(row.get("image_path") or row.get("mask_path")) or f"{len(taken):08}"
        infos = row["segments_info"]
        infos = _parsed(infos) if isinstance(infos, str) else infos
        reason = _wrong(infos, set(categories.ids))
        if name in taken:
            name = f"{len(taken):08}-{name}"
        taken.add(name)
        if reason:
            problems.append(Problem(name, reason, "correct segments_info, or the JSON of the categories"))
            continue
        wanted = [{k: v for k, v in info.items() if k in _KEYS and v is not None} for info in infos or ()]
        record = json.dumps({"image_id": name, "segments_info": wanted})
        image, mask = (cell(file, group, number, column) for column in ("image", "mask"))
        rows.append(Row(name, image, mask, name, record))
    stamps = [(path, tree.files()[path]) for path in files]
    return Source(
        reader="huggingface",
        root=tree.root,
        split=split,
        categories=categories,
        rows=table_of(rows),
        problems=tuple(problems),
        unannotated=(),
        bytes=sum(stamp[0] for _, stamp in stamps),
        fingerprint=fingerprint_of("huggingface", stamps, categories.to_coco()),
        orientation="applied" if exif == "auto" else exif,
    )


_KEYS = ("id", "category_id", "iscrowd", "area")


def _categories(data: bytes, file: str, things: Sequence[str]) -> Categories:
    try:
        entries = pydantic_core.from_json(data)
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    entries = entries.get("categories") if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: categories is {shown(entries)}; it must be a list of id, name and isthing")
    names = [str(entry.get("name")) for entry in entries]
    if unknown := [name for name in things if name not in names]:
        raise ValueError(f"--data.things {', '.join(unknown)}: {file} has no such class; it has {', '.join(names)}")
    if things:
        entries = [{**entry, "isthing": int(entry.get("name") in things)} for entry in entries]
    elif entries and not any("isthing" in entry for entry in entries):
        raise ValueError(
            f"{file}: categories do not say which classes are things (isthing); name them with --data.things, of "
            f"{', '.join(names)}"
        )
    return Categories.from_coco(entries, file)


def _entries(tree: Tree, files: Sequence[str]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """The file, row group and row of each image, and its row without bytes."""
    for path in files:
        address = tree.address(path)
        with storage.open_file(address) as stream:
            file = pq.ParquetFile(stream)
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{address}: has no column {', '.join(missing)}; a panoptic set has {', '.join(_COLUMNS)}"
                )
            paths = [name for name in ("image.path", "mask.path") if name in file.schema.names or _has(file, name)]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["segments_info", *paths]).to_pylist()
                for number, row in enumerate(table):
                    named = {f"{key}_path": (row.get(key) or {}).get("path") for key in ("image", "mask")}
                    yield address, group, number, {"segments_info": row["segments_info"], **named}


def _has(file: pq.ParquetFile, path: str) -> bool:
    """True if the file has a leaf of this dotted path."""
    schema = file.schema
    return any(schema.column(k).path == path for k in range(len(schema)))


def _name(path: Any) -> str:
    """The last part of a path with slashes or backslashes."""
    return path.replace("\\", "/").rsplit("/", 1)[-1] if isinstance(path, str) else ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _wrong(infos: Any, known: set[int]) -> str:
    """A reason if a list of segments is none, or uses a category that is not there."""
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        return f"segments_info is {shown(infos)}; it must be the list of the image's segments"
    for info in infos:
        if not isinstance(info.get("id"), int) or not 0 <= info["id"] < 1 << 24:
            return f"segments_info.id is {shown(info.get('id'))}; it must be a whole number from 0 to 16777215"
    unknown = {str(info.get("category_id")) for info in infos if info.get("category_id") not in known}
    return f"category_id {', '.join(sorted(unknown))} is not in the categories" if unknown else ""
