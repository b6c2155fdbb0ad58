"""BDD100K panoptic: `images/10k` and the RGBA bitmasks of `labels/pan_seg/bitmasks`.

Red is the class (1 to 30 stuff, 31 to 40 things, 0 void), green holds flags (8 truncated, 4 occluded, 2 crowd, 1
ignore), and the instance is 256 times blue and alpha. Source: bdd100k, label/label.py and common/bitmask.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from panoptic.classes import classes
from panoptic.png import decode_channels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of, stem
from pipelines.data.readers.source import Orientation, Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

_CROWD_OR_IGNORED = 0b11


def bdd100k(
    root: storage.Uri,
    split: str,
    *,
    images: storage.Uri = "",
    pngs: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of BDD100K's panoptic set: 40 classes, 10 of them things.

    Args:
        root: a folder of folders or zips.
        split: train or val.
        images, pngs: the split's photographs and bitmasks, where they are elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder is missing, or the bitmasks have lost their alpha channel.
    """
    tree = Tree(root)
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        places = [f"images/10k/{split}", f"10k/{split}"]
        photographs = Folder(tree, tree.one(places, "folder of images", "--data.images", tree.is_folder))
    if pngs:
        maps = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        places = [f"labels/pan_seg/bitmasks/{split}", f"pan_seg/bitmasks/{split}"]
        maps = Folder(tree, tree.one(places, "folder of bitmasks", "--data.pngs", tree.is_folder))
    bitmasks = by_key(maps, lambda path: stem(path, (".png",)))
    for path in list(bitmasks.values())[:1]:
        _check_mode(maps.read(path), readable(maps.address(path)))
    return label_files(
        "bdd100k",
        tree.root,
        split,
        classes("bdd100k"),
        (photographs, by_key(photographs, lambda path: stem(path, (".jpg", ".jpeg", ".png")))),
        (maps, bitmasks),
        decode=decode_row,
        orientation="stored" if exif == "auto" else exif,
    )


def _check_mode(png: bytes, file: str) -> None:
    try:
        decode_channels(png, 4)
    except ValueError as error:
        raise ValueError(f"{file}: needs the RGBA file, alpha being half of the instance's number: {error}") from error


def decode_row(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories) -> Truth:
    """The truth of a row whose `png` is a bitmask.

    Raises:
        ValueError: it is none; begins with the name of the image.
    """
    try:
        return Truth(from_bitmask(decode_channels(read(row["png"]), 4), categories))
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error


def from_bitmask(pixels: np.ndarray, categories: Categories) -> Segmentation:
    """The map that a bitmask means; a stuff class is one segment, and an instance one of its class, flags and number.

    Args:
        pixels: uint8 [H, W, 4], R G B A.
        categories: the 40 classes, with their own ids.

    Raises:
        ValueError: a class that is not there.
    """
    index = {number: label for label, number in enumerate(categories.ids)}
    red, green, blue, alpha = (pixels[..., k].astype(np.int64) for k in range(4))
    thing = np.zeros(256, bool)
    thing[[number for number, label in index.items() if categories.is_thing[label]]] = True
    keys = red << 24
    keys += np.where(thing[red], green << 16 | blue << 8 | alpha, 0)
    kept, wrong = [], []
    for key in distinct(keys).tolist():
        number, flags = key >> 24, key >> 16 & 255
        if number and number not in index:
            wrong.append(number)
        elif number:
            label = index[number]
            kept.append(Kept(key, label, categories.is_thing[label] and bool(flags & _CROWD_OR_IGNORED)))
    if wrong:
        raise Fault(f"classes that BDD100K does not have (0 to 40): {counted(red, sorted(set(wrong)))}", UNPACK)
    return segmentation_of(keys, kept)
