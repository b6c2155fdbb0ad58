"""Instances in COCO's JSON form, alone or over a semantic PNG an image: COCO, LVIS, and what labelling tools export.

Instances overlap, and a panoptic map has one segment a pixel. Crowds are painted first, under everything. Of the other
instances the one with fewer pixels lies on top (`overlap`); of equal ones the later in the file. The pixels that
several cover are counted. What no instance covers is void, unless a semantic PNG or `background` says more.

Form: cocodataset.org, format of data; masks as pycocotools fills and decodes them (panoptic/rle.py).

Shapes: H x W pixels, N instances of an image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic_core

from panoptic import rle
from panoptic.classes import table
from panoptic.png import decode_labels, image_size
from panoptic.segmentation import Categories, Segmentation, count_respelt, distinct, shown, whole_number
from pipelines.cluster import storage
from pipelines.data.config import Crowd, Orientation, Overlap, Uncovered
from pipelines.data.readers.archive import Stream, read_file, readable
from pipelines.data.readers.category_list import checked_categories
from pipelines.data.readers.exif import exif_orientation
from pipelines.data.readers.faults import DRAW, FETCH, Fault, placed
from pipelines.data.readers.json_stream import NotAnObject, NotJson, chunks, members
from pipelines.data.readers.places import holding, image_places, tree_and_file
from pipelines.data.readers.rows import Row, counted, fingerprint_of, table_of
from pipelines.data.readers.source import SWAPPED, Problem, Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

logger = logging.getLogger(__name__)


CONTESTED = "pixels that several instances cover"
COVERED = "instances that others cover wholly, left out"
BAD_POLYGONS = "polygons of less than three points, or of an odd number of coordinates, left out"
WITHOUT_PIXEL = "instances whose mask holds no pixel, left out"
OUTSIDE = "polygons that reach beyond the image, cut at its border"
FLAT = "polygons given as one flat list"
OTHER_BOX = "RLE masks that lie outside of their bbox: are their runs row by row?"
UNCOVERED = "pixels of a thing class in the semantic map under no instance"
"""Kinds of repairs and counts, as the manifest adds them up."""

MaskOf = Callable[[Any, tuple[int, int], Counter], "dict | None"]
"""From a segmentation as a tool writes it, the (H, W) of its image and the counts to its RLE, None where it has no
pixel."""

_REACH = 1 << 16
"""Coordinates further out are no pixels of any image, and would take the rasteriser's memory."""


