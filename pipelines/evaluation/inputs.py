"""The images to predict, photographs or rows of shards, with their ids and the names of the files that are written.

An image id comes from
1. the dataset, for shards;
2. a JSON with COCO's `images` (as image_info_test-dev2017.json), where one is given; what it does not list is left out;
3. the file name, where every one is a number of its own: 000000000139.jpg is image 139;
4. else the place in the order of the names, from 1.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from pipelines.cluster import storage
from pipelines.cluster.file_names import free, shortened
from pipelines.cluster.json_file import read_json
from pipelines.data.manifest import Manifest
from pipelines.data.shard_index import list_images

logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif"),
    *(".heic", ".heif"),  # which cannot be read, and are named one by one with the remedy
)
"""Suffixes of the files that are taken for photographs."""

ENDINGS = (".png", ".jpg", "_labelIds.png", "_instanceIds.png")
"""Endings of the files that are written under a stem."""


@with_config(ConfigDict(strict=True))
class ListedImage(TypedDict):
    """An entry of COCO's `images`, as far as it is used."""

    id: Annotated[int, Field(ge=-(2**63), lt=2**63)] | str
    file_name: str


class ListedImages(TypedDict):
    """A JSON with COCO's `images`, as far as it is used."""

    images: list[ListedImage]


@dataclass(frozen=True)
class Image:
    """One image to predict."""

    uri: str
    """URI of its file; "" for a row of the shards."""
    stem: str
    """Path without suffix of the files that are written; no other image has it (see `stems`)."""
    image_id: int | str
    """Id in a COCO submission."""
    file_name: str
    """Path of its file below the folder or prefix, or its name in the dataset."""
    row: int = -1
    """Row of the shards; -1 for a photograph."""


def photographs(root: str, images_json: str = "") -> list[Image]:
    """Every photograph below a folder or S3 prefix (or the one file that `root` is), in order of their names.

    Args:
        images_json: a JSON with COCO's `images`, which gives the ids and says which photographs are wanted.

    Raises:
        ValueError: there is none, or the JSON cannot be read or lists none of them.
    """
    root = storage.absolute(root)
    if root.lower().endswith(SUFFIXES) and storage.exists(root):
        root, name = root.rsplit("/", 1)
        names = [name]
    else:
        if not storage.exists(root):
            raise ValueError(f"{root}: no such folder, prefix or file")
        every = storage.list_files(root)
        names = [name for name in every if name.lower().endswith(SUFFIXES)]
        if others := Counter(PurePosixPath(name).suffix.lower() or name for name in set(every) - set(names)):
            listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
            logger.info("%s: %d files are no photographs by their names: %s", root, others.total(), listed)
    if not names:
        raise ValueError(f"{root}: no photograph there; looked for {', '.join(SUFFIXES)}")
    ids = _listed_ids(names, images_json) if images_json else _own_ids(names)
    kept = [name for name in names if name in ids]
    return [
        Image(storage.join(root, name), stem, ids[name], name) for name, stem in zip(kept, stems(kept), strict=True)
    ]


def rows(manifest: Manifest) -> list[Image]:
    """Every image of the shards, under the ids of its dataset.

    Raises:
        ValueError: the index is not what its manifest says, or a file name of the dataset leads out of a folder.
    """
    listed = list_images(manifest.shard_set)
    images = [Image("", "", image_id, name, row) for row, (name, image_id) in enumerate(listed)]
    unique = stems([image.file_name for image in images])
    return [replace(image, stem=stem) for image, stem in zip(images, unique, strict=True)]


def stems(names: Sequence[str]) -> list[str]:
    """For each file name the path without suffix under which predictions are written; no two are equal.

    `a.jpg` is written as `a`; beside `a.png` the two are `a_jpg` and `a_png`, and where one of these is taken, too, a
    number follows. So are images whose files would have the names of folders of others. A name that is too long for a
    file is cut and ends in a hash. The answer depends on the names and their order alone.

    Raises:
        ValueError: a name is absolute or leads out of the folder it is joined to.
    """
    outside = [name for name in names if not _inside(name)]
    if outside:
        listed = ", ".join(map(repr, outside[:8]))
        raise ValueError(f"file names that lead out of the folder of the predictions: {listed}; rename these images")
    plain = [_without_suffix(name) for name in names]
    folders = {parent.as_posix() for stem in plain for parent in PurePosixPath(stem).parents}
    hidden = {folder.removesuffix(ending) for folder in folders for ending in ENDINGS if folder.endswith(ending)}
    times = Counter(plain)
    shared = {stem for stem, number in times.items() if number > 1 or stem in hidden}
    taken = (set(times) - shared) | hidden
    unique = []
    for name, stem in zip(names, plain, strict=True):
        if stem in shared:
            stem = free(f"{stem}_{PurePosixPath(name).suffix[1:]}", taken)
            taken.add(stem)
        unique.append(stem)
    if len(set(unique)) != len(names):
        raise RuntimeError("two images would be written under one name")
    return unique


def _without_suffix(name: str) -> str:
    """The path without suffix, its last part no longer than a file's name may be."""
    path = PurePosixPath(name)
    stem = path.name.removesuffix(path.suffix).strip(".") and path.name.removesuffix(path.suffix)
    return path.with_name(shortened(stem or path.name)).as_posix()  # `.` and `..` are no names


def _inside(name: str) -> bool:
    """True for a path that stays in the folder it is joined to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _own_ids(names: Sequence[str]) -> dict[str, int]:
    """The number that each name is, where all are different numbers; else their places from 1."""
    numbers = [PurePosixPath(name).stem for name in names]
    if all(number.isascii() and number.isdecimal() for number in numbers):
        ids = [int(number) for number in numbers]
        if len(set(ids)) == len(ids):
            return dict(zip(names, ids, strict=True))
    return {name: k for k, name in enumerate(names, 1)}


def _listed_ids(names: Sequence[str], file: str) -> dict[str, int | str]:
    """The id of each name that COCO's `images` lists; by path, else by the last part of it where that is unique."""
    listed = _images(file)
    last = Counter(PurePosixPath(name).name for name in names)
    ids = {}
    for name in names:
        alone = PurePosixPath(name).name
        if name in listed or (last[alone] == 1 and alone in listed):
            ids[name] = listed[name if name in listed else alone]
    if not ids:
        raise ValueError(f"{file}: lists none of the photographs, such as {names[0]}; is it of another set?")
    absent = sorted(set(listed.values()) - set(ids.values()), key=str)
    if absent:
        logger.warning("%s: %d of its images are not there, the ids %s among them", file, len(absent), absent[:5])
    if len(ids) < len(names):
        logger.info("%d of %d photographs are in %s; the others are left out", len(ids), len(names), file)
    return ids


def _images(file: str) -> dict[str, int | str]:
    """File name to id of COCO's `images`."""
    remedy = "it is no JSON with COCO's images, each with id and file_name; give another file"
    try:
        entries = read_json(file, ListedImages, remedy)["images"]
    except OSError as error:
        raise ValueError(f"--images-json {error}") from error
    listed = {entry["file_name"]: entry["id"] for entry in entries}
    if len(set(listed.values())) != len(entries):
        raise ValueError(f"{file}: an id or a file name appears more than once among its images")
    return listed
