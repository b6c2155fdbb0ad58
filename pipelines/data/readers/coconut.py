"""COCONut as its owner ships it on the Hugging Face hub: Parquet files of masks over the photographs of COCO.

Each row has `mask` (an image: bytes of a panoptic PNG), `segments_info` (COCO's annotation) and `image_info` (COCO's
image). Categories and photographs are not in it: the classes are COCO's 133, and the photographs those of COCO, so
`images` names their folder. Source: bytedance/coconut_cvpr2024, download_coconut.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import pyarrow.parquet as pq

from pipelines.cluster import storage
from pipelines.data.readers.archive import cell
from pipelines.data.readers.faults import FETCH
from pipelines.data.readers.places import holding, image_places
from pipelines.data.readers.rows import Row, fingerprint_of, table_of
from pipelines.data.readers.source import Orientation, Problem, Source
from pipelines.data.readers.tables import classes
from pipelines.data.readers.tree import Folder, Tree, given

OTHER_CLASSES = "take the row out, or give its segments ids of COCO's 133 classes"
"""Remedy."""

_COLUMNS = ("mask", "segments_info", "image_info")


def coconut(
    root: storage.Uri,
    split: str,
    *,
    images: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of COCONut: 133 classes, 80 of them things.

    Args:
        root: a folder with `data/{split}-*.parquet`; its owner calls every split train.
        split: val2017 names the photographs (`val2017/`) and, where there is no file of this name, all Parquet files.
        images: the folder or zip of the photographs, where it is elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: there are no Parquet files, they lack a column, or the photographs are not found.
    """
    tree = Tree(root)
    files = parquet_files(tree, split)
    if not files:
        raise ValueError(f"{tree.root}: no Parquet files of COCONut; looked for data/*.parquet and *.parquet")
    entries = list(_entries(tree, files))
    names = [entry["image_info"]["file_name"] for _, entry in entries[:20]]
    if images:
        folder = Folder(*given(tree, images, "--data.images"))
    else:
        places = [*image_places(split), "val2017", "train2017", "unlabeled2017"]
        folder = Folder(tree, holding(tree, places, [""], names, "folder of COCO's photographs", "--data.images"))
    categories = classes("coco")
    known = set(categories.ids)
    times = Counter(entry["image_info"]["file_name"] for _, entry in entries)
    ids = Counter(entry["image_info"]["id"] for _, entry in entries)
    rows, problems, size = [], [], 0
    for address, entry in entries:
        image, record = entry["image_info"], entry["segments_info"]
        name, photograph = image["file_name"], folder.match(image["file_name"])
        unknown = sorted({str(s["category_id"]) for s in record["segments_info"]} - set(map(str, known)))
        if times[name] > 1 or ids[image["id"]] > 1:
            reason = f"image {image['id']} ({name}) stands in {max(times[name], ids[image['id']])} rows"
            remedy = "keep one row of each image"
        elif photograph is None:
            reason, remedy = f"image is missing: {folder.lacks(name)} (partial download?)", FETCH
        else:
            reason = f"category_id {', '.join(unknown)} is none of COCO's" if unknown else ""
            remedy = OTHER_CLASSES
        if reason or photograph is None:
            problems.append(Problem(name, reason, remedy))
            continue
        sizes = image.get("height"), image.get("width")
        size += folder.stamps[photograph][0]
        text = json.dumps({"image_id": image["id"], "segments_info": record["segments_info"]})
        rows.append(Row(photograph, folder.address(photograph), address, image["id"], text, *sizes))
    stamps = [(path, tree.files()[path]) for path in files]
    return Source(
        reader="coconut",
        root=tree.root,
        split=split,
        categories=categories,
        rows=table_of(rows),
        problems=tuple(problems),
        unannotated=(),
        bytes=size + sum(stamp[0] for _, stamp in stamps),
        fingerprint=fingerprint_of("coconut", stamps, [(row.name, folder.stamps[row.name]) for row in rows]),
        orientation="stored" if exif == "auto" else exif,
    )


def parquet_files(tree: Tree, split: str) -> list[str]:
    """The Parquet files of a split, of all splits where none has its name."""
    files = [f"data/{name}" for name in tree.names("data") if name.endswith(".parquet")]
    files = files or [name for name in tree.names() if name.endswith(".parquet")]
    return [file for file in files if file.rsplit("/", 1)[-1].startswith(split)] or files


def _entries(tree: Tree, files: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The address of each mask, and its row without it."""
    for path in files:
        address = tree.address(path)
        with storage.open_file(address) as stream:
            file = pq.ParquetFile(stream)
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{address}: has no column {', '.join(missing)}; COCONut's files have {', '.join(_COLUMNS)}"
                )
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=list(_COLUMNS[1:])).to_pylist()
                yield from ((cell(address, group, k, "mask"), row) for k, row in enumerate(rows))
