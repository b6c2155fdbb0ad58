"""Sources under a class map, and several sources joined to one.

Both are wrappers of what readers give: rows are renamed and counted anew, and `decode` calls the reader's own and maps
what it returns. So every reader takes part, and shards are written once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from panoptic.segmentation import Categories
from pipelines.cluster import storage
from pipelines.data.absent import KEY as ABSENT
from pipelines.data.absent import absent_of, joined_absent, mapped_absent
from pipelines.data.class_map import KEEP, ClassesOf, load, resolve
from pipelines.data.class_mapping import ClassMapping
from pipelines.data.config import AUTO, ReaderOptions, check_readers
from pipelines.data.copies import KEY, Copies
from pipelines.data.readers import read_source
from pipelines.data.readers.options import GENERAL
from pipelines.data.readers.source import COLUMNS, Decode, Source, Truth
from pipelines.data.shard_source import shard_source

logger = logging.getLogger(__name__)

JOINED = "joined"
"""`reader` of a source that is made of several."""

NAMED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)=(?P<root>.+)")
"""A root with a name of its own: `street=/data/cityscapes`."""


@dataclass(frozen=True)
class Roots:
    """The data sets that are read: one, or several that are joined."""

    roots: tuple[str, ...]
    """Folders, each alone or as NAME=FOLDER."""
    readers: tuple[str, ...] = (AUTO,)
    """The format of each folder, or one for all."""
    class_map: str = ""
    """File of the class map; "" = the classes as they are."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the reader, as `ReaderOptions.given` gives them."""

    @classmethod
    def of(
        cls,
        root: storage.Uri | Sequence[storage.Uri],
        reader: str | Sequence[str] = AUTO,
        class_map: str = "",
        options: ReaderOptions | None = None,
    ) -> Roots:
        """The record of one root or of several.

        Raises:
            ValueError: there is no root, or another number of readers than of roots.
        """
        roots = tuple(map(str, [root] if isinstance(root, str | os.PathLike) else root))
        readers = (reader,) if isinstance(reader, str) else tuple(reader)
        if not roots or len(readers) not in (1, len(roots)):
            raise ValueError(
                f"--data.root names {len(roots)} data sets and --data.reader {len(readers)} formats; give one format "
                "for all of them, or one for each"
            )
        check_readers(readers)
        return cls(roots, readers, class_map, options.given() if options else {})

    @property
    def changed(self) -> bool:
        """True where the classes or names of the shards are not the data set's own."""
        return len(self.roots) > 1 or bool(self.class_map)

    @property
    def folder(self) -> str:
        """A name for the folder of shards that are prepared from these roots: the same roots find them again."""
        keys = [self.places[0]] if not self.changed else [*self.names, *self.places, *self.readers]
        if self.class_map:
            keys.append(load(self.class_map).digest)
        if self.options:
            keys.append(json.dumps(self.options, sort_keys=True))
        name = "+".join(self.names) if self.changed else PurePosixPath(self.places[0]).name
        return f"{name[:60]}-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:8]}"

    @property
    def places(self) -> tuple[str, ...]:
        """The absolute folder of each."""
        return tuple(storage.absolute(_split_name(root)[1]) for root in self.roots)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each set: what stands before `=`, else the last part of the folder.

        Raises:
            ValueError: two are the same.
        """
        names = tuple(_split_name(root)[0] for root in self.roots)
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(
                    f"--data.root: {count} data sets are called {name}; name them, as {name}1={self.places[0]}"
                )
        return names

    def open(self, split: str | Sequence[str]) -> Source:
        """Read the annotations: one source, whose classes are those of the class map.

        Args:
            split: the name of the split, or one for each root.

        Raises:
            ValueError: a reader refuses its root, or the class map does not fit.
        """
        splits = (split,) * len(self.roots) if isinstance(split, str) else tuple(split)
        if len(splits) == 1:
            splits = splits * len(self.roots)
        if len(splits) != len(self.roots):
            raise ValueError(f"--data.split names {len(splits)} splits for {len(self.roots)} roots; give one for each")
        if len(self.roots) > 1 and (own := [name for name in self.options if name not in GENERAL]):
            options = ", ".join(f"--data.{name.replace('_', '-')}" for name in own)
            raise ValueError(f"{options}: cannot be given for several roots; prepare each for itself")
        readers = self.readers * len(self.roots) if len(self.readers) == 1 else self.readers
        asked = zip(readers, self.places, splits, strict=True)
        sources = [_source(reader, root, one, self.options) for reader, root, one in asked]
        return sources[0] if not self.changed else self._mapped(sources)

    def _mapped(self, sources: Sequence[Source]) -> Source:
        class_map = load(self.class_map) if self.class_map else KEEP
        named = zip(self.names, sources, strict=True)
        resolved = resolve(class_map, [ClassesOf(name, one.categories, one.reader) for name, one in named])
        for note in resolved.notes:
            logger.warning("note: %s", note)
        about: dict[str, Any] = {"class_map": {"file": self.class_map, **resolved.record}}
        absent = {
            name: mapped_absent(one.categories, mapping, absent_of(one.about))
            for name, one, mapping in zip(self.names, sources, resolved.mappings, strict=True)
        }
        if len(sources) == 1:
            return mapped(sources[0], resolved.mappings[0], {**about, ABSENT: absent[self.names[0]]})
        return joined(self.names, sources, resolved.mappings, {**about, ABSENT: joined_absent(absent)})


def _source(reader: str, root: str, split: str, options: Mapping[str, Any]) -> Source:
    """The source that a reader makes of a root, or that prepared shards are.

    Raises:
        ValueError: the reader refuses the root, or the shards cannot be a source.
    """
    shards = shard_source(root, split)
    if shards is None:
        return read_source(reader, root, split, options)
    if options:
        names = ", ".join(f"--data.{name.replace('_', '-')}" for name in options)
        raise ValueError(f"{names}: {root} holds prepared shards, which no reader reads; leave it out")
    return shards


def _split_name(root: str) -> tuple[str, str]:
    """The name of a set and its folder."""
    match = NAMED.fullmatch(root)
    if match:
        return match["name"], match["root"]
    return PurePosixPath(storage.absolute(root)).name or "data", root


def absolute(root: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Roots whose folders are absolute; their names stay."""
    if not isinstance(root, str):
        return tuple(str(absolute(one)) for one in root)
    match = NAMED.fullmatch(root)
    return f"{match['name']}={storage.absolute(match['root'])}" if match else storage.absolute(root)


