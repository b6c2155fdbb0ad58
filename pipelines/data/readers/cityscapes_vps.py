"""Cityscapes as video: the set of VPS (its generated panoptic JSON), and that of DVPS (instance maps by training ids).

VPS: `panoptic_gt_{split}_city_vps.json`, which its script makes, `{split}/panoptic_video` and `{split}/img_all`.
DVPS: `{split}/*_gtFine_instanceTrainIds.png` beside `*_leftImg8bit.png`: 1000 times the training id, and a number; 32
is void, and a thing without a number is a crowd. Sources: mcahny/vps; deeplab2, data/build_dvps_data.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from panoptic.classes import classes, table
from panoptic.png import decode_labels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_json import Annotation, Image
from pipelines.data.readers.coco_source import categories_of, coco_source, read_json
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of
from pipelines.data.readers.source import Orientation, Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

_FRAME = re.compile(r"(\d{4}_\d{4}_[a-z]+_\d{6}_\d{6})_[^/]*$")
"""Video, frame, city, sequence and frame of Cityscapes."""

_VOIDS = (32, 255)
_TYPES = ("_gtFine_instanceTrainIds.png", "_leftImg8bit.png")


def cityscapes_vps(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    images: storage.Uri = "",
    pngs: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of Cityscapes-VPS or Cityscapes-DVPS.

    Args:
        root: a folder of folders or zips.
        split: train or val.
        json_file, images, pngs: where the set keeps them elsewhere (VPS).
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a file or folder is missing.
    """
    tree = Tree(root)
    frame: Orientation = "stored" if exif == "auto" else exif

    def holds(path: str) -> bool:
        return tree.is_folder(path) and any(name.endswith(_TYPES[0]) for name in tree.files(path))

    if not json_file and (hits := tree.find([split], holds)):
        folder = Folder(tree, hits[0])
        keys = [by_key(folder, lambda path, end=end: _without(path, end)) for end in reversed(_TYPES)]
        return label_files(
            "cityscapes-vps",
            tree.root,
            split,
            _by_training_ids(),
            (folder, keys[0]),
            (folder, keys[1]),
            decode=decode_row,
            orientation=frame,
        )
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        at, path = tree, tree.one(vps_files(split), "panoptic JSON of Cityscapes-VPS", "--data.json-file", tree.is_file)
    file = readable(at.address(path))
    content = read_json(at.address(path))
    folders = []
    for option, given_place, place in (
        ("--data.images", images, f"{split}/img_all"),
        ("--data.pngs", pngs, f"{split}/panoptic_video"),
    ):
        found = given(tree, given_place, option) if given_place else (tree, tree.one([place], "folder", option))
        folders.append(Folder(*found))
    photographs, maps = (by_key(folder, _frame) for folder in folders)

    def image_of(entry: Image) -> str | None:
        return folders[0].match(entry["file_name"]) or photographs.get(_frame(entry["file_name"]) or str(entry["id"]))

    def png_of(annotation: Annotation) -> str | None:
        name = annotation.get("file_name") or f"{annotation['image_id']}_final_mask.png"
        return folders[1].match(name) or maps.get(_frame(name) or str(annotation["image_id"]))

    return coco_source(
        content,
        file,
        folders[0],
        folders[1],
        categories_of(content, file),
        reader="cityscapes-vps",
        root=tree.root,
        split=split,
        orientation=frame,
        image_of=image_of,
        png_of=png_of,
    )


def vps_files(split: str) -> list[str]:
    """Usual paths of the generated JSON, relative to the data set."""
    name = f"panoptic_gt_{split}_city_vps.json"
    return [name, f"{split}/{name}"]


def _frame(path: str) -> str | None:
    match = _FRAME.search(path)
    return match[1] if match else None


def _without(path: str, ending: str) -> str | None:
    return path.removesuffix(ending) if path.endswith(ending) else None


def _by_training_ids() -> Categories:
    return replace(classes("cityscapes"), ids=tuple(e["trainId"] for e in table("cityscapes")["categories"]))


def decode_row(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is an instance map by training ids.

    Raises:
        ValueError: it is none; begins with the name of the image.
    """
    try:
        return Truth(from_training_ids(decode_labels(read(row["png"])), categories))
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error


def from_training_ids(values: np.ndarray, categories: Categories) -> Segmentation:
    """The map that values mean which are 1000 times a training id, and the number of an instance from 1.

    Args:
        values: int [H, W].
        categories: the 19 classes, whose ids are training ids.

    Raises:
        ValueError: a value is of no class.
    """
    index = {number: label for label, number in enumerate(categories.ids)}
    present = distinct(values)
    wrong = [v for v in present.tolist() if v // 1000 not in index and v // 1000 not in _VOIDS]
    if wrong:
        raise Fault(f"values of no class (1000 times 0 to 18 or 32): {counted(values, wrong)}", UNPACK)
    kinds = np.isin(values // 1000, [number for number, label in index.items() if categories.is_thing[label]])
    keys = np.where(kinds, values, values // 1000 * 1000)  # stuff is one segment, whatever the number
    kept = [
        Kept(value, index[value // 1000], categories.is_thing[index[value // 1000]] and value % 1000 == 0)
        for value in distinct(keys).tolist()
        if value // 1000 in index
    ]
    return segmentation_of(keys, kept)
