"""CVAT's "Segmentation mask 1.1", the form of Pascal VOC: a colour for each class, and another for each object.

    labelmap.txt                        name:R,G,B:parts:actions, a line for each class
    SegmentationClass/NAME.png          the colour of the class
    SegmentationObject/NAME.png         the colour of the object; objects of two classes may share one
    ImageSets/Segmentation/SPLIT.txt    the names
    JPEGImages/NAME.jpg                 the photographs

Colours are compared exactly: a colour that the label map lacks comes of a smooth resize or a JPEG, and is never rounded
to the nearest one. `background`, and VOC's `ignored` border, are void.

Shapes: H x W pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image

from panoptic.png import image_size
from panoptic.segmentation import Categories, distinct
from pipelines.cluster import storage
from pipelines.data.config import Orientation, Unlisted
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_instances import UNCOVERED
from pipelines.data.readers.faults import Fault, placed
from pipelines.data.readers.id_map import UNLISTED
from pipelines.data.readers.places import holding, image_places
from pipelines.data.readers.rows import Kept, by_key, label_files, segmentation_of, stem
from pipelines.data.readers.source import Source, Truth
from pipelines.data.readers.tree import Folder, Tree, given

LABEL_MAP = "labelmap.txt"
NONE = "none"
"""`--data.things none`: all classes are stuff."""

_VOID = ("background", "ignored")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_PROBED = 8
"""Maps that are opened to propose which classes are things."""

_SHOWN = 5


def cvat_masks(
    root: storage.Uri,
    split: str,
    *,
    images: storage.Uri = "",
    things: Sequence[str] = (),
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """An export of CVAT in its format "Segmentation mask 1.1".

    Args:
        root: the export's folder or zip.
        split: the name of a list in `ImageSets/Segmentation`; any name where there is one list only (`default.txt`).
        images: folder of the photographs, where they are elsewhere (an export without images).
        things: names of the classes that are things, which the format does not say; "none" = all are stuff.
        exif: the frame of the maps where sizes do not tell it; by default the upright image.

    Raises:
        ValueError: a file or folder is missing, the label map cannot be read, or nobody says which classes are things.
    """
    tree = Tree(root)
    path = tree.one([LABEL_MAP], "label map", "--data.root", tree.is_file)
    base = path.rpartition("/")[0]
    file = tree.readable(path)
    labels = read_label_map(tree.read(path).decode("utf-8-sig"), file)
    maps = Folder(tree, f"{base}/SegmentationClass".lstrip("/"))
    objects = Folder(tree, f"{base}/SegmentationObject".lstrip("/"))
    wanted = _names(tree, base, split)
    class_of = _chosen(by_key(maps, lambda name: _key(name, (".png",))), wanted)
    object_of = _chosen(by_key(objects, lambda name: _key(name, (".png",))), wanted)
    if not class_of:
        raise ValueError(f"{maps.uri}: holds no PNG of the split; export the task as Segmentation mask 1.1")
    categories = _categories(labels, things, file, lambda: _several(labels, maps, objects, class_of, object_of))
    if any(categories.is_thing) and not objects.stamps:
        raise ValueError(
            f"{objects.uri}: is missing, and without it the objects of {', '.join(things)} cannot be told apart; "
            f"export the task again, or let all classes be stuff with --data.things {NONE}"
        )
    if images:
        folder = Folder(*given(tree, images, "--data.images"))
    else:
        places = [f"{base}/JPEGImages".lstrip("/"), "JPEGImages", *image_places(split)]
        names = [f"{name}{ending}" for name in list(class_of)[:20] for ending in _IMAGES]
        folder = Folder(tree, holding(tree, places, [base], names, "folder of images", "--data.images"))
    photographs = _chosen(by_key(folder, lambda name: _key(name, _IMAGES)), wanted)
    things_here = any(categories.is_thing)
    records = {
        key: json.dumps({"objects": objects.address(object_of[key]) if key in object_of else ""}) for key in class_of
    }
    return label_files(
        "cvat-masks",
        tree.root,
        split,
        categories,
        (folder, photographs),
        (maps, class_of),
        decode=partial(decode_row, labels=tuple(labels), things=things_here),
        orientation="applied" if exif == "auto" else exif,
        records=records,
        extra=[labels, categories.to_coco(), [objects.stamps[name] for _, name in sorted(object_of.items())]],
    )


class Label(NamedTuple):
    """A line of the label map."""

    name: str
    colour: tuple[int, int, int]

    @property
    def is_void(self) -> bool:
        """True for what is no class."""
        return self.name.casefold() in _VOID


def read_label_map(text: str, file: str) -> list[Label]:
    """The classes and their colours, in the order of the file.

    Raises:
        ValueError: a line is not of the form name:R,G,B:…, or two classes have one name or colour.
    """
    labels = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.partition(":")
        channels = rest.split(":")[0].split(",")
        try:
            colour = tuple(int(value) for value in channels)
        except ValueError:
            colour = ()
        if not name.strip() or len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            raise ValueError(f"{file}: line {number} is {line!r}; it must be name:R,G,B:: with three numbers to 255")
        labels.append(Label(name.strip(), (colour[0], colour[1], colour[2])))
    for kind, values in (("name", [one.name for one in labels]), ("colour", [one.colour for one in labels])):
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"{file}: two classes have the {kind} {twice[0]}; give each one of its own")
    if not any(not label.is_void for label in labels):
        raise ValueError(f"{file}: lists no class; each line is name:R,G,B::")
    return labels


def _key(path: str, endings: tuple[str, ...]) -> str | None:
    """The name of a file without its ending; names may have folders."""
    return None if stem(path, endings) is None else path.rsplit(".", 1)[0]


def _chosen(files: Mapping[str, str], wanted: set[str] | None) -> dict[str, str]:
    return {key: path for key, path in files.items() if wanted is None or key in wanted}


def _names(tree: Tree, base: str, split: str) -> set[str] | None:
    """The names of a split, None where no list says them.

    Raises:
        ValueError: there are several lists, and none of this name.
    """
    folder = f"{base}/ImageSets/Segmentation".lstrip("/")
    if not tree.is_folder(folder):
        return None
    lists = {name.removesuffix(".txt"): name for name in tree.names(folder) if name.endswith(".txt")}
    chosen = lists.get(split) or (next(iter(lists.values())) if len(lists) == 1 else None)
    if chosen is None:
        if not lists:
            return None
        raise ValueError(f"{tree.readable(folder)}: has no {split}.txt; the splits are {', '.join(sorted(lists))}")
    text = tree.read(f"{folder}/{chosen}").decode("utf-8-sig")
    return {line.strip() for line in text.splitlines() if line.strip()}


def _categories(
    labels: Sequence[Label], things: Sequence[str], file: str, propose: Callable[[], list[str]]
) -> Categories:
    """The classes with their positions in the label map as ids.

    Raises:
        ValueError: nobody says which are things, or `things` names one that is not there.
    """
    kept = [(number, label) for number, label in enumerate(labels) if not label.is_void]
    names = [label.name for _, label in kept]
    if not things:
        several = propose()
        seen = f"; some image has several objects of {', '.join(several)}" if several else ""
        raise ValueError(
            f"{file}: the format does not say which classes are things; name them with --data.things (or {NONE}), of "
            f"{', '.join(names)}{seen}"
        )
    chosen = () if tuple(things) == (NONE,) and NONE not in names else tuple(things)
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"--data.things {', '.join(unknown)}: {file} has no such class; it has {', '.join(names)}")
    return Categories.from_coco(
        [
            {"id": number, "name": label.name, "isthing": int(label.name in chosen), "color": list(label.colour)}
            for number, label in kept
        ],
        file,
    )


def _several(
    labels: Sequence[Label], maps: Folder, objects: Folder, class_of: Mapping[str, str], object_of: Mapping[str, str]
) -> list[str]:
    """Names of the classes of which some of the first images have several objects."""
    found: dict[str, None] = {}
    for key in [key for key in class_of if key in object_of][:_PROBED]:
        try:
            colours, numbers = (
                decode_colours(f.read(p)) for f, p in ((maps, class_of[key]), (objects, object_of[key]))
            )
        except ValueError:  # it is reported when all are read
            continue
        for label in labels:
            if not label.is_void and colours.shape == numbers.shape:
                own = distinct(numbers[colours == _packed(label.colour)])
                if len(own[own > 0]) > 1:
                    found[label.name] = None
    return list(found)


def _packed(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def decode_colours(png: bytes) -> np.ndarray:
    """The colours of a PNG; those of a palette are looked up, and alpha is ignored.

    Returns:
        int32 [H, W], 65536 R + 256 G + B.

    Raises:
        ValueError: not an image, damaged, or too large.
    """
    image_size(png, "map")
    if png.startswith(b"\xff\xd8"):
        raise Fault("the map is a JPEG, whose compression makes up colours", "export it again as a PNG")
    try:
        with PIL.Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image.convert("RGB"), np.int32)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded ({error}); the file is damaged") from error
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def decode_row(
    row: Mapping[str, Any],
    read: Callable[[str], bytes],
    categories: Categories,
    *,
    labels: Sequence[Label],
    things: bool,
    unlisted: Unlisted = "refuse",
) -> Truth:
    """The truth of a row whose `png` holds the colours of classes, and `record` the address of those of objects.

    Args:
        row, read, categories: see `Decode`.
        labels: of the label map.
        things: some classes are things, so that objects are needed.
        unlisted: what becomes of unknown colours.

    Raises:
        ValueError: a map cannot be read, or holds unknown colours.
    """
    address = json.loads(row["record"])["objects"]
    if things and not address:
        raise Fault("its map in SegmentationObject is missing (partial download?)", "export the task again")
    try:
        colours = decode_colours(read(row["png"]))
        objects = decode_colours(read(address)) if things else np.zeros_like(colours)
    except ValueError as error:
        raise placed(f"{row['name']}: {readable(row['png'])}", error) from error
    return from_colours(colours, objects, categories, labels, void=unlisted == "void")


def from_colours(
    colours: np.ndarray, objects: np.ndarray, categories: Categories, labels: Sequence[Label], *, void: bool = False
) -> Truth:
    """The map that colours of classes and of objects mean.

    A stuff class is one segment; of things, each pair of class and object colour is. Pixels of a thing class under no
    object are void, and counted.

    Args:
        colours, objects: int32 [H, W], as `decode_colours` gives them.
        categories: whose ids are positions in `labels`.
        void: unknown colours are void, and counted; otherwise they are a fault.

    Raises:
        Fault: unknown colours, or maps of two sizes.
    """
    if colours.shape != objects.shape:
        sizes = " and ".join(f"{one.shape[0]}x{one.shape[1]}" for one in (colours, objects))
        raise Fault(f"its maps of classes and of objects are of two sizes, {sizes}", "export the task again")
    index = {number: label for label, number in enumerate(categories.ids)}
    class_of = {_packed(label.colour): index.get(number, -1) for number, label in enumerate(labels)}
    values = distinct(colours).tolist()
    unknown = [value for value in values if value not in class_of]
    repairs = {}
    if unknown and not void:
        raise _unknown_colours(colours, unknown, labels)
    if unknown:
        repairs[UNLISTED] = int(np.isin(colours, unknown).sum())
    table = np.array([class_of.get(value, -1) for value in values], np.int64)
    classes = table[np.searchsorted(values, colours)]
    thing = np.array([*categories.is_thing, False])[classes]
    bare = thing & (objects == 0)
    if count := int(bare.sum()):
        repairs[UNCOVERED] = count
    keys = np.where((classes < 0) | bare, -1, (classes << 24) + np.where(thing, objects, 0))
    kept = [Kept(key, key >> 24) for key in distinct(keys).tolist() if key >= 0]
    return Truth(segmentation_of(keys, kept), repairs)


def _unknown_colours(colours: np.ndarray, unknown: Sequence[int], labels: Sequence[Label]) -> Fault:
    """The fault of colours that no class has: each with its pixels and the nearest class."""
    counts = sorted(((int((colours == value).sum()), value) for value in unknown[:200]), reverse=True)
    shown = []
    for count, value in counts[:_SHOWN]:
        colour = (value >> 16, value >> 8 & 255, value & 255)
        nearest = min(labels, key=lambda label: _distance(label.colour, colour))
        distance = _distance(nearest.colour, colour) ** 0.5
        near = f"nearest is {nearest.name} {nearest.colour}, {distance:.0f} away"
        shown.append(f"{colour} ({count} pixel{'s' * (count != 1)}; {near})")
    rest = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return Fault(
        f"colours that {LABEL_MAP} does not list: {', '.join(shown)}{rest}",
        f"add them to {LABEL_MAP}, export the map again as a PNG without smoothing, or make such pixels void with "
        "--data.unlisted void",
    )


def _distance(a: Sequence[int], b: Sequence[int]) -> int:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
