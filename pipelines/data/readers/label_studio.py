"""Label Studio's own export, a JSON of tasks: brush masks and polygons.

A brush mask is an RGBA image of the photograph's size, packed bit by bit; its pixels are those of alpha > 0. Polygons
are in percent of the image. A task has an annotation of each annotator. Names of uploaded files begin with eight
letters that the tool adds. Regions overlap without an order.

Format: labelstud.io, JSON export; the packing of brushes is that of thi.ng's rle-pack (label-studio-converter,
brush.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pydantic_core

from panoptic import rle
from panoptic.segmentation import shown
from pipelines.cluster import storage
from pipelines.data.config import Orientation, Overlap
from pipelines.data.readers.archive import read_file, readable
from pipelines.data.readers.coco_instances import Content, ImageEntry, instance_categories, instance_source, read_mask
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.places import holding, image_places, tree_and_file
from pipelines.data.readers.segments_ai import only_json
from pipelines.data.readers.source import Source
from pipelines.data.readers.tree import Folder, given

_MASKS = ("brush", "polygon")
_OTHERS = ("rectangle", "ellipse", "keypoint", "vector", "video", "bitmask")
"""Kinds of regions without a mask that is read here."""

_PREFIX = re.compile(r"^[0-9a-f]{8}-")
_OF_REGIONS = re.compile(r"^task-\d+-annotation-\d+-.*\.png$")
_IMAGE = re.compile(r"\.(jpe?g|png|bmp|webp|tiff?|gif)$", re.IGNORECASE)


def label_studio(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    images: storage.Uri = "",
    overlap: Overlap = "smaller-wins",
    background: str = "",
    things: Sequence[str] = (),
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """An export of Label Studio as JSON.

    Args:
        root: the folder of the export, or the JSON.
        split: any name; an export has none.
        json_file: the export, where the folder holds several JSONs.
        images: folder of the photographs, which the export does not hold, where they are elsewhere.
        overlap, background, exif: see `coco_instances`.
        things: names of the classes that are things, where not all are.

    Raises:
        ValueError: there is no JSON, or it is no such export.
    """
    tree, json_file = tree_and_file(root, json_file)
    if not json_file and any(_OF_REGIONS.match(name) for name in tree.names()):
        raise ValueError(
            f"{tree.root}: holds a PNG for each region (task-N-annotation-M-…), which do not name their photographs; "
            "export the project as JSON"
        )
    at, path = given(tree, json_file, "--data.json-file") if json_file else (tree, only_json(tree, "export"))
    file = readable(at.address(path))
    content = parse(read_file(at.address(path)), file)
    categories = instance_categories(content, file, None, background, things)
    if images:
        folder = Folder(*given(tree, images, "--data.images"))
    else:
        names = [name for image in content.images[:20] for name in (image.name, _PREFIX.sub("", image.name))]
        folder = Folder(tree, holding(tree, image_places(split), [""], names, "folder of images", "--data.images"))
    content.images = [_present(image, folder) for image in content.images]
    return instance_source(
        content,
        file,
        tree,
        split,
        categories,
        folder,
        overlap=overlap,
        background=background,
        exif=exif,
        reader="label-studio",
        mask_of=mask_of,
    )


def _present(image: ImageEntry, folder: Folder) -> ImageEntry:
    """The image under the name that it has on disk: with the letters that the tool adds, or without."""
    if folder.match(image.name) is not None:
        return image
    original = _PREFIX.sub("", image.name)
    return image._replace(name=original) if folder.match(original) is not None else image


def parse(data: bytes, file: str) -> Content:
    """The content of an export.

    Raises:
        ValueError: it is no JSON, or no list of tasks with regions; begins with its name.
    """
    content = Content()
    content.digest.update(data)
    try:
        tasks = pydantic_core.from_json(data)
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); is the download complete?") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{file}: holds {shown(tasks)}; an export of Label Studio as JSON is a list of tasks")
    if tasks and not any("annotations" in task for task in tasks):
        raise ValueError(
            f"{file}: no task has annotations; export the project as JSON (JSON-MIN and CSV leave out what is needed)"
        )
    regions: list[tuple[int, list[dict]]] = []
    for position, task in enumerate(tasks):
        name = _name(task)
        if not name:
            raise ValueError(f"{file}: task {position} names no image in data; export an image project")
        found = _annotation(task)
        if found is None:
            content.unannotated.append(name)
            continue
        key = len(content.images) + 1
        if isinstance(found, Fault):
            content.images.append(ImageEntry(key, name, None, None))
            content.faults[key] = found
            continue
        entries, size, fault = _regions(found)
        content.images.append(ImageEntry(key, name, *(size or (None, None))))
        if fault:
            content.faults[key] = fault
        else:
            regions.append((key, entries))
    names = sorted({entry["label"] for _, entries in regions for entry in entries})
    content.categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    ids = {name: number for number, name in enumerate(names, 1)}
    for key, entries in regions:
        for entry in entries:
            entry["category_id"] = ids[entry.pop("label")]
            content.used[entry["category_id"]] += 1
            content.annotations.setdefault(key, []).append(pydantic_core.to_json(entry))
    if not names:
        raise ValueError(f"{file}: no task has a brush mask or a polygon; export a project of image segmentation")
    return content


def _name(task: dict) -> str:
    """The file name of a task's photograph."""
    data = task.get("data")
    texts = [value for value in data.values() if isinstance(value, str)] if isinstance(data, dict) else []
    names = [_file_name(text) for text in texts]
    return next((name for name in names if _IMAGE.search(name)), "") or _file_name(str(task.get("file_upload") or ""))


