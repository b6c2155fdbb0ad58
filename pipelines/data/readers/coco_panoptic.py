"""COCO-panoptic: one JSON, a folder of PNG id maps, a folder of images."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile

import pyarrow as pa

from panoptic.segmentation import Categories, shown
from pipelines.cluster import storage
from pipelines.data.readers.coco_json import Annotation, Content, Image, ImageId, parse
from pipelines.data.readers.source import COLUMNS, Problem, Source, Stamps


def coco_panoptic(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri | None = None,
    pngs: storage.Uri | None = None,
    images: storage.Uri | None = None,
) -> Source:
    """A COCO-panoptic dataset: one JSON, a folder of PNG id maps, a folder of images; local or on S3.

    Looked for below `root`, where `val` also serves a split called `val_novel`:
        annotations/panoptic_{split}.json, or panoptic_{split}.json;
        the folder beside it called panoptic_{split};
        images/{split}, {split} (as COCO ships it: train2017/ beside annotations/), or images.

    Args:
        root: the dataset's folder.
        split: e.g. "train", "train2017".
        json_file, pngs, images: where the dataset keeps them elsewhere.

    Raises:
        ValueError: a file or folder is missing (naming every place looked at), or the JSON cannot be read as
            COCO-panoptic. What is wrong with single images is in `Source.problems` instead.
    """
    root = storage.absolute(root)
    file = _first([json_file] if json_file else _json_places(root, split), "annotation file", "--data.json-file")
    with storage.open_file(file) as stream:
        content = parse(stream, file)
    repairs = content.repairs
    categories = Categories.from_coco(content.categories, file, repairs)
    png_folder = _first([pngs] if pngs else _png_places(file), "folder of PNG id maps", "--data.pngs")
    names = [image["file_name"] for image in content.images[:20]]
    image_folder = _images_folder([images] if images else _image_places(root, split), names)
    image_stamps, png_stamps = storage.list_stamps(image_folder), storage.list_stamps(png_folder)
    folders = _Folder(image_folder, image_stamps), _Folder(png_folder, png_stamps)
    rows, problems, annotated = _check(content, set(categories.ids), *folders)
    stamps: list = [(entry["file_name"], image_stamps[entry["file_name"]], png_stamps[png]) for entry, png, _ in rows]
    size = sum(image[0] + png[0] for _, image, png in stamps)
    if repairs:  # what an earlier version made of such values is not used again
        stamps.append(sorted(repairs.items()))
    content.digest.update(json.dumps(stamps).encode())
    return Source(
        reader="coco",
        root=root,
        split=split,
        categories=categories,
        rows=_table(rows, content, image_folder, png_folder, file),
        problems=tuple(problems),
        unannotated=tuple(entry["file_name"] for entry in content.images if entry["id"] not in annotated),
        bytes=size,
        fingerprint=content.digest.hexdigest(),
        repairs=repairs,
    )


def _prefixes(name: str) -> list[str]:
    """`val_novel` -> [`val_novel`, `val`]: a subset of a split keeps its files with the split's."""
    parts = name.split("_")
    return ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _json_places(root: str, split: str) -> list[str]:
    return [storage.join(root, "annotations", f"panoptic_{split}.json"), storage.join(root, f"panoptic_{split}.json")]


def _png_places(file: str) -> list[str]:
    folder, name = file.rsplit("/", 1)
    return [storage.join(folder, prefix) for prefix in _prefixes(name.removesuffix(".json")) if prefix != "panoptic"]


def _image_places(root: str, split: str) -> list[str]:
    prefixes = _prefixes(split)
    below = [storage.join(root, "images", prefix) for prefix in prefixes]
    return [*below, *(storage.join(root, prefix) for prefix in prefixes), storage.join(root, "images")]


def _first(places: Sequence[storage.Uri], what: str, option: str) -> str:
    """The first place that exists."""
    for place in places:
        if storage.exists(place):
            return storage.absolute(place)
    listed = "".join(f"\n  {place}" for place in places)
    raise ValueError(f"no {what}; looked for{listed}\nCheck the folder and the split, or name it with {option}.")


def _images_folder(places: Sequence[storage.Uri], names: Sequence[str]) -> str:
    """The first folder that holds one of the first images; failing that, the first that exists."""
    names = [name for name in names if "://" not in name and "\0" not in name]
    for place in places:
        if storage.exists(place) and any(storage.exists(storage.join(place, name)) for name in names):
            return storage.absolute(place)
    return _first(places, "folder of images", "--data.images")


