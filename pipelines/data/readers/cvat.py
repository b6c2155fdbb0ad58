"""CVAT for images 1.1: `annotations.xml` and the photographs in `images/`.

Polygons have the coordinates of COCO's. The mask of a brush is written as runs within its box, row by row, the first of
them outside (unlike COCO's, which go down the columns of the whole image). Shapes of one group are one object.
Annotators stack shapes by `z_order`: a higher one lies on top; within one layer the rule for overlaps decides.

Format: docs.cvat.ai, XML annotation format, version 1.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pydantic_core

from panoptic import rle
from panoptic.segmentation import shown
from pipelines.cluster import storage
from pipelines.data.config import Orientation, Overlap
from pipelines.data.readers.archive import Stream, readable
from pipelines.data.readers.coco_instances import Content, ImageEntry, instance_categories, instance_source, read_mask
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.places import holding, image_places, tree_and_file
from pipelines.data.readers.source import Source
from pipelines.data.readers.tree import Folder, given

FILE = "annotations.xml"

_WITHOUT_MASK = ("box", "polyline", "points", "cuboid", "ellipse", "skeleton")


def cvat(
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
    """An export of CVAT in its format "CVAT for images 1.1".

    Args:
        root: the export's folder or zip, or its `annotations.xml`.
        split: the subset, where the export of a project has several; otherwise any name.
        json_file: the annotation file, where it is called otherwise.
        images: folder of the photographs, where they are elsewhere (an export without images).
        overlap, background, exif: see `coco_instances`.
        things: names of the classes that are things, where not all are.

    Raises:
        ValueError: the file is missing, is no such export or one of a video, or has no such subset.
    """
    tree, json_file = tree_and_file(root, json_file, ".xml")
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        at, path = tree, tree.one([FILE], "annotation file", "--data.json-file", tree.is_file)
    file = readable(at.address(path))
    content = parse(Stream(at.address(path)), file, split)
    categories = instance_categories(content, file, None, background, things)
    if images:
        folder = Folder(*given(tree, images, "--data.images"))
    else:
        names = [image.name for image in content.images[:20]]
        beside = path.rpartition("/")[0]
        folder = Folder(tree, holding(tree, image_places(split), [beside], names, "folder of images", "--data.images"))
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
        reader="cvat",
        mask_of=mask_of,
    )


class Shape(NamedTuple):
    """One polygon or mask."""

    label: str
    group: str
    """"" and "0" are no group."""
    layer: int
    part: list[float] | dict[str, Any]
    """A flat polygon, or the runs of a mask and its window: {"rows", "window": [top, left, height, width]}."""


def parse(stream: Any, file: str, split: str) -> Content:
    """The content of an `annotations.xml`, read image by image.

    Args:
        stream: the open file.
        file: its name, for messages.
        split: the subset that is wanted, where images say theirs.

    Raises:
        ValueError: it is no XML, or no export of this form, or has other subsets; begins with its name.
    """
    content, labels, subsets = Content(), [], Counter()
    digest = content.digest
    try:
        for element in _elements(stream, digest):
            if element.tag == "track":
                raise ValueError(
                    f"{file}: holds the tracks of a video; export the task as CVAT for images 1.1, which splits them "
                    "by frames"
                )
            if element.tag == "label" and element.find("parent") is None:
                labels.append((element.findtext("name") or "", element.findtext("color") or ""))
            elif element.tag == "image":
                if subset := element.get("subset"):
                    subsets[subset] += 1
                    if subset.casefold() != split.casefold():
                        continue
                _image(element, content, [name for name, _ in labels], f"{file}: image {element.get('name')!r}")
    except ElementTree.ParseError as error:
        raise ValueError(f"{file}: not valid XML ({error}); is the download complete?") from error
    if not labels:
        raise ValueError(f"{file}: lists no labels (meta, task, labels); export the task as CVAT for images 1.1")
    if subsets and not any(subset.casefold() == split.casefold() for subset in subsets):
        raise ValueError(f"{file}: has no subset {split}; it has {', '.join(sorted(subsets))}: name one as the split")
    names = list(dict.fromkeys(name for name, _ in labels))
    colours = dict(labels)
    content.categories = [
        {"id": number, "name": name, **_colour(colours[name])} for number, name in enumerate(names, 1)
    ]
    return content


def _elements(stream: Any, digest: Any) -> Iterator[ElementTree.Element]:
    """The finished elements of a file that matter, each emptied when the next is asked for."""
    parser = ElementTree.XMLPullParser(["end"])
    while piece := stream.read(1 << 20):
        digest.update(piece)
        parser.feed(piece)
        yield from _finished(parser)
    parser.close()
    yield from _finished(parser)


def _finished(parser: ElementTree.XMLPullParser) -> Iterator[ElementTree.Element]:
    for event in parser.read_events():
        element: Any = event[-1]  # of ("end", element)
        if element.tag in ("image", "track", "label"):
            yield element
            if element.tag == "image":
                element.clear()


def _colour(text: str) -> dict[str, list[int]]:
    """The colour #rrggbb of a label, as a category has it; nothing where it has none."""
    if len(text) != 7 or not text.startswith("#"):
        return {}
    try:
        return {"color": list(bytes.fromhex(text[1:]))}
    except ValueError:
        return {}


