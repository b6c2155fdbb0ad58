"""Names of files that are made of names of images: safe on every storage, and no two equal."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

LONGEST = 180
"""Bytes of a name without suffix; filesystems take 255, of which suffixes and temporary names need some."""


def safe_name(name: str) -> str:
    """A name without characters that stand for something in URIs, paths or terminals.

    Letters and digits of any script, `.`, `_`, `-` and blanks stay; `/` and all else become `_`, as does a leading
    point. A name that is too long is cut, and ends in a hash of the whole.
    """
    text = re.sub(r"[^\w.\- ]", "_", name)
    text = shortened(re.sub(r"^[. ]", "_", text))
    return text or "_"


def shortened(name: str, longest: int = LONGEST) -> str:
    """The name, cut and with a hash of the whole behind it where it has more than `longest` bytes."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= longest:
        return name
    return f"{data[: longest - 9].decode(errors='ignore')}_{hashlib.sha256(data).hexdigest()[:8]}"


class PictureNames:
    """Gives each image a file name of its own; the same images in the same order get the same names."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def add(self, name: str) -> str:
        """The safe stem of an image's file name; with its suffix, folder or a number where another image has it."""
        path = PurePosixPath(name)
        suffix = path.suffix[1:]
        wanted = (path.stem, f"{path.stem}_{suffix}" if suffix else "", f"{path.parent.name}_{path.stem}")
        candidates = [safe_name(candidate) for candidate in wanted if candidate]
        unique = next((candidate for candidate in candidates if not self._has(candidate)), "")
        unique = unique or free(candidates[0], self._taken)
        self._taken.add(unique.casefold())
        return unique

    def _has(self, name: str) -> bool:
        return name.casefold() in self._taken


def free(wanted: str, taken: set[str]) -> str:
    """`wanted`, with the first number behind it that makes it a name of its own where it is none."""
    name, number = wanted, 1
    while name in taken or name.casefold() in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name