class _Folder:
    """The files below a folder."""

    def __init__(self, uri: str, stamps: Stamps) -> None:
        self.uri = uri
        self._stamps = stamps

    def __contains__(self, name: str) -> bool:
        return name in self._stamps

    @cached_property
    def _by_name(self) -> list[tuple[str, str]]:
        """(name without folders, path) of each file, sorted."""
        return sorted((path.rsplit("/", 1)[-1], path) for path in self._stamps)

    def lacks(self, name: str) -> str:
        """The words that say that a file is missing, where it was looked for, and which file there is most like it."""
        if not self._stamps:
            return f"{name} was looked for in {self.uri}, which is empty"
        last = name.replace("\\", "/").rsplit("/", 1)[-1]
        # in this order, the neighbours of a name have the most first letters in common with it
        place = bisect_left(self._by_name, (last, ""))
        nearby = self._by_name[max(place - 1, 0) : place + 1]
        _, path = max(nearby, key=lambda file: _common_letters(file[0], last))
        return f"{name} was looked for in {self.uri}, which holds {path}"


def _common_letters(a: str, b: str) -> int:
    """The number of first letters in which two names agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


Row = tuple[Image, str, int]
"""Image entry, name of the PNG, position of the annotation."""


def _check(
    content: Content, known: set[int], images: _Folder, pngs: _Folder
) -> tuple[list[Row], list[Problem], set[ImageId]]:
    """The annotations sorted into good rows and problems, from the JSON and the lists of files alone.

    Returns:
        the rows, the problems, and the ids of all images that are annotated.
    """
    entries = {entry["id"]: entry for entry in content.images}
    repeated_ids = _repeated(entry["id"] for entry in content.images)
    repeated_names = _repeated(entry["file_name"] for entry in content.images)
    annotated: set[ImageId] = set()
    maps = set()
    rows, problems = [], []
    for position, annotation in enumerate(content.annotations):
        key = annotation["image_id"]
        entry = entries.get(key)
        name = entry["file_name"] if entry else annotation.get("file_name") or f"annotations[{position}]"
        png = annotation.get("file_name") or f"{name.rsplit('.', 1)[0]}.png"
        if not entry:
            reason = f"annotation of image id {shown(key)}, which images does not list; add the image, or drop it"
        elif key in repeated_ids:
            reason = f"image id {shown(key)} belongs to {repeated_ids[key]} images; ids must be unique"
        elif name in repeated_names:
            reason = f"file name appears {repeated_names[name]} times in images; names must be unique"
        elif key in annotated:
            reason = "image has a second annotation; keep one per image"
        elif png in maps:
            reason = f"PNG {png} already belongs to another image"
        elif name not in images:
            reason = f"image is missing: {images.lacks(name)} (partial download?)"
        elif png not in pngs:
            reason = f"id map {png} is missing: {pngs.lacks(png)} (partial download?)"
        else:
            reason = content.faults.get(position) or _unknown_categories(annotation, known)
        annotated.add(key)
        maps.add(png)
        if reason or not entry:
            problems.append(Problem(name, reason))
        else:
            rows.append((entry, png, position))
    return rows, problems, annotated


def _repeated(values: Iterable[int | str]) -> dict[int | str, int]:
    """The count of each value that occurs more than once."""
    return {value: count for value, count in Counter(values).items() if count > 1}


def _unknown_categories(annotation: Annotation, known: set[int]) -> str:
    """A reason if a segment's category is not the dataset's."""
    unknown = {str(s["category_id"]) for s in annotation["segments_info"] if s["category_id"] not in known}
    return f"category_id {', '.join(sorted(unknown))} is not in the JSON's categories; add it there" if unknown else ""


def _table(rows: Sequence[Row], content: Content, images: str, pngs: str, file: str) -> pa.Table:
    """The light rows, column by column."""
    ids = [entry["id"] for entry, _, _ in rows]
    if len({type(i) for i in ids}) > 1:
        raise ValueError(f"{file}: images[].id mixes numbers and text; use one of them throughout")
    columns = (
        pa.array([entry["file_name"] for entry, _, _ in rows], pa.string()),
        pa.array([storage.join(images, entry["file_name"]) for entry, _, _ in rows], pa.string()),
        pa.array([storage.join(pngs, png) for _, png, _ in rows], pa.string()),
        content.annotations.texts.take(pa.array([position for _, _, position in rows], pa.int64())).cast(pa.string()),
        pa.array([entry["height"] for entry, _, _ in rows], pa.int32()),
        pa.array([entry["width"] for entry, _, _ in rows], pa.int32()),
        pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64()),
    )
    return pa.table(list(columns), names=list(COLUMNS))
