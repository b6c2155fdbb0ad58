"""Mapillary Vistas 1.2 and 2.0 as its owner ships it, unpacked or in its zip.

The panoptic JSON and its PNGs are read where they are there, else the 16-bit instance maps, whose values are 256 times
the position of a class in `config.json` and a number. The latter have no crowds.

Trees: `{training,validation}/{images,instances,labels,panoptic}` with `config.json` (1.x), or `.../v1.2/...` and
`.../v2.0/...` with `config_v1.2.json` and `config_v2.0.json`. Source: mapillary/mapillary_vistas, demo.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from panoptic.png import decode_labels
from panoptic.segmentation import Categories, Segmentation, distinct
from pipelines.cluster import storage
from pipelines.data.config import Orientation
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_source import categories_of, coco_source, read_json
from pipelines.data.readers.faults import UNPACK, Fault, placed
from pipelines.data.readers.rows import Kept, by_key, counted, label_files, segmentation_of, stem
from pipelines.data.readers.source import Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

Version = Literal["1.2", "2.0"]

logger = logging.getLogger(__name__)

_CLASSES: dict[Version, tuple[int, int]] = {"1.2": (66, 65), "2.0": (124, 116)}
"""Number of labels in the config and of evaluated classes of each version."""

SPLITS = {"train": "training", "val": "validation", "test": "testing"}
"""The names that people give to its splits."""


def mapillary(
    root: storage.Uri,
    split: str,
    *,
    version: Literal["auto", "1.2", "2.0"] = "auto",
    labels: Literal["auto", "panoptic", "instances"] = "auto",
    images: storage.Uri = "",
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A split of Mapillary Vistas.

    Args:
        root: its folder or its zip.
        split: training or validation; train and val are understood.
        version: of the annotations; it must be named where a download holds two, and be the one that is there.
        labels: read the panoptic JSON or the 16-bit instance maps; by default the JSON where it is there.
        images: the folder of the split's photographs, where it is elsewhere.
        exif: the frame of the maps; by default the stored pixels.

    Raises:
        ValueError: a folder or file is missing, or holds another version than `version`; names what is there.
    """
    tree = Tree(root)
    split = SPLITS.get(split, split)
    base, found = _versions(tree, split)
    if not found:
        photographs = tree.find([f"{split}/images"], tree.is_folder)
        if photographs:
            raise ValueError(
                f"split {split} has no labels: {tree.readable(photographs[0])} holds photographs alone; train on "
                "training, evaluate on validation, and give that folder to jobs/predict.py"
            )
        raise ValueError(
            f"{tree.root}: no Mapillary Vistas; looked for {split}/panoptic, {split}/instances, {split}/v1.2 and "
            f"{split}/v2.0, in folders, zips, and up to three folders further down"
        )
    if version == "auto" and len(found) > 1:
        raise ValueError(
            f"{tree.root} holds the annotations of versions {' and '.join(found)}; name one: --data.version"
        )
    version = next(iter(found)) if version == "auto" else version
    if version not in found:
        raise ValueError(f"--data.version {version}: {tree.root} holds version {' and '.join(found)}; name that one")
    folder = found[version]
    if images:
        photographs = Folder(*given(tree, images, "--data.images"))
    else:
        photographs = Folder(tree, tree.one([f"{split}/images"], "folder of images", "--data.images", tree.is_folder))
    jsons = [name for name in tree.names(f"{folder}/panoptic") if name.endswith(".json")]
    if len(jsons) > 1:
        raise ValueError(f"{tree.readable(f'{folder}/panoptic')} holds {', '.join(jsons)}; keep one of them")
    frame: Orientation = "stored" if exif == "auto" else exif
    if labels != "instances" and jsons:
        return _from_json(tree, split, version, f"{folder}/panoptic", jsons[0], photographs, frame)
    if labels == "panoptic":
        raise ValueError(
            f"{tree.readable(f'{folder}/panoptic')}: no panoptic JSON (panoptic_2018.json, panoptic_2020.json)"
        )
    return _from_instances(tree, split, version, base, folder, photographs, frame)


def _versions(tree: Tree, split: str) -> tuple[str, dict[Version, str]]:
    """The folder above the split, and the folder of labels of each version that is there."""
    parts = ("panoptic", "instances")
    for below, version in ((f"{split}/v1.2", "1.2"), (f"{split}/v2.0", "2.0"), (split, "")):
        hits = tree.find([f"{below}/{part}" for part in parts], tree.is_folder)
        above = {hit.rpartition("/")[0].removesuffix(below).rstrip("/") for hit in hits}
        if len(above) > 1:
            raise ValueError(
                f"{len(above)} places hold Mapillary Vistas: {', '.join(map(tree.readable, sorted(above)))}; give one "
                "of them as --data.root"
            )
        if not hits:
            continue
        base = above.pop()
        if not version:
            folder = hits[0].rpartition("/")[0]
            flat: dict[Version, str] = {_flat_version(tree, base, folder): folder}
            return base, flat
        folders: dict[Version, str] = {v: f"{base}/{split}/v{v}".lstrip("/") for v in _CLASSES}
        return base, {v: f for v, f in folders.items() if any(tree.is_folder(f"{f}/{part}") for part in parts)}
    return "", {}


def _flat_version(tree: Tree, base: str, folder: str) -> Version:
    """The version of annotations that lie right in their split's folder: by the config, else by the JSON's name."""
    path = _config_path(tree, base, "")
    if path:
        return _version_of(_labels(tree, path), tree.readable(path))
    return "2.0" if tree.is_file(f"{folder}/panoptic/panoptic_2020.json") else "1.2"