def coco_instances(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    images: storage.Uri = "",
    overlap: Overlap = "smaller-wins",
    crowd: Crowd = "trust",
    semantic: storage.Uri = "",
    semantic_classes: storage.Uri = "",
    uncovered: Uncovered = "void",
    background: str = "",
    things: Sequence[str] = (),
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A data set of COCO-style instances.

    Looked for below `root`, in folders and zips up to three further down: annotations/instances_{split}.json,
    lvis_v1_{split}.json, {split}/_annotations.coco.json, instances_default.json, labels.json, and the like.

    Args:
        root: the data set's folder, a zip, or its JSON.
        split: e.g. val2017.
        json_file, images: where the dataset keeps them elsewhere.
        overlap: the instance that has a pixel which several cover. "smaller-wins": the one with fewer pixels, of equal
            ones the later; "later-wins" and "earlier-wins": by the order of the file; "void": none of them; "error":
            an image in which instances overlap is a problem.
        crowd: trust iscrowd, or ignore it where a tool sets it on single objects.
        semantic: folder of a semantic PNG for each image, of the same name.
        semantic_classes: a key of `VALUES`, or a JSON that says what its values mean: {"void": [255], "classes":
            [{"value", "id", "name", "isthing"}, …]}.
        uncovered: pixels of a thing class in the semantic PNG under no instance are void, or a crowd of the class.
        background: name of a stuff class for all that is not covered, where there is no semantic PNG.
        things: names of the classes that are things, where not all are and the JSON does not say it.
        exif: the frame of the masks where sizes do not tell it; by default the upright image.

    Raises:
        ValueError: a file or folder is missing, the JSON is no such, or options contradict each other.
    """
    tree, json_file = tree_and_file(root, json_file)
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        at, path = tree, tree.one(instance_files(split), "annotation file", "--data.json-file", tree.is_file)
    file = readable(at.address(path))
    content = parse(Stream(at.address(path)), file)
    if content.federated and background:
        raise ValueError(
            f"--data.background {background}: {file} is federated (neg_category_ids): what it does not annotate may be "
            "of any class, and stays void"
        )
    values = _read_values(semantic, semantic_classes, tree)
    if values and background:
        raise ValueError("--data.background and --data.semantic exclude each other: the PNG says what lies there")
    categories = instance_categories(content, file, values, background, things)
    beside = path.rpartition("/")[0]
    if images:
        folder = Folder(*given(tree, images, "--data.images"))
    elif content.federated:  # names are those of the folders of COCO: train2017/000000155379.jpg
        names = [image.name for image in content.images[:20]]
        folder = Folder(tree, holding(tree, ["", "images"], [beside], names, "folder of images", "--data.images"))
    else:
        names = [image.name for image in content.images[:20]]
        places = [*image_places(split), "data"]
        folder = Folder(tree, holding(tree, places, [beside], names, "folder of images", "--data.images"))
    maps = Folder(*given(tree, semantic, "--data.semantic")) if semantic else None
    return instance_source(
        content,
        file,
        tree,
        split,
        categories,
        folder,
        maps,
        values,
        overlap=overlap,
        crowd=crowd,
        uncovered=uncovered,
        background=background,
        exif=exif,
    )


def instance_files(split: str) -> list[str]:
    """Usual paths of the instance JSON of a split, relative to the data set."""
    names = [f"instances_{split}.json", f"lvis_v1_{split}.json", "instances_default.json"]
    below = [f"annotations/{name}" for name in names]
    beside = ["labels.json", "instances.json", "result.json"]  # FiftyOne's, and Label Studio's export as COCO
    return [*below, *names, f"{split}/_annotations.coco.json", f"{split}/labels.json", *beside]


class ImageEntry(NamedTuple):
    """One entry of `images`."""

    id: int | str
    name: str
    height: int | None
    width: int | None


@dataclass
class Content:
    """The JSON, an image at a time."""

    images: list[ImageEntry] = field(default_factory=list)
    annotations: dict[int | str, list[bytes]] = field(default_factory=dict)
    """JSON text of each annotation of an image id, in the order of the file."""
    categories: list = field(default_factory=list)
    used: Counter = field(default_factory=Counter)
    """Annotations of each category id."""
    masks: Counter = field(default_factory=Counter)
    """Annotations of each kind: ("polygon" or "rle" or "none", crowd)."""
    by_cvat: bool = False
    federated: bool = False
    faults: dict[int | str, Fault] = field(default_factory=dict)
    """Images whose annotations cannot be used as a whole."""
    unannotated: list[str] = field(default_factory=list)
    """Names of images that are listed without having been annotated, and are left out."""
    repairs: dict[str, int] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)


_FIELDS = ("id", "category_id", "iscrowd", "ignore", "segmentation", "bbox")


def parse(stream: Any, file: str) -> Content:
    """The content of an instance JSON, read in pieces.

    Args:
        stream: the open file.
        file: its name, for messages.

    Raises:
        ValueError: it is not JSON, not of this form, or all its annotations are boxes without a mask.
    """
    content = Content()
    keys = set()
    try:
        for key, text, position in members(chunks(stream, content.digest.update), ("images", "annotations")):
            keys.add(key)
            if key not in ("images", "annotations", "categories", "info"):
                continue
            entries = pydantic_core.from_json(text)
            if key == "info":
                content.by_cvat |= isinstance(entries, dict) and "cvat" in str(entries.get("contributor", "")).lower()
            elif key == "categories":
                content.categories = entries
            elif position is None or not isinstance(entries, list):
                raise ValueError(f"{file}: {key} is {shown(entries)}; it must be a list")
            elif key == "images":
                content.images += [_image(entry, f"{file}: images[{k}]") for k, entry in enumerate(entries, position)]
                content.federated |= any("neg_category_ids" in entry for entry in entries)
            else:
                for k, entry in enumerate(entries, position):
                    _annotation(content, entry, f"{file}: annotations[{k}]")
    except NotAnObject as error:
        raise ValueError(f"{file}: holds {error}; an instance JSON has images, annotations and categories") from error
    except (NotJson, pydantic_core.PydanticSerializationError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); is the download complete?") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in keys]
    if missing:
        raise ValueError(
            f"{file}: has no {', '.join(missing)}; an instance JSON needs images, annotations and categories"
        )
    kinds = {kind for kind, _ in content.masks}
    if kinds == {"none"}:
        raise ValueError(
            f"{file}: its annotations are boxes without a mask; a box is never filled, so no map can be made"
        )
    return content


def _image(entry: Any, place: str) -> ImageEntry:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), int | str):
        raise ValueError(f"{place} is {shown(entry)}; each image has an id, a file_name, height and width")
    name = entry.get("file_name")
    if not name and isinstance(entry.get("coco_url"), str):  # LVIS has no other name
        name = "/".join(entry["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}.file_name is {shown(name)}; it must be the path of the file in its folder")
    sizes = [value if isinstance(value := entry.get(key), int) and value > 0 else None for key in ("height", "width")]
    return ImageEntry(entry["id"], name, *sizes)


def _annotation(content: Content, entry: Any, place: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
        raise ValueError(
            f"{place} is {shown(entry)}; each annotation has an image_id, a category_id and a segmentation"
        )
    if "segments_info" in entry:
        raise ValueError(f"{place.split(':')[0]}: this is the panoptic form (segments_info); use --data.reader coco")
    number = entry.get("category_id")
    if type(number) is not int:
        try:
            entry["category_id"] = whole_number(number)
        except ValueError as error:
            reason = f"{place}.category_id is {shown(number)}; it must be the id of a category, a whole number"
            raise ValueError(reason) from error
        count_respelt(content.repairs, "annotations.category_id", number)
        number = entry["category_id"]
    mask = entry.get("segmentation")
    kind = "rle" if isinstance(mask, dict) else "polygon" if isinstance(mask, list) and mask else "none"
    content.masks[kind, bool(entry.get("iscrowd"))] += 1
    content.used[number] += 1
    attributes = entry.get("attributes")
    content.by_cvat |= isinstance(attributes, dict) and "occluded" in attributes
    text = pydantic_core.to_json({key: entry[key] for key in _FIELDS if key in entry})
    content.annotations.setdefault(entry["image_id"], []).append(text)


class Values(NamedTuple):
    """The meaning of the values of a semantic PNG."""

    classes: list[dict]
    void: frozenset[int]


def _cocostuff() -> Values:
    """COCO-Stuff's `stuffthingmaps`: label - 1, 255 unlabelled (nightrome/cocostuff, README)."""
    return Values([{**entry, "value": entry["id"] - 1} for entry in table("cocostuff")["categories"]], frozenset([255]))


def _cocostuff_challenge() -> Values:
    """The maps of the stuff challenge: labels 92 to 182, 183 all things, 0 unlabelled (stuff evaluation of COCO)."""
    stuff = [entry for entry in table("cocostuff")["categories"] if not entry["isthing"]]
    return Values([{**entry, "value": entry["id"]} for entry in stuff], frozenset([0, 183]))


def _panoptic_stuff() -> Values:
    """detectron2's `panoptic_stuff_*`: 1 to 53 the stuff of COCO panoptic in its order, 0 all things, 255 void."""
    stuff = [entry for entry in table("coco")["categories"] if not entry["isthing"]]
    return Values([{**entry, "value": value} for value, entry in enumerate(stuff, 1)], frozenset([0, 255]))


VALUES: dict[str, Callable[[], Values]] = {
    "cocostuff": _cocostuff,
    "cocostuff-challenge": _cocostuff_challenge,
    "panoptic-stuff": _panoptic_stuff,
}
"""Meanings of the values of public semantic PNGs, which the files do not say: named in place of a JSON."""


def _read_values(semantic: storage.Uri, file: storage.Uri, tree: Tree) -> Values | None:
    """The JSON of `--data.semantic-classes`, or one of `VALUES`.

    Raises:
        ValueError: only one of the two is given, or the file is no such.
    """
    if bool(semantic) != bool(file):
        raise ValueError(
            "--data.semantic and --data.semantic-classes belong together: the PNGs, and what their values mean"
        )
    if not file:
        return None
    if str(file) in VALUES:
        return VALUES[str(file)]()
    at, path = given(tree, file, "--data.semantic-classes")
    form = '{"void": [255], "classes": [{"value": 1, "id": 101, "name": "sky", "isthing": 0}, …]}'
    try:
        content = json.loads(read_file(at.address(path)))
        entries = [{**entry, "value": int(entry["value"]), "id": int(entry["id"])} for entry in content["classes"]]
        void = frozenset(int(value) for value in content.get("void", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not of the form {form} ({type(error).__name__}: {error})") from error
    twice = [value for value, count in Counter([*(e["value"] for e in entries), *void]).items() if count > 1]
    if twice:
        raise ValueError(f"{file}: the values {', '.join(map(str, twice))} have two meanings")
    return Values(entries, void)


def instance_categories(
    content: Content, file: str, values: Values | None = None, background: str = "", things: Sequence[str] = ()
) -> Categories:
    """The classes of the file, then those of the semantic PNG or the background; all are things unless they say more.

    Raises:
        ValueError: the classes are no such list, `things` names one that is not there, or ids have two meanings.
    """
    entries = checked_categories(content.categories, file, lambda: content.used, content.repairs, background)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: categories is {shown(entries)}; it must be a list of categories")
    groups = [e for e in entries if e.get("supercategory") == "none" and not content.used[e.get("id")]]
    entries = [  # the group of a project, which one tool lists as a class
        entry for entry in entries if entry not in groups or len(groups) == len(entries)
    ]
    names = [str(entry.get("name")) for entry in entries]
    if unknown := [name for name in things if name not in names]:
        raise ValueError(f"--data.things {', '.join(unknown)}: {file} has no such class; it has {', '.join(names)}")
    entries = [{**e, "isthing": int(e["name"] in things) if things else e.get("isthing", 1)} for e in entries]
    own = {entry["id"]: entry for entry in entries if "id" in entry}
    for entry in values.classes if values else ():
        same = own.get(entry["id"])
        if same is None:
            entries.append(entry)
        elif str(same.get("name")) != str(entry.get("name")):
            raise ValueError(
                f"{file} calls category {entry['id']} {same.get('name')!r}, --data.semantic-classes "
                f"{entry.get('name')!r}; ids must mean the same in both"
            )
    if background in [entry.get("name") for entry in entries]:  # for its annotations and all that none covers
        entries = [{**entry, "isthing": 0} if entry.get("name") == background else entry for entry in entries]
    elif background:
        number = max((entry["id"] for entry in entries if isinstance(entry.get("id"), int)), default=0) + 1
        entries.append({"id": number, "name": background, "isthing": 0})
    return Categories.from_coco(entries, file, content.repairs)


def instance_source(
    content: Content,
    file: str,
    tree: Tree,
    split: str,
    categories: Categories,
    images: Folder,
    maps: Folder | None = None,
    values: Values | None = None,
    *,
    overlap: Overlap,
    crowd: Crowd = "trust",
    uncovered: Uncovered = "void",
    background: str,
    exif: Literal["auto"] | Orientation,
    reader: str = "coco-instances",
    mask_of: MaskOf | None = None,
) -> Source:
    """The source that instances and a folder of photographs make: the rows, and what is wrong before a pixel is read.

    Args:
        content: images and annotations; `file` is their name, for messages.
        tree, split, categories, reader: of the source.
        images: the photographs.
        maps, values: the semantic PNGs that lie under the instances, and what their values mean.
        overlap, crowd, uncovered, background, exif: see `coco_instances`.
        mask_of: reads the segmentations of another tool than COCO's.

    Raises:
        ValueError: the annotations as a whole do not fit the images.
    """
    listed = {image.id for image in content.images}
    ids = _image_ids(content, file, listed)
    known = set(categories.ids)
    times = Counter(image.id for image in content.images)
    names = Counter(image.name for image in content.images)
    rows, problems, stamps, size = [], [], [], 0
    for image in content.images:
        annotations = content.annotations.get(ids.get(image.id, image.id), [])
        try:
            if image.id in content.faults:
                raise content.faults[image.id]
            _check_entry(image, times, names)
            photograph = _file_of(image.name, images, "image")
            semantic = _file_of(f"{image.name.rsplit('.', 1)[0]}.png", maps, "semantic map") if maps else ""
            _check_annotations(annotations, known)
        except Fault as fault:
            problems.append(Problem(image.name, fault.reason, fault.remedy))
            continue
        stamps.append((images.stamps[photograph], maps.stamps[semantic] if maps else None))
        size += images.stamps[photograph][0]
        rows.append(
            Row(
                photograph,
                images.address(photograph),
                maps.address(semantic) if maps else "",
                image.id,
                (b"[" + b",".join(annotations) + b"]").decode(),
                image.height,
                image.width,
            )
        )
    for key in content.annotations.keys() - {ids.get(i, i) for i in listed}:
        reason, remedy = "annotations of an image that images does not list", "add it to images, or take them out"
        problems.append(Problem(f"image id {shown(key)}", reason, remedy))
    if len({type(row.image_id) for row in rows}) > 1:
        raise ValueError(f"{file}: images[].id mixes numbers and text; use one of them throughout")
    _warn_of_crowds(content, file, crowd)
    options = [overlap, crowd, uncovered, background, values and [values.classes, sorted(values.void)]]
    content.digest.update(fingerprint_of(stamps, options, categories.to_coco()).encode())
    return Source(
        reader=reader,
        root=tree.root,
        split=split,
        categories=categories,
        rows=table_of(rows),
        problems=tuple(problems),
        unannotated=tuple(content.unannotated),
        bytes=size,
        fingerprint=content.digest.hexdigest(),
        repairs=content.repairs,
        decode=partial(
            decode_annotations,
            overlap=overlap,
            trust_crowd=crowd == "trust",
            uncovered=uncovered,
            values={entry["value"]: entry["id"] for entry in values.classes} if values else {},
            void=values.void if values else frozenset(),
            background=background,
            **({"mask_of": mask_of} if mask_of else {}),
        ),
        orientation="applied" if exif == "auto" else exif,
    )


def _image_ids(content: Content, file: str, listed: set[int | str]) -> dict[int | str, int | str]:
    """The image id that annotations use for each image, where one writes as text what the other writes as number.

    Raises:
        ValueError: annotations know none of the images.
    """
    used = content.annotations.keys()
    if not used or not listed or listed & used:
        return {}
    spelt = {str(key): key for key in used}
    if len({str(key) for key in listed}) == len(listed) and spelt.keys() & {str(key) for key in listed}:
        return {key: spelt[str(key)] for key in listed if str(key) in spelt}
    raise ValueError(
        f"{file}: no annotation belongs to an image: images[0].id is {shown(content.images[0].id)}, "
        f"annotations[0].image_id is {shown(next(iter(used)))}; are the two lists of the same data set?"
    )


def _check_entry(image: ImageEntry, times: Counter, names: Counter) -> None:
    """Refuse an image whose id or file name another one has too."""
    if times[image.id] > 1:
        raise Fault(
            f"image id {shown(image.id)} appears {times[image.id]} times in images",
            "give each image an id of its own, which its annotations have too; join sets with --data.root A B",
        )
    if names[image.name] > 1:
        raise Fault(
            f"file name appears {names[image.name]} times in images",
            "keep one entry of each photograph; join sets with --data.root A B",
        )


def _file_of(name: str, folder: Folder, what: str) -> str:
    """The file of a folder that a name means."""
    found = folder.match(name)
    if found is None:
        raise Fault(f"{what} is missing: {folder.lacks(name)} (partial download?)", FETCH)
    return found


def _check_annotations(annotations: Sequence[bytes], known: set[int]) -> None:
    """Refuse annotations that use a category that is not there, or have no mask."""
    entries = [pydantic_core.from_json(text) for text in annotations]
    unknown = {str(entry["category_id"]) for entry in entries if entry["category_id"] not in known}
    if unknown:
        listed = ", ".join(sorted(unknown))
        raise Fault(
            f"category_id {listed} is not in the JSON's categories", "add it there, or take its annotations out"
        )
    boxes = [shown(entry.get("id", "?")) for entry in entries if entry.get("segmentation") in (None, [], {}, [[]])]
    if boxes:
        raise Fault(f"box without mask (annotation {', '.join(boxes[:5])})", "draw the mask or remove the box")


def _warn_of_crowds(content: Content, file: str, crowd: Crowd) -> None:
    """Warn that a tool marks every brush mask as a crowd."""
    all_rle = content.masks["rle", True] and not content.masks["rle", False] and not content.masks["polygon", True]
    if content.by_cvat and all_rle and crowd == "trust":
        logger.warning(
            "%s: all %d RLE masks are crowds and no polygon is, as CVAT writes single objects drawn by brush; if they "
            "are such, use --data.crowd ignore",
            file,
            content.masks["rle", True],
        )


def decode_annotations(
    row: Mapping[str, Any],
    read: Callable[[str], bytes],
    categories: Categories,
    *,
    overlap: Overlap = "smaller-wins",
    trust_crowd: bool = True,
    uncovered: Uncovered = "void",
    values: Mapping[int, int],
    void: frozenset[int] = frozenset(),
    background: str = "",
    mask_of: MaskOf | None = None,
) -> Truth:
    """The truth of a row whose `record` is the list of the image's annotations, and `png` its semantic map, if any.

    Args:
        row, read, categories: see `Decode`.
        overlap, uncovered, background: see `coco_instances`.
        trust_crowd: false where iscrowd is ignored.
        values: category id of each value of the semantic map.
        void: its other values.
        mask_of: reads a segmentation; by default COCO's forms.

    Raises:
        ValueError: a mask cannot be read, or the files are of other sizes; begins with the name of the image.
    """
    name, counts = row["name"], Counter()
    index = {number: label for label, number in enumerate(categories.ids)}
    try:
        size, swapped = _size(row, read(row["image"]))
        counts.update(swapped)
        entries = json.loads(row["record"])
        instances = list(_instances(entries, size, index, trust_crowd, counts, mask_of or read_mask))
        base = None
        if row["png"]:
            base = _base(
                decode_labels(read(row["png"])), size, {v: index[number] for v, number in values.items()}, void
            )
        elif background:
            base = np.full(size, categories.names.index(background), np.int32)
        truth = paint(instances, size, categories, counts, overlap=overlap, uncovered=uncovered, base=base)
    except ValueError as error:
        raise placed(name, error) from error
    return Truth(truth, counts)


def _size(row: Mapping[str, Any], photograph: bytes) -> tuple[tuple[int, int], dict[str, int]]:
    """(H, W) of the masks, and the repair that the stated size needs.

    The JSON says whether its masks lie over the stored pixels or over the upright image, if the two differ in size.
    """
    stored = image_size(photograph, "photograph")
    height, width = stored
    upright = (width, height) if exif_orientation(photograph) > 4 else stored
    stated = (row["height"], row["width"])
    if None in stated:
        return upright, {}
    if stated in (stored, upright):
        return stated, {}
    if stated == stored[::-1]:
        return stored, {SWAPPED: 1}
    raise Fault(
        f"the photograph is {stored[0]}x{stored[1]} but the JSON says {stated[0]}x{stated[1]} (height x width)",
        "correct height and width in images, or give the photographs that were annotated",
    )


class Instance(NamedTuple):
    """One object of an image."""

    mask: dict
    """COCO RLE."""
    label: int
    crowd: bool
    name: str
    """Name of the object, for messages."""
    layer: int = 0
    """Instances of a higher layer lie on top, whatever their size; a tool lets its users choose it."""


def _instances(
    entries: Iterable[dict],
    size: tuple[int, int],
    index: Mapping[int, int],
    trust_crowd: bool,
    counts: Counter,
    mask_of: MaskOf,
) -> Iterator[Instance]:
    """The annotations that have a mask, in their order; the others are counted.

    Raises:
        ValueError: an RLE does not fit the image, or a number is none.
    """
    for position, entry in enumerate(entries):
        name = f"annotation {shown(entry.get('id', position))}"
        try:
            mask = mask_of(entry["segmentation"], size, counts)
        except (ValueError, TypeError, KeyError) as error:
            raise Fault(f"{name}: {error}", DRAW) from error
        if mask is None:
            continue
        if not rle.area(mask):
            counts[WITHOUT_PIXEL] += 1
            continue
        if isinstance(entry["segmentation"], dict) and _is_elsewhere(mask, entry.get("bbox")):
            counts[OTHER_BOX] += 1
        crowd = (trust_crowd and bool(entry.get("iscrowd"))) or bool(entry.get("ignore"))
        yield Instance(mask, index[entry["category_id"]], crowd, name, entry.get("layer", 0))


def read_mask(segmentation: Any, size: tuple[int, int], counts: Counter) -> dict | None:
    """The RLE of a segmentation in one of COCO's forms.

    Args:
        segmentation: a list of polygons, or an RLE.
        size: H and W of the image.
        counts: is added to: what is left out, cut or repaired.

    Returns:
        The RLE; None where all its polygons are left out.

    Raises:
        ValueError: it is none of these, or does not fit the image.
    """
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size)
    if not isinstance(segmentation, list):
        raise ValueError(f"segmentation is {shown(segmentation)}; it must be a list of polygons, or an RLE")
    polygons = segmentation
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]
        counts[FLAT] += 1
    sound = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    counts[BAD_POLYGONS] += len(polygons) - len(sound)
    if not sound:
        counts[WITHOUT_PIXEL] += 1
        return None
    height, width = size
    for polygon in sound:
        points = np.asarray(polygon, np.float64)
        if not np.isfinite(points).all() or abs(points).max() > _REACH:
            raise ValueError(f"a polygon reaches to {abs(points).max()}, far beyond the image of {height}x{width}")
        x, y = points[0::2], points[1::2]
        counts[OUTSIDE] += bool(x.min() < 0 or y.min() < 0 or x.max() > width or y.max() > height)
    return rle.from_polygons(sound, size)


def _read_rle(segmentation: dict, size: tuple[int, int]) -> dict:
    """An RLE, compressed or not, whose runs are checked: pycocotools decodes what does not fit without a word."""
    stated = segmentation.get("size")
    if not isinstance(stated, list) or tuple(stated) != size:
        raise ValueError(f"the RLE has the size {shown(stated)}, and the image [{size[0]}, {size[1]}] (height, width)")
    runs = segmentation.get("counts")
    if isinstance(runs, str):
        runs = rle.run_lengths(runs.encode())
    if not isinstance(runs, list) or not all(isinstance(run, int | float) and math.isfinite(run) for run in runs):
        raise ValueError(f"the RLE has counts {shown(runs)}; they must be text, or the lengths of the runs")
    return rle.from_run_lengths([int(run) for run in runs], size)


def _is_elsewhere(mask: dict, bbox: Any) -> bool:
    """True if the mask's box and the annotation's have less than half of their union in common."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, int | float) for value in bbox):
        return False
    x0, y0, x1, y1 = rle.bounding_boxes([mask])[0].tolist()
    a0, b0, a1, b1 = bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]
    # a pixel of tolerance on each side, for the boxes of tools that count from other corners
    common = max(0.0, min(x1, a1 + 1) - max(x0, a0 - 1)) * max(0.0, min(y1, b1 + 1) - max(y0, b0 - 1))
    union = max((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - common, 1.0)
    return common < union / 2


def _base(values: np.ndarray, size: tuple[int, int], labels: Mapping[int, int], void: frozenset[int]) -> np.ndarray:
    """The class of each pixel of a semantic map, -1 where void.

    Raises:
        ValueError: it has another size, or values without a meaning.
    """
    if values.shape != size:
        raise Fault(
            f"the semantic map is {values.shape[0]}x{values.shape[1]} but the image {size[0]}x{size[1]} "
            "(height x width)",
            "give the semantic map in the size of its photograph",
        )
    wrong = [value for value in distinct(values).tolist() if value not in labels and value not in void]
    if wrong:
        hint = ""
        if labels and len(wrong) == 1 and wrong[0] in (min(labels) - 1, max(labels) + 1):
            hint = "; do the values begin at another number than --data.semantic-classes says?"
        raise Fault(
            f"values of the semantic map without a class: {counted(values, wrong)}{hint}",
            "say in --data.semantic-classes what they mean: a class, or void",
        )
    table = np.full(max([*labels, *void, 0]) + 1, -1, np.int32)
    for value, label in labels.items():
        table[value] = label
    return table[values]


def paint(
    instances: Sequence[Instance],
    size: tuple[int, int],
    categories: Categories,
    counts: Counter,
    *,
    overlap: Overlap = "smaller-wins",
    uncovered: Uncovered = "void",
    base: np.ndarray | None = None,
) -> Segmentation:
    """One map of instances that may overlap, over a map of classes.

    Crowds lie under all other instances. Instances of a stuff class are one segment, with what the map of classes says.

    Args:
        instances: N, in the order of the file.
        size: H and W.
        categories: of their labels.
        counts: is added to: pixels that several instances cover, instances that others cover wholly.
        overlap, uncovered: see `coco_instances`.
        base: int [H, W], the class of pixels under no instance, -1 void.

    Raises:
        ValueError: instances overlap, with "error".
    """
    top = np.zeros(size, np.int32)  # the instance of each pixel, from 1
    times = np.zeros(size, np.uint8)  # instances of each pixel, crowds aside, at most 2
    areas = [rle.area(instance.mask) for instance in instances]
    for k in _painting_order(instances, areas, overlap):
        mask = rle.decode(instances[k].mask)
        if not instances[k].crowd:
            if overlap == "error" and (times[mask] > 0).any():
                other = instances[top[mask & (times > 0)][0] - 1].name
                raise Fault(f"{other} and {instances[k].name} overlap", "choose who has the pixels with --data.overlap")
            times[mask] = np.minimum(times[mask] + 1, 2)
        top[mask] = k + 1
    contested = times > 1
    if total := int(contested.sum()):
        counts[CONTESTED] += total
    if overlap == "void":
        top[contested] = 0
    return _joined(instances, top, contested & (top == 0), categories, counts, uncovered, base)


def _painting_order(instances: Sequence[Instance], areas: Sequence[int], overlap: Overlap) -> list[int]:
    """Positions of the instances, the one that is painted last on top."""
    order = list(range(len(instances)))
    if overlap == "smaller-wins":
        order.sort(key=lambda k: -areas[k])  # stable: of equal ones the later lies on top
    elif overlap == "earlier-wins":
        order.reverse()
    return sorted(order, key=lambda k: (not instances[k].crowd, instances[k].layer))


def _joined(
    instances: Sequence[Instance],
    top: np.ndarray,
    contested: np.ndarray,
    categories: Categories,
    counts: Counter,
    uncovered: Uncovered,
    base: np.ndarray | None,
) -> Segmentation:
    """The segments of instances and of the classes under them, numbered anew."""
    left = np.bincount(top.ravel(), minlength=len(instances) + 1)[1:] > 0
    counts[COVERED] += int((~left).sum())
    labels, crowds, number_of_stuff = [], [], {}
    table = np.zeros(len(instances) + 1, np.int32)
    for k, instance in enumerate(instances):
        if not left[k]:
            continue
        thing = categories.is_thing[instance.label]
        if not thing and instance.label in number_of_stuff:
            table[k + 1] = number_of_stuff[instance.label]
            continue
        labels.append(instance.label)
        crowds.append(instance.crowd and thing)
        table[k + 1] = len(labels)
        if not thing:
            number_of_stuff[instance.label] = len(labels)
    segments = table[top]
    if base is not None:
        free = (top == 0) & ~contested & (base >= 0)
        for label in np.unique(base[free]).tolist():
            pixels = free & (base == label)
            if categories.is_thing[label]:
                counts[UNCOVERED] += int(pixels.sum())
                if uncovered == "void":
                    continue
            number = number_of_stuff.get(label)
            if number is None:
                labels.append(label)
                crowds.append(categories.is_thing[label])
                number = len(labels)
            segments[pixels] = number
    for kind in [kind for kind, count in counts.items() if not count]:
        del counts[kind]
    return Segmentation(segments, np.array(labels, np.int64), np.array(crowds, bool))
