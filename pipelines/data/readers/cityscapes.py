"""Cityscapes as its owner ships it: `leftImg8bit` and `gtFine` or `gtCoarse`, unpacked or in their zips.

The 19 evaluated classes, 8 of them things, as cityscapesScripts makes them (preparation/createPanopticImgs.py and
helpers/labels.py): a value of an `instanceIds` map below 1000 is a class, from 1000 on 1000 times a class and a number.
A thing class without a number is a group, that is a crowd. Classes that are not evaluated are void.

Shapes: H x W pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from panoptic.classes import classes
from panoptic.png import decode_labels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_json import Annotation, Image
from pipelines.data.readers.coco_source import coco_source, read_json
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of
from pipelines.data.readers.source import Orientation, Source, Truth, decode_coco
from pipelines.data.readers.tree import Folder, Tree, given

_KEY = re.compile(r"([^_/]+_[^_/]+_[^_/]+)_[^/]*$")
"""City, sequence and frame: the first three parts of a file's name."""

_VOIDS = (255, 65535)
"""-1 as 8 and 16 bits hold it."""

_WITH_INSTANCES = range(24, 34)
_IDS = range(34)

_LOOKED_AT = 20
"""Maps that are opened to tell a split without labels, and maps of training ids."""


def cityscapes(
    root: storage.Uri,
    split: str,
    *,
    annotations: Literal["auto", "fine", "coarse"] = "auto",
    labels: Literal["auto", "instances", "panoptic"] = "auto",
    images: storage.Uri = "",
    json_file: storage.Uri = "",
    pngs: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of Cityscapes.

    Looked for below `root`, in folders and zips up to three further down: `leftImg8bit/{split}`, and
    `gtFine/{split}/*/*_gtFine_instanceIds.png`, else `gtFine/cityscapes_panoptic_{split}[_trainId].json` with the
    folder of the same name, as cityscapesScripts writes them.

    Args:
        root: a folder of folders or zips.
        split: train, val, or train_extra.
        annotations: fine (`gtFine`) or coarse (`gtCoarse`); by default fine where there are fine ones.
        labels: read the `instanceIds` maps or the panoptic JSON; by default the maps where they are there.
        images: the folder of the split's photographs, where it is elsewhere.
        json_file, pngs: the panoptic JSON and its folder of id maps, where they are elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder is missing, the split has no public labels, or the maps hold training ids.
    """
    tree = Tree(root)
    if json_file or labels == "panoptic":
        maps = None
    else:
        maps = _instance_maps(tree, split, annotations)
        if maps is None and labels == "instances":
            raise ValueError(
                f"{tree.root}: no instanceIds maps of split {split}; looked for {_listed(split, annotations)}"
            )
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        option = "--data.images"
        photographs = Folder(tree, tree.one([f"leftImg8bit/{split}"], "folder of images", option, tree.is_folder))
    if maps is not None:
        return _from_instances(tree, split, photographs, maps, "stored" if exif == "auto" else exif)
    return _from_json(tree, split, photographs, annotations, json_file, pngs, "stored" if exif == "auto" else exif)


def _types(annotations: str) -> list[str]:
    return {"fine": ["gtFine"], "coarse": ["gtCoarse"]}.get(annotations, ["gtFine", "gtCoarse"])


def _listed(split: str, annotations: str) -> str:
    places = [
        place
        for kind in _types(annotations)
        for place in (f"{kind}/{split}/*/*_{kind}_instanceIds.png", f"{kind}/cityscapes_panoptic_{split}.json")
    ]
    return f"{' and '.join(places)}, in folders, zips, and up to three folders further down"


def _instance_maps(tree: Tree, split: str, annotations: str) -> Folder | None:
    """The folder of a split's label files."""

    def holds(path: str) -> bool:
        return tree.is_folder(path) and any(_is_map(name) for name in tree.files(path))

    for kind in _types(annotations):
        if tree.find([f"{kind}/{split}"], holds):
            return Folder(tree, tree.one([f"{kind}/{split}"], "folder of label maps", "--data.root", holds))
    return None


def _is_map(path: str) -> bool:
    return path.endswith("_instanceIds.png")


def _key(path: str) -> str | None:
    match = _KEY.search(path)
    return match[1] if match else None


def _from_instances(tree: Tree, split: str, images: Folder, maps: Folder, orientation: Orientation) -> Source:
    photographs = by_key(images, lambda path: _key(path) if path.lower().endswith((".png", ".jpg")) else None)
    labels = by_key(maps, lambda path: _key(path) if _is_map(path) else None)
    _look_at(maps, list(labels.values())[:_LOOKED_AT], split, images)
    return label_files(
        "cityscapes",
        tree.root,
        split,
        classes("cityscapes"),
        (images, photographs),
        (maps, labels),
        decode=decode_instances,
        orientation=orientation,
    )


def _look_at(maps: Folder, paths: list[str], split: str, images: Folder) -> None:
    """Refuse a split without labels, and one whose maps hold training ids.

    Raises:
        ValueError: either is the case.
    """
    values = np.unique(np.concatenate([distinct(decode_labels(maps.read(path))) for path in paths]))
    ids = np.unique(np.where(values < 1000, values, values // 1000))
    if not len(ids) or ids.max() <= 3:
        raise ValueError(no_labels(split, maps.uri, images.uri))
    known = ids[~np.isin(ids, [255, 65])]  # 65535 // 1000
    if known.max(initial=0) <= 18 and len(known) < len(ids):
        raise ValueError(
            f"{maps.uri}: the maps hold training ids (0 to 18 and 255), not the label ids (0 to 33) that Cityscapes "
            "ships as *_instanceIds.png; unpack gtFine_trainvaltest.zip again"
        )


def no_labels(split: str, maps: str, images: str) -> str:
    """The message for a split whose labels are not public."""
    return (
        f"split {split} has no public labels: {maps} holds no more than the ego vehicle and the image's rim; train and "
        f"evaluate on train and val, and make the submission of this split with jobs/predict.py MODEL {images}"
    )


def decode_instances(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is an `instanceIds` map.

    Raises:
        ValueError: the map is no such; begins with the name of the image.
    """
    png = read(row["png"])
    try:
        if png[24:25] != b"\x10":
            raise Fault("its bits are not 16, so it has lost the numbers of the instances", UNPACK)
        return Truth(from_instance_ids(decode_labels(png), categories))
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error


def from_instance_ids(values: np.ndarray, categories: Categories) -> Segmentation:
    """The map that `instanceIds` mean: segment k is the k-th value, ascending, of the 19 classes.

    Args:
        values: int [H, W].
        categories: the 19 classes, whose ids are label ids.

    Raises:
        ValueError: a value is no label id, or gives instances to a class that has none.
    """
    labels = {number: label for label, number in enumerate(categories.ids)}
    kept, wrong, numbered = [], [], []
    for value in distinct(values).tolist():
        number = value if value < 1000 else value // 1000
        if value in _VOIDS:
            continue
        if number not in _IDS:
            wrong.append(value)
        elif value >= 1000 and number not in _WITH_INSTANCES:
            numbered.append(value)
        elif number in labels:
            label = labels[number]
            kept.append(Kept(value, label, crowd=value < 1000 and categories.is_thing[label]))
    if wrong:
        raise Fault(f"values that are no label id of Cityscapes (0 to 33): {counted(values, wrong)}", UNPACK)
    if numbered:
        raise Fault(
            f"instances of classes that have none in Cityscapes: {counted(values, numbered)}; are these training ids?",
            UNPACK,
        )
    return segmentation_of(values, kept)


def _from_json(
    tree: Tree,
    split: str,
    images: Folder,
    annotations: str,
    json_file: storage.Uri,
    pngs: storage.Uri,
    orientation: Orientation,
) -> Source:
    """The panoptic JSON of cityscapesScripts, by label ids or by training ids, or of the older converter."""
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        stems = [f"cityscapes_panoptic_{split}", f"cityscapes_panoptic_{split}_trainId"]
        places = [f"{kind}/{stem}.json" for kind in _types(annotations) for stem in stems]
        hits = tree.find([*places, *(f"{stem}.json" for stem in stems)])
        if not hits:
            where = f"{tree.root}: no labels of split {split}; looked for {_listed(split, annotations)}"
            raise ValueError(where if split != "test" else no_labels(split, tree.root, images.uri))
        at, path = tree, tree.one(places, "panoptic JSON", "--data.json-file")
    file = readable(at.address(path))
    content = read_json(at.address(path))
    maps = Folder(*given(tree, pngs, "--data.pngs")) if pngs else Folder(at, path.removesuffix(".json"))
    categories = classes("cityscapes")
    written = _written_classes(content.categories, file, categories)
    if content.annotations and not any(annotation["segments_info"] for annotation in content.annotations):
        raise ValueError(no_labels(split, file, images.uri))
    photographs = by_key(images, lambda path: _key(path) if path.lower().endswith((".png", ".jpg")) else None)
    labels = by_key(maps, _key)

    def image_of(entry: Image) -> str | None:  # its file_name is one that does not exist
        key = str(entry["id"])
        return photographs.get(key) or photographs.get(_key(entry["file_name"]) or "")

    def png_of(annotation: Annotation) -> str | None:
        name = annotation.get("file_name") or ""
        return name if name in maps else labels.get(str(annotation["image_id"]))

    return coco_source(
        content,
        file,
        images,
        maps,
        categories,
        reader="cityscapes",
        root=tree.root,
        split=split,
        orientation=orientation,
        decode=partial(decode_coco, written=written),
        known=written.ids,
        image_of=image_of,
        png_of=png_of,
    )


def _written_classes(entries: Any, file: str, categories: Categories) -> Categories:
    """The 19 classes with the ids that a JSON gives them, which are label ids or training ids.

    Raises:
        ValueError: it lacks one of the classes.
    """
    ids = {str(entry.get("name")): entry.get("id") for entry in entries} if isinstance(entries, list) else {}
    missing = [name for name in categories.names if not isinstance(ids.get(name), int)]
    if missing:
        raise ValueError(
            f"{file}: categories lack {', '.join(missing)}; the 19 classes of Cityscapes are needed. A set with other "
            f"classes is read with --data.reader coco: {json.dumps(list(ids))[:200]}"
        )
    return Categories(
        categories.names, categories.is_thing, tuple(ids[name] for name in categories.names), categories.colours
    )
