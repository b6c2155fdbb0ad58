"""COCO-panoptic: one JSON, a folder of PNG id maps, a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Literal

from pipelines.cluster import storage
from pipelines.data.config import Orientation
from pipelines.data.readers.archive import readable
from pipelines.data.readers.coco_source import categories_of, coco_source, public_set, read_json
from pipelines.data.readers.places import holding, image_places, prefixes, tree_and_file
from pipelines.data.readers.source import Source, decode_coco
from pipelines.data.readers.tree import Folder, given


def coco_panoptic(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    pngs: storage.Uri = "",
    images: storage.Uri = "",
    things: Sequence[str] = (),
    background: str = "",
    exif: Literal["auto"] | Orientation = "auto",
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
        background: name of a class that is kept although it is called background.
        exif: the frame of the maps where an EXIF orientation leaves the size of a photograph; by default that of the
            stored pixels for the classes of a public data set, else that of the upright image.

    Raises:
        ValueError: a file or folder is missing (naming every place looked at), or the JSON cannot be read as
            COCO-panoptic. What is wrong with single images is in `Source.problems` instead.
    """
    tree, json_file = tree_and_file(root, json_file)
    if json_file:
        at, path = given(tree, json_file, "--data.json-file")
    else:
        at, path = tree, tree.one(_json_places(split), "annotation file", "--data.json-file")
    file = readable(at.address(path))
    content = read_json(at.address(path))
    categories = categories_of(content, file, things, background)
    names = [image["file_name"] for image in content.images[:20]]
    first = islice(content.annotations, 20)
    maps = [name for annotation in first if (name := annotation.get("file_name"))]
    beside = path.rpartition("/")[0]
    if pngs:
        png_folder = Folder(*given(tree, pngs, "--data.pngs"))
    else:
        places = _png_places(beside, path.rsplit("/", 1)[-1].removesuffix(".json"))
        png_folder = Folder(at, holding(at, places, [beside], maps, "folder of PNG id maps", "--data.pngs"))
    if images:
        image_folder = Folder(*given(tree, images, "--data.images"))
    else:
        places = image_places(split)
        image_folder = Folder(tree, holding(tree, places, [beside], names, "folder of images", "--data.images"))
    return coco_source(
        content,
        file,
        image_folder,
        png_folder,
        categories,
        reader="coco",
        root=tree.root,
        split=split,
        orientation=exif if exif != "auto" else "stored" if public_set(categories) else "applied",
        decode=partial(decode_coco, covered=True) if public_set(categories) == "ade20k" else decode_coco,
    )


def _json_places(split: str) -> list[str]:
    return [f"annotations/panoptic_{split}.json", f"panoptic_{split}.json"]


def _png_places(folder: str, stem: str) -> list[str]:
    stems = [prefix for prefix in prefixes(stem) if prefix != "panoptic"] or [stem]
    beside = [f"{folder}/{prefix}".lstrip("/") for prefix in stems]
    twice = [f"{place}/{place.rsplit('/', 1)[-1]}" for place in beside]
    return [*beside, *twice, *(f"annotations/{prefix}" for prefix in stems), *stems]
