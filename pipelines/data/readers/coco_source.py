"""The content of a COCO-panoptic JSON against the files that it names: light rows, problems, repairs.

Three formats share this form: COCO's own, the one that Cityscapes' scripts write, and Mapillary's.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import pyarrow as pa

from panoptic.classes import table
from panoptic.segmentation import VOID, Categories, count_repair, shown
from pipelines.cluster import storage
from pipelines.data.readers.archive import Stream, read_file, readable
from pipelines.data.readers.category_list import checked_categories
from pipelines.data.readers.coco_json import Annotation, Content, Image, ImageId, parse
from pipelines.data.readers.faults import FETCH
from pipelines.data.readers.id_map import stands_in_bgr
from pipelines.data.readers.source import COLUMNS, Decode, Orientation, Problem, Source, decode_coco
from pipelines.data.readers.tree import Folder

logger = logging.getLogger(__name__)

RENAMED = "images.file_name read by the name of a file that is there"
RESPELT_IDS = "annotations.image_id given as text where images.id is a number, or the other way round"
"""Kinds of repairs, as the manifest counts them."""


WRAPPED = 1 << 16
"""Zips count their files in 16 bits, and some unpackers stop at that count."""


UNKNOWN_CATEGORY = "add it to categories, or take its segments out and make their pixels void (id 0) in the map"
"""Remedy for a segment of a category that the JSON does not list."""

PROBED = 8
"""Maps that are looked at, at most, to tell in which order their channels stand."""


def read_json(address: str, optional: Collection[str] = ()) -> Content:
    """The content of a COCO-panoptic JSON at an address, in which the lists of `optional` may be missing.

    Raises:
        ValueError: it cannot be read as such; begins with its name.
    """
    return parse(Stream(address), readable(address), optional)


def categories_of(content: Content, file: str, things: Collection[str] = (), background: str = "") -> Categories:
    """The classes of a JSON.

    Args:
        content: of the JSON; its repairs are added to.
        file: its name, for messages.
        things: the names of the classes that are things, in place of what the JSON says of them.
        background: the name of a class that is kept although it is called background.

    Raises:
        ValueError: the list cannot be read, or does not say which classes are things and nobody else does.
    """
    entries = checked_categories(content.categories, file, lambda: _uses(content), content.repairs, background)
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        names = [str(entry.get("name")) for entry in entries]
        if unknown := [name for name in things if name not in names]:
            raise ValueError(f"--data.things {', '.join(unknown)}: {file} has no such class; it has {', '.join(names)}")
        if things:
            entries = [{**entry, "isthing": int(entry.get("name") in things)} for entry in entries]
        elif entries and not any("isthing" in entry for entry in entries):
            raise ValueError(
                f"{file}: categories do not say which classes are things (isthing); name them with --data.things, of "
                f"{', '.join(names)}"
            )
    categories = Categories.from_coco(entries, file, content.repairs)
    if not any(categories.is_thing):  # as one tool writes it for every data set
        logger.warning("%s: no class is a thing; where some are, name them with --data.things", file)
    return categories


def _uses(content: Content) -> Counter[int]:
    """The number of segments of each category id."""
    infos = (info for annotation in content.annotations for info in annotation.get("segments_info") or ())
    return Counter(info.get("category_id") for info in infos if isinstance(info, dict) and info.get("id") != VOID)


def public_set(categories: Categories) -> str:
    """The name of the public data set whose classes these are (see `tables`), "" where they are of none."""
    own = set(zip(categories.ids, categories.names, strict=True))
    sets = {name: {(entry["id"], entry["name"]) for entry in table(name)["categories"]} for name in ("coco", "ade20k")}
    return next((name for name, classes in sets.items() if classes == own), "")


class Row(NamedTuple):
    """One image, as far as it is known without opening a file."""

    name: str
    """Path of the photograph in its folder."""
    png: str
    entry: Image
    position: int
    """Place of the annotation among all annotations of the file."""


def coco_source(
    content: Content,
    file: str,
    images: Folder,
    pngs: Folder,
    categories: Categories,
    *,
    reader: str,
    root: str,
    split: str,
    orientation: Orientation,
    decode: Decode = decode_coco,
    known: Collection[int] | None = None,
    image_of: Callable[[Image], str | None] | None = None,
    png_of: Callable[[Annotation], str | None] | None = None,
) -> Source:
    """The source that a COCO-panoptic JSON and two folders make.

    Args:
        content: of the JSON.
        file: its name, for messages.
        images, pngs: the folders of photographs and of id maps.
        categories: the classes of the source.
        reader, root, split, orientation, decode: of the source.
        known: the ids of categories that the file uses, where those of `categories` are others.
        image_of, png_of: the file of an image entry and of an annotation; by default the one that `file_name` means.

    Raises:
        ValueError: the JSON as a whole does not fit the folders.
    """
    _match_ids(content, file)
    check = _Check(content, images, pngs, set(categories.ids if known is None else known), image_of, png_of)
    rows = check.rows
    found = len(content.annotations) - check.missing_maps
    if check.missing_maps and not check.missing_maps % WRAPPED:
        raise ValueError(
            f"{found} of {len(content.annotations)} id maps found in {pngs.uri}; this is what is left when an unpacker "
            "stops at the zip's 16-bit count: unpack the zip again with unzip, or give the zip itself"
        )
    if not rows and len(check.unknown) == 1 and check.unknown.total() == len(check.problems):
        number = check.unknown.popitem()[0]
        first = min(categories.ids if known is None else known)
        hint = f" (ids of categories begin at {first})" if number < first else ""
        raise ValueError(
            f"{file}: each annotation has segments of category {number}, which categories does not list{hint}; "
            f"{UNKNOWN_CATEGORY}"
        )
    repairs = content.repairs
    if check.renamed:
        count_repair(repairs, RENAMED, check.renamed)
    stamps: list = [(row.name, images.stamps[row.name], pngs.stamps[row.png]) for row in rows]
    if repairs:  # what an earlier version made of such values is not used again
        stamps.append(sorted(repairs.items()))
    content.digest.update(json.dumps(stamps).encode())
    unannotated = (entry["file_name"] for entry in content.images if entry["id"] not in check.annotated)
    light = _table(rows, content, images, pngs, file)
    if _in_bgr(light):
        decode = partial(decode, bgr=True)  # pyright: ignore[reportCallIssue]  # it is `decode_coco`, or a part of it
    return Source(
        reader=reader,
        root=root,
        split=split,
        categories=categories,
        rows=light,
        problems=tuple(check.problems),
        unannotated=tuple(unannotated),
        bytes=sum(images.stamps[row.name][0] + pngs.stamps[row.png][0] for row in rows),
        fingerprint=content.digest.hexdigest(),
        repairs=repairs,
        decode=decode,
        orientation=orientation,
    )


def _in_bgr(rows: pa.Table) -> bool:
    """True if the first map that shows its order has red and blue exchanged, as then all maps must have."""
    found = None
    for row in rows.slice(0, PROBED).select(["png", "record"]).to_pylist():
        try:
            found = stands_in_bgr(read_file(row["png"]), json.loads(row["record"]))
        except storage.Unavailable:
            raise
        except (ValueError, OSError):  # it is reported when all are read
            continue
        if found is not None:
            break
    return bool(found)


def _match_ids(content: Content, file: str) -> None:
    """Give images the ids by which annotations know them where one writes as text what the other writes as number.

    Raises:
        ValueError: annotations know none of the images, or two ids are the same as text.
    """
    own = {entry["id"] for entry in content.images}
    used = {annotation["image_id"] for annotation in content.annotations}
    if not used or not own or own & used:
        return
    spelt = {str(key): key for key in used}
    if len({str(key) for key in own}) == len(own) and len(spelt) == len(used) and spelt.keys() & map(str, own):
        for entry in content.images:
            entry["id"] = spelt.get(str(entry["id"]), entry["id"])
        count_repair(content.repairs, RESPELT_IDS, len(used))
        return
    raise ValueError(
        f"{file}: no annotation belongs to an image: images[0].id is {shown(content.images[0]['id'])}, "
        f"annotations[0].image_id is {shown(next(iter(content.annotations))['image_id'])}; are the two lists of the "
        "same data set?"
    )


class _Check:
    """The annotations sorted into good rows and problems, from the JSON and the lists of files alone."""

    def __init__(
        self,
        content: Content,
        images: Folder,
        pngs: Folder,
        known: set[int],
        image_of: Callable[[Image], str | None] | None,
        png_of: Callable[[Annotation], str | None] | None,
    ) -> None:
        self.rows: list[Row] = []
        self.problems: list[Problem] = []
        self.annotated: set[ImageId] = set()
        self.missing_maps = self.renamed = 0
        self.unknown: Counter[int] = Counter()
        """Images that have segments of a category which is not listed, by category."""
        entries = {entry["id"]: entry for entry in content.images}
        repeated_ids = _repeated(content.images, "id", "file_name")
        repeated_names = _repeated(content.images, "file_name", "id")
        rows: dict[ImageId, Row] = {}
        taken: dict[str, str] = {}
        maps = set()
        for position, annotation in enumerate(content.annotations):
            key = annotation["image_id"]
            entry = entries.get(key)
            name = entry["file_name"] if entry else annotation.get("file_name") or f"annotations[{position}]"
            png = annotation.get("file_name") or f"{name.rsplit('.', 1)[0]}.png"
            photograph = (image_of(entry) if image_of else images.match(name)) if entry else None
            id_map = png_of(annotation) if png_of else pngs.match(png)
            self.missing_maps += id_map is None
            if not entry:
                reason = f"annotation of image id {shown(key)}, which images does not list"
                remedy = "add the image to images, or take its annotation out"
            elif key in repeated_ids:
                reason = f"image id {shown(key)} appears {repeated_ids[key]} in images"
                remedy = (
                    "give each image an id of its own, which its annotation has too; join sets with --data.root A B"
                )
            elif name in repeated_names:
                reason = f"file name appears {repeated_names[name]} in images"
                remedy = "keep one entry of each photograph; join sets with --data.root A B"
            elif key in self.annotated:
                rows.pop(key, None)
                reason = "image has a second annotation, and how the two would be merged is not defined"
                remedy = "keep one annotation of each image"
            elif png in maps:
                reason = f"PNG {png} already belongs to another image"
                remedy = "correct the file_name of one of the two annotations"
            elif photograph is None:
                reason, remedy = f"image is missing: {images.lacks(name)} (partial download?)", FETCH
            elif id_map is None:
                reason, remedy = f"id map {png} is missing: {pngs.lacks(png)} (partial download?)", FETCH
            elif photograph in taken:
                reason = f"the file {photograph} is that of {taken[photograph]}, too"
                remedy = "correct images[].file_name of one of them"
            elif position in content.faults:
                reason, remedy = content.faults[position], "correct the value in the JSON"
            else:
                unknown = {s["category_id"] for s in annotation["segments_info"] if s["id"] != VOID} - known
                self.unknown.update(unknown)
                listed = ", ".join(map(str, sorted(unknown)))
                reason = f"category_id {listed} is not in the JSON's categories" if unknown else ""
                remedy = UNKNOWN_CATEGORY
            self.annotated.add(key)
            maps.add(png)
            if reason or photograph is None or id_map is None or not entry:
                self.problems.append(Problem(name, reason, remedy))
            else:
                taken[photograph] = name
                rows[key] = Row(photograph, id_map, entry, position)
        self.rows = list(rows.values())
        self.renamed = sum(image_of is None and row.name != row.entry["file_name"] for row in self.rows)


def _repeated(images: Iterable[Image], key: Literal["id", "file_name"], other: Literal["id", "file_name"]) -> dict:
    """The values of a field that several images have, with the other field of these images, for messages."""
    counts = Counter(entry[key] for entry in images)
    owners: dict[int | str, list[str]] = {value: [] for value, count in counts.items() if count > 1}
    for entry in images if owners else ():
        if entry[key] in owners:
            owners[entry[key]].append(shown(entry[other]))
    return {value: f"{len(of)} times ({', '.join(of[:3])})" for value, of in owners.items()}


def _table(rows: Sequence[Row], content: Content, images: Folder, pngs: Folder, file: str) -> pa.Table:
    """The light rows, column by column."""
    ids = [row.entry["id"] for row in rows]
    if len({type(i) for i in ids}) > 1:
        raise ValueError(f"{file}: images[].id mixes numbers and text; use one of them throughout")
    records = content.annotations.texts.take(pa.array([row.position for row in rows], pa.int64())).cast(pa.string())
    columns = (
        pa.array([row.name for row in rows], pa.string()),
        pa.array([images.address(row.name) for row in rows], pa.string()),
        pa.array([pngs.address(row.png) for row in rows], pa.string()),
        records,
        pa.array([row.entry.get("height") for row in rows], pa.int32()),
        pa.array([row.entry.get("width") for row in rows], pa.int32()),
        pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64()),
    )
    return pa.table(list(columns), names=list(COLUMNS))
