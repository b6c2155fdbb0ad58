"""The classes that a data set never annotates, where several are joined or a class map has more classes than the set.

What a model predicts of such a class in an image of such a set may be there: nobody looked. So it is neither right nor
wrong, and the figures of the class are those of the images that annotate it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from panoptic.segmentation import Categories
from pipelines.data.class_mapping import VOID, ClassMapping

KEY = "absent"
"""In a manifest's `source`: names of classes by the beginning of the names of images ("" = all others)."""

Absent = Mapping[str, Sequence[str]]


def absent_of(source: Mapping[str, Any]) -> dict[str, list[str]]:
    """The absent classes that a manifest's `source` states; those of an earlier version follow from its class map."""
    if KEY in source:
        return {prefix: list(names) for prefix, names in source[KEY].items()}
    record = source.get("class_map")
    if not isinstance(record, Mapping) or not isinstance(record.get("sets"), Mapping):
        return {}
    names, sets = [entry["name"] for entry in record["classes"]], record["sets"]
    found = {}
    for one, content in sets.items():
        used = set(content["targets"].values())
        if missing := [name for k, name in enumerate(names) if k not in used]:
            found[one if len(sets) > 1 else ""] = missing
    return found


def mapped_absent(own: Categories, mapping: ClassMapping, before: Absent) -> dict[str, list[str]]:
    """The absent classes of a set under a class map: a class is absent where all that become it are.

    Args:
        own: the set's classes.
        before: its absent classes, by the beginning of names.
    """
    found = {}
    for prefix, names in ({"": ()} | dict(before)).items():
        annotated = {t for name, t in zip(own.names, mapping.targets, strict=True) if t != VOID and name not in names}
        missing = [name for k, name in enumerate(mapping.categories.names) if k not in annotated]
        if missing or prefix:
            found[prefix] = missing
    return found


def joined_absent(parts: Mapping[str, Absent]) -> dict[str, list[str]]:
    """The absent classes of joined sets, whose images are called SET/NAME."""
    return {
        f"{one}/{prefix}" if prefix else one: list(names)
        for one, part in parts.items()
        for prefix, names in part.items()
    }


def absent_labels(source: Mapping[str, Any], categories: Categories, names: Sequence[str]) -> list[frozenset[int]]:
    """For each image, by its name, the positions in `categories` of the classes that its set never annotates."""
    absent = absent_of(source)
    if not absent:
        return [frozenset()] * len(names)
    places = {name: k for k, name in enumerate(categories.names)}
    labels = {p: frozenset(places[n] for n in missing if n in places) for p, missing in absent.items()}
    prefixes = sorted(labels, key=len, reverse=True)
    return [
        next((labels[prefix] for prefix in prefixes if not prefix or name.startswith(f"{prefix}/")), frozenset())
        for name in names
    ]