def mapped(source: Source, mapping: ClassMapping, about: Mapping[str, Any]) -> Source:
    """A source whose segmentations are in the target's classes.

    Args:
        about: with `class_map`, what the manifest keeps of it, and its `sha256`.
    """
    return replace(
        source,
        categories=mapping.categories,
        decode=partial(decode_mapped, inner=source.decode, own=source.categories, mapping=mapping),
        fingerprint=_hash([source.fingerprint, about["class_map"]["sha256"]]),
        about={**source.about, **about},
    )


def joined(
    names: Sequence[str], sources: Sequence[Source], mappings: Sequence[ClassMapping], about: Mapping[str, Any]
) -> Source:
    """One source of several: their rows one after the other, under names that tell the set.

    Images are called `SET/NAME` and have new ids, from 1 in this order, so that nothing collides.

    Args:
        names: of the sets.
        mappings: of each set's classes to the same list.
        about: as for `mapped`.
    """
    decodes = tuple(
        partial(decode_mapped, inner=source.decode, own=source.categories, mapping=mapping)
        for source, mapping in zip(sources, mappings, strict=True)
    )
    rows = pa.concat_tables([_renamed(k, name, one) for k, (name, one) in enumerate(zip(names, sources, strict=True))])
    rows = rows.append_column("image_id", pa.array(range(1, rows.num_rows + 1), pa.int64()))
    repairs: Counter[str] = Counter()
    for source in sources:
        repairs.update(source.repairs)
    splits = list(dict.fromkeys(source.split for source in sources))
    sets = [
        {"name": name, "reader": one.reader, "root": one.root, "split": one.split, "images": one.rows.num_rows}
        for name, one in zip(names, sources, strict=True)
    ]
    return Source(
        reader=JOINED,
        root=" ".join(source.root for source in sources),
        split="+".join(splits),
        categories=mappings[0].categories,
        rows=rows,
        problems=tuple(
            replace(problem, name=f"{name}/{problem.name}")
            for name, source in zip(names, sources, strict=True)
            for problem in source.problems
        ),
        unannotated=tuple(f"{n}/{file}" for n, one in zip(names, sources, strict=True) for file in one.unannotated),
        bytes=sum(source.bytes for source in sources),
        fingerprint=_hash([*names, *(source.fingerprint for source in sources), about["class_map"]["sha256"]]),
        repairs=dict(repairs),
        decode=partial(decode_joined, decodes=decodes),
        about={**about, "sets": sets},
    )


def _renamed(number: int, name: str, source: Source) -> pa.Table:
    """The rows of a set without ids, with its name before theirs, its number, and its frame of maps."""
    rows = source.rows.select([column for column in COLUMNS if column != "image_id"])
    renamed = pc.binary_join_element_wise(pa.scalar(name), rows["name"], "/")  # pyright: ignore[reportAttributeAccessIssue]
    rows = rows.set_column(rows.schema.get_field_index("name"), "name", renamed)
    rows = rows.append_column("set", pa.array([number] * rows.num_rows, pa.int32()))
    return rows.append_column("orientation", pa.array([source.orientation] * rows.num_rows, pa.string()))


BYTES = {"raw": 3.0, "png": 1.5, "jpeg": 0.5}
"""Bytes of a stored pixel of a copy, about."""


def with_copies(source: Source, copies: Copies) -> Source:
    """A source whose rows are followed by their augmented copies, or replaced by them."""
    height, width = copies.augment.crop
    pixels = [height * width]
    if not pixels[0]:
        sizes = zip(source.rows["height"].to_pylist(), source.rows["width"].to_pylist(), strict=True)
        pixels = [h * w for h, w in sizes if h and w] or [0]
    mean = sum(pixels) / len(pixels)
    added = int(source.rows.num_rows * copies.augment.copies * mean * BYTES[copies.augment.stored])
    return replace(
        source,
        copies=copies,
        bytes=added + source.bytes * copies.augment.originals,
        fingerprint=_hash([source.fingerprint, json.dumps(copies.record())]),
        about={**source.about, KEY: copies.record()},
    )


def decode_mapped(
    row: Mapping[str, Any],
    read: Callable[[str], bytes],
    categories: Categories,
    *,
    inner: Decode,
    own: Categories,
    mapping: ClassMapping,
) -> Truth:
    """The truth of a row in the target's classes; a `Decode`.

    Args:
        inner, own: of the source that is mapped.
    """
    truth = inner(row, read, own)
    return truth._replace(segmentation=mapping.segmentation(truth.segmentation), areas=None)


def decode_joined(
    row: Mapping[str, Any], read: Callable[[str], bytes], categories: Categories, *, decodes: Sequence[Decode]
) -> Truth:
    """The truth of a row of the set that its column `set` names; a `Decode`."""
    return decodes[row["set"]](row, read, categories)


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