def _file_name(address: str) -> str:
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d")  # /data/local-files/?d=folder/name.jpg
    return unquote(local[0] if local else parts.path).replace("\\", "/").rsplit("/", 1)[-1]


def _annotation(task: dict) -> list | Fault | None:
    """The result of the annotation that counts; None where the task has none."""
    done = [
        one
        for one in task.get("annotations") or ()
        if isinstance(one, dict) and not one.get("was_cancelled") and isinstance(one.get("result"), list)
    ]
    if len(done) > 1:
        truths = [one for one in done if one.get("ground_truth")]
        if len(truths) != 1:
            return Fault(
                f"the task {task.get('id')} has {len(done)} annotations, of several annotators",
                "keep one of them, or mark one as ground truth, and export again",
            )
        done = truths
    return done[0]["result"] if done else None


def _regions(result: Sequence[Any]) -> tuple[list[dict], tuple[int, int] | None, Fault | None]:
    """The masks of an annotation, the (height, width) of its image, and what is wrong with them."""
    merged: dict[str, dict[str, Any]] = {}  # label and shape of a region may be two entries of one id
    for position, entry in enumerate(result):
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), dict):
            continue
        kind, value = str(entry.get("type", "")).lower(), entry["value"]
        shape = next((shape for shape in (*_MASKS, *_OTHERS) if kind in (shape, f"{shape}labels")), "")
        if not shape and kind != "labels":
            continue  # choices, texts and relations are none
        region = merged.setdefault(str(entry.get("id", position)), {"labels": []})
        texts = value.get(kind) or value.get("labels") or ()
        if kind.endswith("labels") and isinstance(texts, list):
            region["labels"] += [str(text) for text in texts if str(text) not in region["labels"]]
        if shape:
            region.update(shape=shape, value=value, size=(entry.get("original_height"), entry.get("original_width")))
            region["rotation"] = entry.get("image_rotation") or 0
    regions = [(key, region) for key, region in merged.items() if "shape" in region]
    if fault := _fault(regions):
        return [], None, fault
    entries = [
        {"id": key, "label": region["labels"][0], "segmentation": _segmentation(region)} for key, region in regions
    ]
    return entries, regions[0][1]["size"] if regions else None, None


