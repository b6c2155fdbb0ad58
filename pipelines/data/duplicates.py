"""Photographs that two splits share: a model is evaluated on what it was trained on, and its figures say nothing.

Beside the manifest of a set lies a key of each photograph, in the order of its rows: of its length and its last bytes,
which compression makes its own. Sets that were prepared before this file was written are not compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pipelines.cluster import storage
from pipelines.data.manifest import Manifest, is_shards
from pipelines.data.shard_index import list_images

logger = logging.getLogger(__name__)

PHOTOGRAPHS = "_photographs.txt"
"""The file of keys. `pyarrow.dataset` leaves out names that begin with an underscore."""

_NEIGHBOURS = 32
"""Folders beside a set that are looked into."""


def write_keys(folder: storage.Uri, keys: Iterable[str]) -> None:
    """Keep the keys of the photographs of a set, a line each."""
    storage.write_bytes(storage.join(folder, PHOTOGRAPHS), "".join(f"{key}\n" for key in keys).encode())


def read_keys(folder: storage.Uri) -> list[str]:
    """The keys of the photographs of a set; none where they were not kept."""
    try:
        return storage.read_bytes(storage.join(folder, PHOTOGRAPHS)).decode().split()
    except FileNotFoundError:
        return []


def shared_photographs(one: Manifest, other: Manifest) -> list[str]:
    """The names of the photographs of a set that another one has, too, byte by byte, whatever it calls them."""
    theirs = set(read_keys(other.uri)) if other.uri != one.uri else set()
    places = [place for place, key in enumerate(read_keys(one.uri)) if key in theirs] if theirs else []
    if not places:
        return []
    names = [name for name, _ in list_images(one.shard_set)]
    return [names[place] for place in places]


def warn_of_shared(one: Manifest, other: Manifest) -> int:
    """Warn of the photographs of a set that another split has, too; returns their number."""
    shared = shared_photographs(one, other)
    if shared:
        rest = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        logger.warning(
            "%d photographs of split %s are in split %s (%s), too: %s%s. What a model was trained on says nothing when "
            "it is evaluated; take them out of one of the two",
            *(len(shared), one.split, other.split, other.uri, ", ".join(shared[:3]), rest),
        )
    return len(shared)


def warn_of_neighbours(manifest: Manifest) -> int:
    """Warn of photographs that a set shares with other splits in folders beside it; returns their number."""
    above, _, own = storage.absolute(manifest.uri).rstrip("/").rpartition("/")
    count = 0
    for name in storage.list_folder(above)[1][:_NEIGHBOURS]:
        folder = storage.join(above, name)
        if name != own and is_shards(folder):
            try:
                other = Manifest.load(folder, files=False)
            except ValueError:  # of another version: training on it says so
                continue
            if other.split != manifest.split:
                count += warn_of_shared(manifest, other)
    return count
