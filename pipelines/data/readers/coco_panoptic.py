"""COCO-panoptic: one JSON, a folder of PNG id maps, a folder of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from pipelines.cluster import storage
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_source import categories_of, coco_source, orientation_of, read_json
from pipelines.data.readers.source import Orientation, Source
from pipelines.data.readers.tree import Folder, Tree, given


def coco_panoptic(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    pngs: storage.Uri = "",
    images: storage.Uri = "",
    things: Sequence[str] = (),
    exif: Orientation | None = None,
) -> Source:
    """A COCO-panoptic dataset: one JSON, a folder of PNG id maps, a folder of images; local or on S3, zipped or not.

    Looked for below `root`, in folders and zips up to three further down, where `val` also serves a split called
    `val_novel`:
        annotations/panoptic_{split}.json, or panoptic_{split}.json;
        a folder panoptic_{split} beside it, in annotations/, or in a folder of the same name;
        images/{split}, {split} (as COCO ships it: train2017/ beside annotations/), images, or beside the JSON.

    Args:
        root: the dataset's folder, a zip, or its JSON.
        split: e.g. "train", "train2017".
        json_file, pngs, images: where the dataset keeps them elsewhere.
        things: names of the classes that are things, where the JSON does not say it or says it wrong.
        exif: the frame of the maps where an EXIF orientation leaves the size of a photograph; by default that of the
            stored pixels for the classes of a public data set, else that of the upright image.

    Raises:
        ValueError: a file or folder is missing (naming every place looked at), or the JSON cannot be read as
            COCO-panoptic. What is wrong with single images is in `Source.problems` instead.
    """
    tree, json_file = root_of_json(root, json_file)
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        at, path = tree, tree.one(_json_places(split), "annotation file", "--data.json-file")
    file = readable(at.address(path))
    content = read_json(at.address(path))
    categories = categories_of(content, file, things)
    names = [image["file_name"] for image in content.images[:20]]
    first = islice(content.annotations, 20)
    maps = [name for annotation in first if (name := annotation.get("file_name"))]
    beside = path.rpartition("/")[0]
    if pngs:
        png_folder = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        places = _png_places(beside, path.rsplit("/", 1)[-1].removesuffix(".json"))
        png_folder = Folder(at, _holding(at, places, [beside], maps, "folder of PNG id maps", "--data.pngs"))
    if images:
        image_folder = Folder(*given(tree, images, "--data.images"))
    else:
        places = _image_places(split)
        image_folder = Folder(tree, _holding(tree, places, [beside], names, "folder of images", "--data.images"))
    return coco_source(
        content,
        file,
        image_folder,
        png_folder,
        categories,
        reader="coco",
        root=tree.root,
        split=split,
        orientation=exif or orientation_of(categories),
    )


def root_of_json(root: storage.Uri, json_file: storage.Uri) -> tuple[Tree, storage.Uri]:
    """The tree of a data set, and its JSON: a JSON may be given as the root, and then its folder is the data set."""
    text = storage.absolute(root)
    if text.lower().endswith(".json") and not json_file and not storage.is_folder(text):
        return Tree(text.rsplit("/", 1)[0] or "/"), text
    return Tree(text), json_file


def _prefixes(name: str) -> list[str]:
    """`val_novel` -> [`val_novel`, `val`]: a subset of a split keeps its files with the split's."""
    parts = name.split("_")
    return ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _json_places(split: str) -> list[str]:
    return [f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"]


def _png_places(folder: str, stem: str) -> list[str]:
    prefixes = [prefix for prefix in _prefixes(stem) if prefix != "panoptic"] or [stem]
    beside = [f"{folder}/{prefix}".lstrip("/") for prefix in prefixes]
    twice = [f"{place}/{place.rsplit('/', 1)[-1]}" for place in beside]
    return [*beside, *twice, *(f"annotations/{prefix}" for prefix in prefixes), *prefixes]


def _image_places(split: str) -> list[str]:
    prefixes = _prefixes(split)
    return [*(f"images/{prefix}" for prefix in prefixes), *prefixes, "images"]


def _holding(
    tree: Tree, places: Sequence[str], further: Iterable[str], names: Sequence[str], what: str, option: str
) -> str:
    """The place that holds one of some files, else one of `further` that does, else the first place that exists."""
    names = [name.replace("\\", "/") for name in names if "://" not in name and "\0" not in name]

    def holds(path: str) -> bool:
        return any(tree.is_file(f"{path}/{name}".lstrip("/")) for name in names)

    places = list(dict.fromkeys(places))
    hits = tree.find(places, holds) or [place for place in further if holds(place)]
    if hits and len(hits) == 1:
        return hits[0]
    return tree.one(places, what, option, holds if hits else tree.is_folder)