def _fault(regions: Sequence[tuple[str, dict[str, Any]]]) -> Fault | None:
    """The first thing for which the regions of an image cannot be used."""
    without = Counter(region["shape"] for _, region in regions if region["shape"] not in _MASKS)
    if without:
        listed = ", ".join(f"{count} {shape}" for shape, count in sorted(without.items()))
        return Fault(f"regions without a mask: {listed}", "a box is never filled: draw brushes or polygons")
    sizes = {region["size"] for _, region in regions}
    for key, region in regions:
        if region["rotation"]:
            return Fault(
                f"region {key} was drawn over the image turned by {region['rotation']} degrees",
                "turn the image in the tool back to 0 degrees, or turn the file before it is annotated",
            )
        if len(region["labels"]) != 1:
            names = ", ".join(region["labels"]) or "none"
            return Fault(f"region {key} has {len(region['labels'])} labels ({names})", "give it one label")
        height, width = region["size"]
        if not all(isinstance(side, int) and 0 < side < 1 << 16 for side in (height, width)) or len(sizes) > 1:
            return Fault("its regions do not agree on original_height and original_width", "annotate it again")
        points = region["value"].get("points")
        if region["shape"] == "polygon" and not _is_points(points):
            return Fault(f"region {key} has points {shown(points)}", "they must be pairs of numbers; annotate it again")
    return None


def _is_points(points: Any) -> bool:
    return isinstance(points, list) and all(
        isinstance(point, list) and len(point) == 2 and all(isinstance(value, int | float) for value in point)
        for point in points
    )


def _segmentation(region: dict[str, Any]) -> Any:
    """COCO's polygons, or {"brush": packed bytes}."""
    if region["shape"] == "brush":
        return {"brush": region["value"].get("rle")}
    height, width = region["size"]
    return [[value for x, y in region["value"]["points"] for value in (x * width / 100, y * height / 100)]]


def mask_of(segmentation: Any, size: tuple[int, int], counts: Counter) -> dict | None:
    """The RLE of a region; see `coco_instances.read_mask`."""
    if not isinstance(segmentation, dict):
        return read_mask(segmentation, size, counts)
    packed = segmentation["brush"]
    if not isinstance(packed, list) or not all(isinstance(value, int) and 0 <= value < 256 for value in packed):
        raise ValueError(f"rle is {shown(packed)}; a brush is a list of bytes")
    height, width = size
    alpha = unpack(bytes(packed), height * width * 4).reshape(height, width, 4)[..., 3]
    return rle.encode_masks((alpha > 0)[None].astype(np.uint8))[0]


def unpack(packed: bytes, count: int) -> np.ndarray:
    """The values of a packed brush (rle-pack of thi.ng).

    A stream of bits, the highest of a byte first: the number of values in 32 bits; bits of a value minus 1 in 5; four
    lengths minus 1 in 4 each. Then chunks: 1 bit, whether one value repeats; 2 bits, which of the four lengths; so many
    bits, the number of values minus 1; and the one value, or each of them.

    Args:
        packed: the bytes.
        count: number of values that they must hold.

    Returns:
        uint8 [count].

    Raises:
        ValueError: they hold another number of values, or end before the last.
    """
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    text = (bits + ord("0")).tobytes()
    place = 0

    def read(length: int) -> int:
        nonlocal place
        place += length
        if place > len(text):
            raise ValueError("the brush ends before its last pixel; export the project again")
        return int(text[place - length : place], 2)

    stated, word = read(32), read(5) + 1
    if stated != count or word > 8:
        raise ValueError(
            f"the brush has {stated} values of {word} bits, and the image needs {count} of 8 (4 a pixel): was the "
            "photograph replaced by one of another size?"
        )
    lengths = [read(4) + 1 for _ in range(4)]
    values, done = np.zeros(count, np.uint8), 0
    weights = 1 << np.arange(word - 1, -1, -1)
    while done < count:
        repeats = read(1)
        chunk = min(read(lengths[read(2)]) + 1, count - done)
        if repeats:
            values[done : done + chunk] = read(word)
        else:
            start = place
            place += chunk * word
            if place > len(text):
                raise ValueError("the brush ends before its last pixel; export the project again")
            values[done : done + chunk] = bits[start:place].reshape(chunk, word) @ weights
        done += chunk
    return values