def _image(element: ElementTree.Element, content: Content, labels: Sequence[str], place: str) -> None:
    """Add an image with its objects."""
    name, key = element.get("name") or "", len(content.images) + 1
    if not name:
        raise ValueError(f"{place}: has no name")
    sizes = [int(text) if (text := element.get(side) or "").isdecimal() else None for side in ("height", "width")]
    content.images.append(ImageEntry(key, name, *sizes))
    without = Counter(shape.tag for shape in element if shape.tag in _WITHOUT_MASK)
    if without:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(without.items()))
        content.faults[key] = Fault(
            f"shapes without a mask: {listed}", "a box is never filled: draw polygons or brush masks, or remove these"
        )
        return
    try:
        shapes = [_shape(shape) for shape in element if shape.tag in ("polygon", "mask")]
    except ValueError as error:
        content.faults[key] = Fault(f"a shape cannot be read: {error}", "export the task again")
        return
    if unknown := sorted({shape.label for shape in shapes} - set(labels)):
        content.faults[key] = Fault(
            f"labels that the file's list of labels lacks: {', '.join(unknown)}", "add them to the task's labels"
        )
        return
    objects: dict[Any, list[Shape]] = {}
    for position, shape in enumerate(shapes):
        single = shape.group in ("", "0")
        objects.setdefault(position if single else (shape.group, shape.label), []).append(shape)
    for number, parts in enumerate(objects.values(), 1):
        entry = {
            "id": number,
            "category_id": labels.index(parts[0].label) + 1,
            "segmentation": [one.part for one in parts],
            "layer": max(one.layer for one in parts),
        }
        content.used[entry["category_id"]] += 1
        content.annotations.setdefault(key, []).append(pydantic_core.to_json(entry))


def _shape(element: ElementTree.Element) -> Shape:
    label, group = element.get("label") or "", element.get("group_id") or ""
    layer = int(element.get("z_order") or 0)
    if element.tag == "polygon":
        points = [pair.split(",") for pair in (element.get("points") or "").split(";") if pair]
        return Shape(label, group, layer, [float(value) for pair in points for value in pair])
    window = [int(float(element.get(side) or 0)) for side in ("top", "left", "height", "width")]
    runs = [int(run) for run in (element.get("rle") or "").split(",") if run.strip()]
    return Shape(label, group, layer, {"rows": runs, "window": window})


def mask_of(segmentation: Any, size: tuple[int, int], counts: Counter) -> dict | None:
    """The RLE of an object of one or several shapes; see `coco_instances.read_mask`."""
    polygons = [part for part in segmentation if isinstance(part, list)]
    masks = [_brush(part["rows"], part["window"], size) for part in segmentation if isinstance(part, dict)]
    if polygons and (mask := read_mask(polygons, size, counts)) is not None:
        masks.append(mask)
    return rle.union(masks) if masks else None


def _brush(runs: Sequence[int], window: Sequence[int], size: tuple[int, int]) -> dict:
    """The RLE of the runs of a box, which go row by row.

    Raises:
        ValueError: they do not fill the box, or the box does not lie in the image.
    """
    top, left, height, width = window
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"the mask's box (top {top}, left {left}, {height}x{width}) does not lie in the image of "
            f"{size[0]}x{size[1]} (height x width)"
        )
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(
            f"the runs of the mask add up to {sum(runs)} pixels, and its box has {height}x{width} (height x width), "
            f"which is {height * width}: {shown(list(runs))}"
        )
    inside = np.zeros(len(runs), bool)
    inside[1::2] = True
    return rle.encode_window(np.repeat(inside, runs).reshape(height, width), top, left, size)
