"""KITTI-STEP: `panoptic_maps` over the photographs of KITTI's tracking set.

Red is the training id of a Cityscapes class (255 void), the instance is 256 times green and blue. Only persons and cars
are things; an instance 0 of these is a crowd. Instances are tracks, and their numbers persist over the frames.
Source: google-research/deeplab2, g3doc/setup/kitti_step.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from panoptic.png import decode_channels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of, stem
from pipelines.data.readers.source import Orientation, Source, Truth
from pipelines.data.readers.tables import classes, table
from pipelines.data.readers.tree import Folder, Tree, given

_VOID = 255
_THINGS = ("person", "car")


def kitti_step(
    root: storage.Uri,
    split: str,
    *,
    images: storage.Uri = "",
    pngs: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of KITTI-STEP: 19 classes, persons and cars are things.

    Looked for below `root`, in folders and zips up to three further down: `panoptic_maps/{split}`, and
    `images/{split}` or `training/image_02`, as KITTI ships the photographs of both splits.

    Args:
        root: a folder of folders or zips.
        split: train or val.
        images, pngs: the folders of photographs and of maps, one folder a sequence in each, where they are elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder is missing, or the split has no labels.
    """
    tree = Tree(root)
    if split in ("test", "testing"):
        raise ValueError(f"split {split} has no public labels; give its photographs to jobs/predict.py")
    if pngs:
        maps = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        place = tree.one([f"panoptic_maps/{split}"], "folder of panoptic maps", "--data.pngs", tree.is_folder)
        maps = Folder(tree, place)
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        places = [f"images/{split}", "training/image_02"]
        photographs = Folder(tree, tree.one(places, "folder of images", "--data.images", tree.is_folder))
    labels = by_key(maps, _key)
    sequences = {key.split("/")[0] for key in labels}
    return label_files(
        "kitti-step",
        tree.root,
        split,
        categories(),
        # the photographs of both splits lie in one folder
        (photographs, {k: v for k, v in by_key(photographs, _key).items() if k.split("/")[0] in sequences}),
        (maps, labels),
        decode=decode_row,
        orientation="stored" if exif == "auto" else exif,
    )


def _key(path: str) -> str | None:
    """Sequence and frame: frames have the same names in every sequence."""
    name = stem(path, (".png", ".jpg", ".jpeg"))
    return None if name is None or "/" not in path else f"{path.split('/')[-2]}/{name}"


def categories() -> Categories:
    """The classes of Cityscapes by their training ids; only persons and cars are things."""
    own = classes("cityscapes")
    ids = tuple(entry["trainId"] for entry in table("cityscapes")["categories"])
    return replace(own, ids=ids, is_thing=tuple(name in _THINGS for name in own.names))


def decode_row(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is a panoptic map.

    Raises:
        ValueError: it is none; begins with the name of the image.
    """
    try:
        return Truth(from_panoptic_map(decode_channels(read(row["png"]), 3), categories))
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error


def from_panoptic_map(pixels: np.ndarray, categories: Categories) -> Segmentation:
    """The map that a panoptic map of KITTI-STEP means.

    Args:
        pixels: uint8 [H, W, 3].
        categories: the classes, whose ids are training ids.

    Raises:
        ValueError: a class that is not there.
    """
    index = {number: label for label, number in enumerate(categories.ids)}
    red, green, blue = (pixels[..., k].astype(np.int32) for k in range(3))
    thing = np.zeros(256, bool)
    thing[[number for number, label in index.items() if categories.is_thing[label]]] = True
    keys = (red << 16) + np.where(thing[red], green << 8 | blue, 0)
    kept, wrong = [], []
    for key in distinct(keys).tolist():
        number = key >> 16
        if number in index:
            label = index[number]
            kept.append(Kept(key, label, categories.is_thing[label] and key & 0xFFFF == 0))
        elif number != _VOID:
            wrong.append(number)
    if wrong:
        raise Fault(f"classes that KITTI-STEP does not have (0 to 18, 255): {counted(red, sorted(set(wrong)))}", UNPACK)
    return segmentation_of(keys, kept)
