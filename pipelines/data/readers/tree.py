"""A data set as its owner ships it, seen as one tree of files: a folder, a zip, or several zips side by side.

Zips are read where they lie. Their members stand in the tree where unpacking them in place would put them, so a reader
finds the same paths in a folder of zips as in the unpacked folder; a file that is unpacked already counts before a
member of the same path. A folder or an archive is listed once, and only when something is looked for in it.
"""

from __future__ import annotations

import logging
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import PurePosixPath

from pipelines.cluster import storage
from pipelines.data.readers.archive import (
    Member,
    is_junk,
    is_stored,
    is_zip,
    list_members,
    list_tar,
    read_file,
    readable,
)
from pipelines.data.readers.source import Stamps

logger = logging.getLogger(__name__)

DEPTH = 3
"""Folders around a data set that are looked through: people keep one a zip, and unpackers make one."""

_IMAGES = (".png", ".jpg", ".jpeg")


class Tree:
    """The files below a root.

    Args:
        root: a folder or a zip, local or on S3.

    Raises:
        ValueError: there is no such folder or file, or it is a file but no zip.
    """

    def __init__(self, root: storage.Uri) -> None:
        self.root = storage.absolute(root)
        self._listed: dict[str, tuple[Stamps, list[str]]] = {}
        self._members: dict[str, tuple[Member, str, tuple[int, int]]] = {}
        self._member_folders: dict[str, set[str]] = defaultdict(set)
        self._pending: dict[str, tuple[Member, tuple[int, int]]] = {}
        self.unreadable: list[str] = []
        """Archives that could not be read, and why."""
        self._is_zip = not storage.is_folder(self.root)
        self._mounted = False
        if self._is_zip:
            if not storage.exists(self.root):
                raise ValueError(f"{self.root}: no such file or folder")
            if not is_zip(self.root):
                raise ValueError(
                    f"{self.root}: neither a folder nor a zip archive; give the folder of the data set or its zip (if "
                    "it is one, the download is not complete)"
                )
            self.mount()

    def address(self, path: str) -> str:
        """The address of a file of the tree, for `read_file`."""
        if self._in_folder(path) or path not in self._members:
            return storage.join(self.root, path)
        member, inside, _ = self._members[path]
        return member.address(inside)

    def readable(self, path: str) -> str:
        """A path of the tree as messages show it, whether it is there or not."""
        return readable(self.address(path)) if path in self._members else storage.join(self.root, path).rstrip("/")

    def read(self, path: str) -> bytes:
        """The bytes of a file of the tree."""
        return read_file(self.address(path))

    def is_file(self, path: str) -> bool:
        """True if the tree has this file, as far as it is listed (see `mount`)."""
        return path in self._members or self._in_folder(path)

    def is_folder(self, path: str) -> bool:
        """True if the tree has this folder, as far as it is listed."""
        above, _, name = path.rpartition("/")
        return not path or path in self._member_folders or name in self.folders(above)

    def folders(self, path: str = "") -> list[str]:
        """The names of the folders right in a folder, sorted."""
        found = {name for name in self._list(path)[1] if not is_junk(name)}
        return sorted(found | self._member_folders.get(path, set()))

    def files(self, path: str = "") -> Stamps:
        """Every file below a folder: its path relative to the folder -> bytes and time of change."""
        head = f"{path}/" if path else ""
        members = ((name, stamp) for name, (_, _, stamp) in self._members.items() if name.startswith(head))
        found = {name.removeprefix(head): stamp for name, stamp in members}
        if not self._is_zip and self._has_folder(path):
            files, folders = self._list(path)
            stamps = storage.list_stamps(storage.join(self.root, path) if path else self.root) if folders else files
            found |= {name: stamp for name, stamp in stamps.items() if not is_junk(name)}
        return found

    def names(self, path: str = "") -> list[str]:
        """The names of the files right in a folder, sorted."""
        found = {name for name in self._list(path)[0] if not is_junk(name)}
        head = f"{path}/" if path else ""
        members = (name.removeprefix(head) for name in self._members if name.startswith(head))
        return sorted(found | {name for name in members if "/" not in name})

    def find(self, anchors: Sequence[str], accept: Callable[[str], bool] | None = None) -> list[str]:
        """The paths of the tree that end in one of some relative paths, from those nearest to the root.

        Args:
            anchors: relative paths of files or folders, the preferred first.
            accept: a further condition on a path that is there.

        Returns:
            The hits of the first anchor that has any at the least depth; several where wrapper folders hold the same.
        """
        accept = accept or (lambda path: True)
        for depth in range(DEPTH + 1):
            for prepare in (lambda: None, self.mount, lambda: self.unpack(anchors)):
                prepare()
                for anchor in anchors:
                    hits = [
                        path
                        for above in self._at_depth(depth)
                        if (self.is_file(path := _below(above, anchor)) or self.is_folder(path)) and accept(path)
                    ]
                    if hits:
                        return hits
        return []

    def one(self, anchors: Sequence[str], what: str, option: str, accept: Callable[[str], bool] | None = None) -> str:
        """The one path that `find` gives.

        Raises:
            ValueError: none, naming every path looked for, or several, naming them; both name `option`.
        """
        hits = self.find(anchors, accept)
        if len(hits) > 1:
            listed = "".join(f"\n  {self.readable(path)}" for path in hits)
            raise ValueError(f"{len(hits)} places hold a {what}:{listed}\nName the one that is meant with {option}.")
        if not hits:
            listed = "".join(f"\n  {storage.join(self.root, anchor)}" for anchor in anchors)
            broken = "".join(f"\n{reason}" for reason in self.unreadable)
            raise ValueError(
                f"no {what}; looked for{listed}\nin folders, in zips beside them, and up to {DEPTH} folders further "
                f"down. Check the folder and the split, or name it with {option}.{broken}"
            )
        return hits[0]

    def mount(self) -> None:
        """List the archives of the root and of the folders near to it, unless that is done."""
        if self._mounted:
            return
        self._mounted = True
        if self._is_zip:
            self._mount(self.root, "", (0, 0))
            return
        for depth in range(DEPTH):
            for folder in list(self._at_depth(depth)):
                for name, stamp in sorted(self._list(folder)[0].items()):
                    if name.lower().endswith((".zip", ".tar")) and not is_junk(name):
                        self._mount(storage.join(self.root, path := _below(folder, name)), path, stamp)

    def unpack(self, anchors: Sequence[str]) -> None:
        """List the compressed zips in zips that are called like a part of one of some paths.

        Each is unpacked into the folder for temporary files, so those that nobody asks for are left alone.
        """
        parts = {part for anchor in anchors for part in anchor.split("/")}
        for path in [path for path in self._pending if PurePosixPath(path).stem in parts]:
            member, stamp = self._pending.pop(path)
            self._mount(member.address(path), path, stamp)

    def _mount(self, container: str, path: str, stamp: tuple[int, int]) -> None:
        """Add the members of an archive that lies at `path`, and of those that are stored in it."""
        try:
            members = list_tar(container) if container.lower().endswith(".tar") else list_members(container)
        except (ValueError, OSError) as error:
            self.unreadable.append(str(error))
            if container == self.root:
                raise
            logger.warning("%s", error)
            return
        above = path.rpartition("/")[0]
        if path and any("/" not in name and name.lower().endswith(_IMAGES) for name in members):
            above = _below(above, PurePosixPath(path).stem)  # a zip without a folder of its own
        for name, member in members.items():
            place, own = _below(above, name), (member.size, stamp[1])
            if name.lower().endswith(".zip"):
                if is_stored(member):
                    self._mount(member.address(name), place, own)
                else:
                    self._pending[place] = member, own
                continue
            self._members.setdefault(place, (member, name, own))
            parts = place.split("/")[:-1]
            for depth, part in enumerate(parts):
                self._member_folders["/".join(parts[:depth])].add(part)
            self._member_folders["/".join(parts)]  # exists, though no folder lies in it

    def _at_depth(self, depth: int) -> Iterator[str]:
        """The folders that lie `depth` levels below the root."""
        if not depth:
            yield ""
            return
        for above in self._at_depth(depth - 1):
            yield from (_below(above, name) for name in self.folders(above))

    def _has_folder(self, path: str) -> bool:
        """True if the folder lies on the disk or the store, not in an archive only."""
        above, _, name = path.rpartition("/")
        return not path or name in self._list(above)[1]

    def _in_folder(self, path: str) -> bool:
        """True if the file lies on the disk or the store."""
        above, _, name = path.rpartition("/")
        return name in self._list(above)[0]

    def _list(self, path: str) -> tuple[Stamps, list[str]]:
        """The files and folders right in a folder of the disk or the store; none where there is no such folder."""
        if self._is_zip:
            return {}, []
        if path not in self._listed:
            found: tuple[Stamps, list[str]] = ({}, [])
            if self._has_folder(path):
                found = storage.list_folder(storage.join(self.root, path) if path else self.root)
            self._listed[path] = found
        return self._listed[path]