def _config_path(tree: Tree, base: str, version: str) -> str | None:
    """The config of a version: beside the splits, or in another of several zips."""
    names = [f"config_v{version}.json", "config.json"] if version else ["config.json"]
    for name in names:
        if tree.is_file(path := f"{base}/{name}".lstrip("/")):
            return path
    hits = tree.find(names, tree.is_file)
    return hits[0] if len(hits) == 1 else None


class Label(NamedTuple):
    """One entry of the config."""

    readable: str
    instances: bool
    evaluate: bool
    colour: tuple[int, int, int]


def _labels(tree: Tree, path: str) -> list[Label]:
    file = tree.readable(path)
    try:
        entries = json.loads(tree.read(path))["labels"]
        labels = [Label(e["readable"], bool(e["instances"]), bool(e["evaluate"]), (*e["color"],)) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: no config of Mapillary Vistas ({type(error).__name__}: {error}); its labels each need readable, "
            "instances, evaluate and color"
        ) from error
    return labels


def _version_of(labels: list[Label], file: str) -> Version:
    """The version that has as many labels."""
    for version, (count, _) in _CLASSES.items():
        if len(labels) == count:
            return version
    counts = " and ".join(f"{count} in version {version}" for version, (count, _) in _CLASSES.items())
    raise ValueError(f"{file}: has {len(labels)} labels; there are {counts}")


def _from_json(
    tree: Tree, split: str, version: Version, folder: str, name: str, images: Folder, orientation: Orientation
) -> Source:
    path = f"{folder}/{name}"
    file = tree.readable(path)
    content = read_json(tree.address(path))
    categories = categories_of(content, file)
    others = [other for other, (_, count) in _CLASSES.items() if other != version and count == len(categories)]
    if others:
        raise ValueError(
            f"{file}: has {len(categories)} categories, which are those of version {others[0]}, and version {version} "
            f"has {_CLASSES[version][1]}; name the version that it is with --data.version"
        )
    if len(categories) != _CLASSES[version][1]:  # the JSON counts, whatever it makes of groups
        logger.warning(
            "%s: has %d categories, where the config of version %s evaluates %d; they are read as they are",
            *(file, len(categories), version, _CLASSES[version][1]),
        )
    return coco_source(
        content,
        file,
        images,
        Folder(tree, folder),
        categories,
        reader="mapillary",
        root=tree.root,
        split=split,
        orientation=orientation,
    )


def _from_instances(
    tree: Tree, split: str, version: Version, base: str, folder: str, images: Folder, orientation: Orientation
) -> Source:
    path = _config_path(tree, base, version)
    if path is None:
        raise ValueError(
            f"{tree.root}: no config_v{version}.json and no config.json, which say what the values of "
            f"{tree.readable(f'{folder}/instances')} mean; both come in the zip of the data set"
        )
    labels = _labels(tree, path)
    if _version_of(labels, tree.readable(path)) != version:
        raise ValueError(
            f"{tree.readable(path)}: has {len(labels)} labels, and version {version} has {_CLASSES[version][0]}; name "
            "the version that it is with --data.version"
        )
    evaluated = [(position, label) for position, label in enumerate(labels) if label.evaluate]
    categories = Categories(
        names=tuple(label.readable for _, label in evaluated),
        is_thing=tuple(label.instances for _, label in evaluated),
        ids=tuple(position + 1 for position, _ in evaluated),
        colours=tuple(label.colour for _, label in evaluated),
    )
    maps = Folder(tree, f"{folder}/instances")
    photographs = by_key(images, lambda path: stem(path, (".jpg", ".jpeg", ".png")))
    return label_files(
        "mapillary",
        tree.root,
        split,
        categories,
        (images, photographs),
        (maps, by_key(maps, lambda path: stem(path, (".png",)))),
        decode=partial(decode_instances, count=len(labels)),
        orientation=orientation,
        extra=tree.read(path).decode(),
    )


def decode_instances(row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories, count: int) -> Truth:
    """The truth of a row whose `png` is a 16-bit instance map.

    Args:
        row, read, categories: see `Decode`.
        count: labels of the config.

    Raises:
        ValueError: the map is no such; begins with the name of the image.
    """
    png = read(row["png"])
    try:
        if png[24:25] != b"\x10":
            raise Fault("its bits are not 16; the 8-bit maps in labels/ hold no instances", UNPACK)
        return Truth(from_instance_map(decode_labels(png), categories, count))
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error


def from_instance_map(values: np.ndarray, categories: Categories, count: int) -> Segmentation:
    """The map that 16-bit values mean: 256 times the label and a number.

    Args:
        values: int [H, W].
        categories: the evaluated classes, whose ids are their positions in the config plus one.
        count: labels of the config.

    Raises:
        ValueError: a value is of no label.
    """
    index = {number - 1: label for label, number in enumerate(categories.ids)}
    present = distinct(values)
    wrong = present[present // 256 >= count].tolist()
    if wrong:
        raise Fault(
            f"values of no label (256 times one of 0 to {count - 1}, and a number): {counted(values, wrong)}; is the "
            "config of the same version?",
            "put the config of the maps' version beside them, or unpack the data set again",
        )
    table = np.arange(1 << 16)
    kept: dict[int, Kept] = {}
    for value in present.tolist():
        label = index.get(value // 256)
        if label is None:
            continue
        if not categories.is_thing[label]:  # one segment, whatever the number
            table[value] = value // 256 * 256
        kept[int(table[value])] = Kept(int(table[value]), label)
    return segmentation_of(table[values], list(kept.values()))
