"""The places where people keep the parts of data sets of COCO's form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipelines.cluster import storage
from pipelines.data.readers.tree import Tree


def tree_and_file(
    root: storage.Uri, annotation_file: storage.Uri, extension: str = ".json"
) -> tuple[Tree, storage.Uri]:
    """The tree of a data set, and its annotation file, which may be given as the root: then its folder is the tree."""
    text = storage.absolute(root)
    if text.lower().endswith(extension) and not annotation_file and not storage.is_folder(text):
        return Tree(text.rsplit("/", 1)[0] or "/"), text
    return Tree(text), annotation_file


def prefixes(name: str) -> list[str]:
    """`val_novel` -> [`val_novel`, `val`]: a subset of a split keeps its files with the split's."""
    parts = name.split("_")
    return ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]


def image_places(split: str) -> list[str]:
    """Folders of photographs, the usual ones first."""
    names = prefixes(split)
    return [*(f"images/{name}" for name in names), *names, "images"]


def holding(
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
