"""KITTI-STEP and MOTChallenge-STEP: `panoptic_maps` over the photographs of KITTI's tracking set, or of MOTS.

Red is the training id of a Cityscapes class (255 void), the instance is 256 times green and blue. Only persons and cars
are things; an instance 0 of these is a crowd. Instances are tracks, and their numbers persist over the frames.
MOTChallenge-STEP writes its maps alike, with 7 classes of its own numbers, of which persons are things.
Source: google-research/deeplab2, g3doc/setup/kitti_step.md and motchallenge_step.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from panoptic.classes import classes, table
from panoptic.png import decode_channels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of, stem
from pipelines.data.readers.source import Orientation, Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

_VOID = 255
_THINGS = ("person", "car")

_MOTS_CLASSES = ("sidewalk", "building", "vegetation", "sky", "person", "rider", "bicycle")
_MOTS_SEQUENCES = ({"0002", "0009"}, {"0001", "0007"})
"""Sequences of MOTChallenge-STEP's splits train and test."""


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
    # the photographs of both splits lie in one folder
    frames = {key: path for key, path in by_key(photographs, _key).items() if key.split("/")[0] in sequences}
    if (
        sequences in _MOTS_SEQUENCES
        and frames
        and all(path.lower().endswith((".jpg", ".jpeg")) for path in frames.values())
    ):
        raise ValueError(
            f"{maps.uri}: holds the sequences {', '.join(sorted(sequences))} over JPEGs, which are MOTChallenge-"
            "STEP's; its maps mean other classes: use --data.reader motchallenge-step"
        )
    return label_files(
        "kitti-step",
        tree.root,
        split,
        categories(),
        (photographs, frames),
        (maps, labels),
        decode=decode_row,
        orientation="stored" if exif == "auto" else exif,
    )


def motchallenge_step(
    root: storage.Uri,
    split: str,
    *,
    images: storage.Uri = "",
    pngs: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of MOTChallenge-STEP: 7 classes, persons are things.

    Looked for below `root`, in folders and zips up to three further down: `panoptic_maps/{split}`, and
    `images/{split}/0002`, or `MOTS/{split}/MOTS20-02/img1` as the owner ships the photographs.

    Args:
        root: a folder of folders or zips.
        split: train; the maps of test, too, where they are there.
        images, pngs: the folders of photographs and of maps, one folder a sequence in each, where they are elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder is missing, or no frame has both files.
    """
    tree = Tree(root)
    if pngs:
        maps = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        place = tree.one([f"panoptic_maps/{split}"], "folder of panoptic maps", "--data.pngs", tree.is_folder)
        maps = Folder(tree, place)
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        places = [f"images/{split}", f"MOTS/{split}", f"MOTS20/{split}"]
        photographs = Folder(tree, tree.one(places, "folder of images", "--data.images", tree.is_folder))
    labels = by_key(maps, _mots_key)
    sequences = {key.split("/")[0] for key in labels}
    frames = {key: path for key, path in by_key(photographs, _mots_key).items() if key.split("/")[0] in sequences}
    return label_files(
        "motchallenge-step",
        tree.root,
        split,
        mots_categories(),
        (photographs, frames),
        (maps, labels),
        decode=decode_row,
        orientation="stored" if exif == "auto" else exif,
        names=lambda key: f"{key}.{frames[key].rsplit('.', 1)[1]}",
    )


def _mots_key(path: str) -> str | None:
    """Sequence and frame as the maps call them: `MOTS20-02/img1/000001.jpg` is `0002/000001`."""
    name, folders = stem(path, (".png", ".jpg", ".jpeg")), path.split("/")[:-1]
    if folders and folders[-1] == "img1":
        folders = folders[:-1]
    number = re.search(r"(\d+)$", folders[-1]) if folders else None
    return None if name is None or number is None else f"{int(number[1]):04}/{name}"


def mots_categories() -> Categories:
    """The 7 classes of MOTChallenge-STEP by their numbers, with the colours of Cityscapes."""
    own = classes("cityscapes")
    colours = dict(zip(own.names, own.colours, strict=True))
    return Categories(
        names=_MOTS_CLASSES,
        is_thing=tuple(name == "person" for name in _MOTS_CLASSES),
        ids=tuple(range(len(_MOTS_CLASSES))),
        colours=tuple(colours[name] for name in _MOTS_CLASSES),
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
        listed = counted(red, sorted(set(wrong)))
        raise Fault(f"classes that the data set does not have (0 to {max(index)}, 255): {listed}", UNPACK)
    return segmentation_of(keys, kept)