def _below(above: str, name: str) -> str:
    return f"{above}/{name}" if above and name else above or name


def given(tree: Tree, place: storage.Uri, option: str) -> tuple[Tree, str]:
    """A file or folder that an option names: where it is, or within the data set and its archives.

    Returns:
        a tree, and the path in it.

    Raises:
        ValueError: it is neither; names both places.
    """
    text = storage.absolute(place)
    if storage.exists(text):
        if storage.is_folder(text) or is_zip(text):
            return Tree(text), ""
        above, name = text.rsplit("/", 1)
        return Tree(above or "/"), name
    path = str(place).replace("\\", "/").strip("/")
    tree.mount()
    tree.unpack([path])
    if tree.is_file(path) or tree.is_folder(path):
        return tree, path
    raise ValueError(f"{option} {place}: neither {text} nor {storage.join(tree.root, path)} is there")


class Folder:
    """The files below one folder of a tree, and what a name that is not exactly one of theirs may mean."""

    def __init__(self, tree: Tree, path: str = "") -> None:
        self.tree, self.path = tree, path
        self.stamps = tree.files(path)
        self.uri = tree.readable(path) if path else tree.root

    def __contains__(self, name: str) -> bool:
        return name in self.stamps

    def address(self, name: str) -> str:
        """The address of one of the files."""
        return self.tree.address(_below(self.path, name))

    def read(self, name: str) -> bytes:
        """The bytes of one of the files."""
        return read_file(self.address(name))

    def match(self, name: str) -> str | None:
        """The file that a name means, None where none is, or several are, like it.

        Beside the name itself: with slashes for backslashes, without the folders before it, in other letters (case,
        Unicode form), or with another extension.
        """
        if name in self.stamps:
            return name
        for key in (_plain, _last, _stem):
            hits = self._by(key).get(key(name), ())
            if len(hits) == 1:
                return hits[0]
            if len(hits) > 1:
                return None
        return None

    def _by(self, key: Callable[[str], str]) -> dict[str, list[str]]:
        if key not in self._tables:
            table: dict[str, list[str]] = defaultdict(list)
            for path in self.stamps:
                if key is not _stem or path.lower().endswith(_IMAGES):
                    table[key(path)].append(path)
            self._tables[key] = table
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[Callable[[str], str], dict[str, list[str]]]:
        return {}

    @cached_property
    def _by_name(self) -> list[tuple[str, str]]:
        """(name without folders, path) of each file, sorted."""
        return sorted((path.rsplit("/", 1)[-1], path) for path in self.stamps)

    def lacks(self, name: str) -> str:
        """The words that say that a file is missing, where it was looked for, and which file there is most like it."""
        if not self.stamps:
            return f"{name} was looked for in {self.uri}, which is empty"
        last = name.replace("\\", "/").rsplit("/", 1)[-1]
        # in this order, the neighbours of a name have the most first letters in common with it
        place = bisect_left(self._by_name, (last, ""))
        nearby = self._by_name[max(place - 1, 0) : place + 1]
        _, path = max(nearby, key=lambda file: _common_letters(file[0], last))
        return f"{name} was looked for in {self.uri}, which holds {path}"


def _plain(name: str) -> str:
    """A path in one spelling."""
    parts = name.replace("\\", "/").split("/")
    return folded("/".join(part for part in parts if part not in ("", ".")))


def folded(name: str) -> str:
    """A name without the differences that file systems make: case, and the Unicode form of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _last(name: str) -> str:
    return _plain(name).rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    last = _last(name)
    return last.rsplit(".", 1)[0] if last.endswith(_IMAGES) else last


def _common_letters(a: str, b: str) -> int:
    """The number of first letters in which two names agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
