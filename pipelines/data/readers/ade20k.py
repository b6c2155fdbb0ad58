"""ADE20K's panoptic set of 150 classes, from the semantic and the instance PNGs of its two downloads, or as prepared.

`annotations` holds classes 1 to 150 (0 is void), `annotations_instance` an RGB PNG: red is one of 100 instance classes,
green the number of the instance. Stuff is painted first, then the instances in ascending order over it; pixels of a
thing class under no instance are void. So does Mask2Former's datasets/prepare_ade20k_pan_seg.py, whose result is read
as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from panoptic.classes import classes, table
from panoptic.png import decode_channels, decode_labels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_source import categories_of, coco_source, read_json
from pipelines.data.readers.faults import FETCH, UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of, stem
from pipelines.data.readers.source import Orientation, Source, Truth, decode_coco
from pipelines.data.readers.tree import Folder, Tree, given

_SPLITS = {"train": "training", "val": "validation"}
_SHORT = {"training": "train", "validation": "val"}


def ade20k(
    root: storage.Uri,
    split: str,
    *,
    labels: Literal["auto", "instances", "panoptic"] = "auto",
    images: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of ADE20K (ADEChallengeData2016 and annotations_instance): 150 classes, 100 of them things.

    Args:
        root: a folder of folders or zips.
        split: training or validation; train and val are understood.
        labels: read the two PNGs of an image, or the prepared `ade20k_panoptic_{train,val}.json`; by default the PNGs
            where they are there.
        images: the split's photographs, where they are elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder is missing; names every place looked at.
    """
    tree = Tree(root)
    split = _SPLITS.get(split, split)
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        option = "--data.images"
        photographs = Folder(tree, tree.one([f"images/{split}"], "folder of images", option, tree.is_folder))
    prepared = f"ade20k_panoptic_{_SHORT.get(split, split)}.json"
    instances = [f"annotations_instance/{split}"]
    if labels == "panoptic" or (
        labels == "auto" and not tree.find(instances, tree.is_folder) and tree.find([prepared])
    ):
        return _prepared(tree, split, photographs, prepared, "stored" if exif == "auto" else exif)
    semantic = Folder(
        tree, tree.one([f"annotations/{split}"], "folder of semantic maps", "--data.root", tree.is_folder)
    )
    numbered = Folder(
        tree,
        tree.one(
            instances, "folder of instance maps (annotations_instance.tar, unpacked)", "--data.root", tree.is_folder
        ),
    )
    numbers = by_key(numbered, lambda path: stem(path, (".png",)))
    return label_files(
        "ade20k",
        tree.root,
        split,
        classes("ade20k"),
        (photographs, by_key(photographs, lambda path: stem(path, (".jpg", ".jpeg", ".png")))),
        (semantic, by_key(semantic, lambda path: stem(path, (".png",)))),
        decode=decode_row,
        orientation="stored" if exif == "auto" else exif,
        records={key: json.dumps({"instances": numbered.address(path)}) for key, path in numbers.items()},
        extra=[numbered.stamps[path] for path in numbers.values()],
    )


def _prepared(tree: Tree, split: str, images: Folder, name: str, orientation: Orientation) -> Source:
    path = tree.one([name], "prepared panoptic JSON", "--data.root", tree.is_file)
    file = tree.readable(path)
    content = read_json(tree.address(path))
    return coco_source(
        content,
        file,
        images,
        Folder(tree, path.removesuffix(".json")),
        categories_of(content, file),
        reader="ade20k",
        root=tree.root,
        split=split,
        orientation=orientation,
        decode=partial(decode_coco, covered=True),
    )


def decode_row(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is the semantic map, and whose record names the instance map.

    Raises:
        ValueError: a map is missing or no such; begins with the name of the image.
    """
    name, address = row["name"], json.loads(row["record"]).get("instances")
    if address is None:
        raise Fault(f"{name}: its map in annotations_instance is missing (partial download?)", FETCH)
    try:
        semantic = decode_labels(read(row["png"]))
    except ValueError as error:
        raise placed(f"{name}: {readable(row['png'])}", error) from error
    try:
        return Truth(from_maps(semantic, decode_channels(read(address), 3), categories))
    except ValueError as error:
        raise placed(f"{name}: {readable(address)}", error) from error


def from_maps(semantic: np.ndarray, numbered: np.ndarray, categories: Categories) -> Segmentation:
    """The map that the two PNGs of an image mean.

    Args:
        semantic: int [H, W], 0 void, else class id + 1.
        numbered: uint8 [H, W, 3]: instance class, number, unused.
        categories: the 150 classes, with ids 0 to 149.

    Raises:
        ValueError: the sizes differ, a value has no class, or an instance has several.
    """
    if semantic.shape != numbered.shape[:2]:
        raise Fault(
            f"it is {numbered.shape[0]}x{numbered.shape[1]}, and the semantic map {semantic.shape[0]}x"
            f"{semantic.shape[1]} (height x width)",
            UNPACK,
        )
    index = {number + 1: label for label, number in enumerate(categories.ids)}
    classes_of = {int(key): value for key, value in table("ade20k")["instances"].items()}
    present = distinct(semantic).tolist()
    wrong = [value for value in present if value and value not in index]
    if wrong:
        raise Fault(f"values without a class in the semantic map (0 to 150): {counted(semantic, wrong)}", UNPACK)
    kept = [Kept(value, index[value]) for value in present if value and not categories.is_thing[index[value]]]
    keys = semantic.astype(np.int32)
    red, green = numbered[..., 0].astype(np.int32), numbered[..., 1].astype(np.int32)
    owners: dict[int, int] = {}
    for pair in distinct(green << 8 | red).tolist():
        number, kind = pair >> 8, pair & 255
        if not number:
            continue
        if number in owners:
            raise Fault(f"instance {number} has two classes, {owners[number]} and {kind}", UNPACK)
        if kind not in classes_of:
            raise Fault(f"instance {number} has the class {kind}; there are 1 to {len(classes_of)}", UNPACK)
        owners[number] = kind
        kept.append(Kept(256 + number, index[classes_of[kind]]))
    keys = np.where(green > 0, green + 256, keys)
    shown = set(distinct(keys).tolist())
    return segmentation_of(keys, [entry for entry in kept if entry.value in shown])
