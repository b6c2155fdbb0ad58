"""Room on disks: what is free, what is needed, and whether an error says that a disk is full."""

from __future__ import annotations

import errno
import os
import shutil

from pipelines.cluster import storage
from pipelines.cluster.causes import causes

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Codes of the operating system for a full disk and a used-up quota."""

MESSAGES = ("No space left on device", "Disk quota exceeded", "Local disk is full", "database or disk is full")
"""Words of a full disk in errors without its code: of pyarrow, of Ray, of SQLite and those that came as text."""


class DiskFull(OSError):
    """A disk is full, or too small for what is about to be written; the message says which, and the remedy."""


def free_bytes(uri: storage.Uri) -> int | None:
    """Bytes that can still be written below a folder, which need not exist yet; None on S3, which has no such number.

    Raises:
        ValueError: `uri` is no URI.
    """
    path = storage.absolute(uri)
    if "://" in path:
        return None
    return shutil.disk_usage(_existing(path)).free


def check_room(uri: storage.Uri, needed: int, what: str) -> None:
    """Refuse to begin what will fill a disk. Nothing is checked on S3.

    Args:
        uri: the folder that will be written to.
        needed: bytes.
        what: needs them, for the error message: "the shards of split train".

    Raises:
        DiskFull: names the folder, what is needed and what is free.
    """
    free = free_bytes(uri)
    if free is not None and free < needed:
        raise DiskFull(f"{storage.absolute(uri)}: {what} need {size(needed)}, {size(free)} are free. {REMEDY}")


def full(uri: storage.Uri, needed: int, what: str) -> DiskFull:
    """The error of a write that found the disk of `uri` full; arguments as of `check_room`."""
    free = free_bytes(uri)
    left = "" if free is None else f", {size(free)} are free"
    return DiskFull(f"{storage.absolute(uri)}: the disk is full; {what} need {size(needed)}{left}. {REMEDY}")


REMEDY = "Make room there, and the same command goes on"


def size(count: int) -> str:
    """A number of bytes as people read it: 2.5 GiB, 300 MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def find_full(error: BaseException) -> BaseException | None:
    """The error of a full disk among an error and those that it began with: a `DiskFull` if there is one."""
    found = parts(error)
    return next((part for part in found if isinstance(part, DiskFull)), next(filter(_says_full, found), None))


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return names_full(str(error))


def names_full(text: str) -> bool:
    """True if a message says that a disk is full."""
    return any(message in text for message in MESSAGES)


def parts(error: BaseException) -> list[BaseException]:
    """An error and everything that it began with, each once."""
    return _parts(error, set())


def _parts(error: BaseException, seen: set[int]) -> list[BaseException]:
    if id(error) in seen:
        return []
    seen.add(id(error))
    return [error, *(part for cause in causes(error) for part in _parts(cause, seen))]


def _existing(path: str) -> str:
    """The nearest folder above a path, or itself, that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
