"""COCONut as its owner ships it: Parquet files of the Hugging Face hub, or the JSONs and PNGs of Kaggle.

Each row of a Parquet file has `mask` (an image: bytes of a panoptic PNG), `segments_info` (COCO's annotation) and
`image_info` (COCO's image). Categories and photographs are not in it: the classes are COCO's 133, and the photographs
those of COCO, and of Objects365 in the sets L and XL, so `images` names their folder, or one around them all. The JSONs
are COCO-panoptic's, but that they are not called like the folder of their PNGs, and that XL lists no images.
Source: bytedance/coconut_cvpr2024, download_coconut.py and merge_coconut.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import pyarrow.parquet as pq

from panoptic.classes import classes
from panoptic.segmentation import count_repair
from pipelines.cluster import storage
from pipelines.data.readers.archive import cell, readable
from pipelines.data.readers.coco_source import categories_of, coco_source, read_json
from pipelines.data.readers.faults import FETCH
from pipelines.data.readers.places import holding, image_places
from pipelines.data.readers.rows import Row, fingerprint_of, table_of
from pipelines.data.readers.source import Orientation, Problem, Source
from pipelines.data.readers.tree import Folder, Tree, given

OTHER_CLASSES = "take the row out, or give its segments ids of COCO's 133 classes"
"""Remedy for a row with a class that is not COCO's."""

UNLISTED_IMAGES = "images that the JSON does not list, named after their id maps"
"""Kind of repair."""

_COLUMNS = ("mask", "segments_info", "image_info")

_PHOTOGRAPHS = ("val2017", "train2017", "unlabeled2017", "objects365", "Objects365")

_MASKS = {"coconut_large": ("panoptic_object365",), "coconut_xlarge": ("coconuts_xlarge/panseg",)}
"""Folders of masks that are not called like their set."""


def coconut(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    pngs: storage.Uri = "",
    images: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of COCONut: 133 classes, 80 of them things.

    Args:
        root: a folder with `data/{split}-*.parquet`, whose owner calls every split train; or with
            `annotations/{split}_panoptic.json` and its PNGs in `{split}/panoptic`, `{split}/{split}` or beside it.
        split: val2017 names the photographs (`val2017/`) and, where there is no file of this name, all Parquet files;
            coconut_s, coconut_b, coconut_val, relabeled_coco_val, coconut_large or coconut_xlarge name a JSON.
        json_file, pngs: the JSON and the folder of its PNGs, where they are elsewhere.
        images: the folder or zip of the photographs, where it is elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: there are no such files, they lack a column, or the photographs are not found.
    """
    tree = Tree(root)
    files = [] if json_file else parquet_files(tree, split)
    if not files:
        return _from_json(tree, split, json_file, pngs, images, "stored" if exif == "auto" else exif)
    entries = [(address, _with_image(entry)) for address, entry in _entries(tree, files)]
    folder = _photographs(tree, split, images, [entry["image_info"]["file_name"] for _, entry in entries[:20]])
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
        infos = [{key: value for key, value in info.items() if value is not None} for info in record["segments_info"]]
        text = json.dumps({"image_id": image["id"], "segments_info": infos})
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


def _photographs(tree: Tree, split: str, images: storage.Uri, names: Sequence[str]) -> Folder:
    """The folder of the photographs, or the one around the folders of COCO and Objects365 where there are several."""
    if images:
        return Folder(*given(tree, images, "--data.images"))
    tree.mount()
    if len([place for place in _PHOTOGRAPHS if tree.is_folder(place)]) > 1:
        return Folder(tree, "")
    places = [*image_places(split), *_PHOTOGRAPHS]
    return Folder(tree, holding(tree, places, [""], names, "folder of COCO's photographs", "--data.images"))


def _with_image(entry: dict) -> dict:
    """A row whose image_info has at least id and file_name, which XL leaves to segments_info."""
    info, record = entry.get("image_info") or {}, entry["segments_info"]
    name = info.get("file_name") or _photograph_name(record.get("file_name") or "")
    key = record.get("image_id") if info.get("id") is None else info["id"]
    return {**entry, "image_info": {**info, "file_name": name, "id": key}}


def _photograph_name(png: str) -> str:
    return f"{png.replace(chr(92), '/').rsplit('/', 1)[-1].rsplit('.', 1)[0]}.jpg"


def _from_json(
    tree: Tree, split: str, json_file: storage.Uri, pngs: storage.Uri, images: storage.Uri, orientation: Orientation
) -> Source:
    """The JSON of a split and its PNGs, as Kaggle ships them."""
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        option = "--data.json-file, or Parquet files in data/"
        at, path = tree, tree.one(json_files(split), "JSON or Parquet file of COCONut", option, tree.is_file)
    file = readable(at.address(path))
    content = read_json(at.address(path), ("images", "categories"))
    if not content.images:
        listed = {one["image_id"]: _photograph_name(one.get("file_name") or "") for one in content.annotations}
        content.images.extend({"id": key, "file_name": name} for key, name in listed.items())
        count_repair(content.repairs, UNLISTED_IMAGES, len(listed))
    categories = categories_of(content, file) if content.categories is not None else classes("coco")
    if pngs:
        maps = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        names = [name for one in islice(content.annotations, 20) if (name := one.get("file_name"))]
        beside = path.rpartition("/")[0]
        further = [*_MASKS.get(split, ()), f"{split}/panoptic", f"{split}/{split}", f"{split}/panseg", split]
        maps = Folder(at, holding(at, further, [beside], names, "folder of PNG id maps", "--data.pngs"))
    folder = _photographs(tree, split, images, [image["file_name"] for image in content.images[:20]])
    return coco_source(
        content, file, folder, maps, categories, reader="coconut", root=tree.root, split=split, orientation=orientation
    )


def json_files(split: str) -> list[str]:
    """Usual paths of the JSON of a split, relative to the data set."""
    names = [f"{split}_panoptic.json"]
    return [f"{above}{name}" for above in ("annotations/annotations/", "annotations/", "") for name in names]


def parquet_files(tree: Tree, split: str) -> list[str]:
    """The Parquet files of a split, of all splits where none has its name."""
    files = [f"data/{name}" for name in tree.names("data") if name.endswith(".parquet")]
    files = files or [name for name in tree.names() if name.endswith(".parquet")]
    return [file for file in files if file.rsplit("/", 1)[-1].startswith(split)] or files


def columns_of(address: str) -> list[str]:
    """The columns of a Parquet file."""
    with storage.open_file(address) as stream:
        return pq.ParquetFile(stream).schema_arrow.names


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
