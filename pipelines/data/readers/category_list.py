"""The categories of a JSON before they become `Categories`: names that stand twice, and a class called background."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from panoptic.segmentation import count_repair

SAME_NAME = "categories that share their name with another one, told apart by their id in it"
UNUSED_BACKGROUND = "categories called background without a segment, left out"
"""Kinds of repairs, as the manifest adds them up."""

_BACKGROUND = ("background", "bg")


def checked_categories(
    entries: Any, file: str, uses: Callable[[], MutableMapping[Any, int]], repairs: MutableMapping[str, int], keep: str
) -> Any:
    """The entries with a name each of its own, and without a background that is no class.

    A pixel of no class is void. A class called background teaches a model to call what it knows nothing of by a name,
    so it stays only where it is asked for.

    Args:
        entries: the list of the JSON; what is no list of objects is returned as it is, to be refused.
        file: its name, for messages.
        uses: gives the number of annotations or segments of each category id.
        repairs: is added to.
        keep: the name of a class that stays, whatever it is called.

    Raises:
        ValueError: a class is called background and has segments; says how to drop or keep it.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return entries
    behind = [entry for entry in entries if _is_background(entry.get("name")) and entry.get("name") != keep]
    for entry in behind if len(behind) < len(entries) else ():
        if count := uses().get(entry.get("id"), 0):
            raise ValueError(
                f"{file}: the category {entry['name']!r} has {count} segments, but what is of no class is void (id 0), "
                "not a class of its own: drop it to void by taking its segments and the category out (with COCO "
                f"panoptic, --data.unlisted void then makes their pixels void), or keep it as a class with "
                f"--data.background {entry['name']}"
            )
        count_repair(repairs, UNUSED_BACKGROUND)
        entries = [other for other in entries if other is not entry]
    names = [str(entry.get("name")).strip() for entry in entries]
    twice = {name for name in names if names.count(name) > 1}
    ids = [entry.get("id") for entry in entries]
    if not twice or len(set(map(str, ids))) < len(ids):  # ids that stand twice are refused
        return entries
    count_repair(repairs, SAME_NAME, sum(name in twice for name in names))
    named = zip(entries, names, strict=True)
    return [{**entry, "name": f"{name} ({entry.get('id')})"} if name in twice else entry for entry, name in named]


def _is_background(name: Any) -> bool:
    return isinstance(name, str) and name.strip(" _").lower() in _BACKGROUND
