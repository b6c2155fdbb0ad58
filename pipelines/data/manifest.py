"""The manifest of a folder of shards: the description of its content, and the check of it when it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import indent
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import ConfigDict, Field, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from panoptic.metrics.text import text_table
from panoptic.segmentation import Categories
from pipelines.cluster import storage
from pipelines.data.readers.source import Problem
from pipelines.data.shard_file import ShardFile
from pipelines.data.shard_index import INDEX, REMEDY, ShardSet
from pipelines.data.statistics import Statistics, class_rows, percent

SCHEMA_VERSION = 2
"""Version of the form of manifest and shards; version 1 had Parquet files without an index."""
MANIFEST = "manifest.json"

SHOWN = 3
"""Problems of a manifest that an error names."""

WIDEST = 60
"""Characters of the column of names in a table of problems."""

SMALLEST_ROW = 67
"""Bytes of the smallest PNG: a row of a shard, which holds one, takes more."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow$")]
"""A file of the manifest's own folder."""


class Category(TypedDict):
    """An entry of the manifest's `categories`, as `Categories.to_coco` writes it."""

    id: int
    name: str
    isthing: Literal[0, 1]
    color: tuple[int, int, int]


CocoCategories = Annotated[
    Categories,
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_after_validator_function(
            Categories.from_coco, handler.generate_schema(list[Category])
        )
    ),
]
"""`Categories`, which the file has as COCO's list."""


@dataclass(frozen=True)
class Shard:
    """One Arrow file of a set."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: FileName
    """Relative to the manifest."""
    rows: Positive
    size: Positive
    """Bytes of the file."""
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, which describes a folder of shards; the annotations are the file's schema."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    schema_version: int
    split: str
    rows: Positive
    hash: Sha256
    """Hash of the content (names, image bytes, maps, labels, order, categories), whatever wrote it."""
    categories: CocoCategories
    shards: Annotated[tuple[Shard, ...], Len(1)]
    index: Sha256
    """Hash of the file that says where each row lies."""
    maximum_height: Positive
    maximum_width: Positive
    segments: tuple[Count, ...]
    """Number of segments of each class."""
    crowds: Count
    empty: Count
    """Images without a segment."""
    unannotated: Count
    """Images that the annotations list but do not annotate; left out."""
    skipped: tuple[Problem, ...]
    """Images that failed validation and were left out, where that was asked for."""
    area_mismatches: Count
    """Segments whose area in the annotations differs from their pixels (the area is never used)."""
    source: dict[str, Any]
    """reader, root, split and the fingerprint of files and options."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """Number of values and images that were read although they are not as the format asks, by kind."""
    warnings: Mapping[str, int] = field(default_factory=dict)
    """Number of images or segments in which something is odd without being wrong, by kind."""
    statistics: Statistics | None = None
    """Counts of pixels, classes and sizes; None in manifests of earlier versions."""
    uri: str = field(default="", compare=False)
    """The folder it was loaded from."""
    chosen: tuple[int, ...] = field(default=(), compare=False)
    """Rows of the shards that it stands for, in their order, where `part` chose some; () = all. Not in the file, nor is
    `whole_hash`; the counts of segments and pixels are those of all rows."""
    whole_hash: str = field(default="", compare=False)
    """Hash of all rows, where it stands for some."""

    @classmethod
    def load(cls, uri: storage.Uri, files: bool = True) -> Manifest:
        """Read the manifest of a folder of shards, and check it against its schema and the folder.

        Args:
            uri: the folder.
            files: compare it with the sizes of the files; what is in them is checked when they are opened.

        Raises:
            ValueError: no finished set of shards is there, another version of this software wrote it, or the manifest
                contradicts its schema, itself or the folder; names the file, the field and the remedy.
        """
        file = storage.join(storage.absolute(uri), MANIFEST)
        if not storage.exists(file):
            raise ValueError(f"{file}: not found, so {uri} holds no finished shards; run jobs/prepare.py to write them")
        manifest = replace(_parse(storage.read_bytes(file), file), uri=storage.absolute(uri))
        problems = _contradictions(manifest)
        if files and not problems:
            problems = _file_problems(manifest.shards, storage.list_stamps(uri))
        if problems:
            raise ValueError(f"{file}: {'; '.join(problems[:SHOWN])}; {REMEDY}")
        return manifest

    def to_json(self) -> bytes:
        """The text of `manifest.json`."""
        content = asdict(replace(self, categories=None))  # type: ignore[arg-type]
        del content["uri"], content["chosen"], content["whole_hash"]
        content["categories"] = self.categories.to_coco()
        return json.dumps(content, indent=1).encode()

    def part(self, chosen: Sequence[int]) -> Manifest:
        """The manifest of some rows, under a hash of its own, for evaluations; of all where none are chosen."""
        if not chosen:
            return self
        rows = tuple(chosen)
        own = hashlib.sha256(json.dumps([self.hash, rows]).encode()).hexdigest()
        return replace(self, rows=len(rows), chosen=rows, hash=own, whole_hash=self.hash)

    @property
    def whole(self) -> Manifest:
        """The manifest of all rows of the shards."""
        if not self.chosen:
            return self
        rows = sum(shard.rows for shard in self.shards)
        return replace(self, rows=rows, chosen=(), hash=self.whole_hash, whole_hash="")

    def stored_rows(self, numbers: Sequence[int]) -> Sequence[int]:
        """The rows of the shards that are these rows of the manifest."""
        return [self.chosen[number] for number in numbers] if self.chosen else numbers

    @property
    def files(self) -> tuple[str, ...]:
        """The URI of each shard, in order."""
        return tuple(storage.join(self.uri, shard.path) for shard in self.shards)

    @property
    def shard_set(self) -> ShardSet:
        """The shards as whoever reads them needs them."""
        files = (ShardFile(f, s.rows, s.size, s.sha256) for f, s in zip(self.files, self.shards, strict=True))
        return ShardSet(self.uri, tuple(files), self.index, len(self.categories))

    @property
    def notes(self) -> list[str]:
        """Lines about what is odd in the data without being wrong."""
        counts = {
            "images have no segment": self.empty,
            "images are listed but not annotated, and were left out": self.unannotated,
            "images failed validation and were skipped": len(self.skipped),
            "segments state an area that their pixels deny (the pixels count)": self.area_mismatches,
        }
        things = zip(self.categories.names, self.categories.is_thing, self.segments, strict=True)
        absent = [name for name, thing, count in things if thing and not count]
        rest = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        if "class_map" not in self.source:  # of which all classes are named below
            counts[f"thing classes have no segment ({', '.join(absent[:5])}{rest})"] = len(absent)
        repaired = [
            f"repaired {count} times: {kind}{self._of_all(kind, count)}" for kind, count in sorted(self.repairs.items())
        ]
        unused = [name for name, count in zip(self.categories.names, self.segments, strict=True) if not count]
        mapped = [f"{len(unused)} classes of the class map have no segment: {', '.join(unused)}"] if unused else []
        lines = [f"{count} {what}" for what, count in {**counts, **self.warnings}.items() if count] + repaired
        return lines + (mapped if "class_map" in self.source else [])

    def summary(self) -> str:
        """A description for people, as lines of text: size, classes, segments and notes."""
        classes = text_table(class_rows(self.categories, self.segments, self.statistics), words=("kind",))
        where = f" in {len(self.shards)} shards at {self.uri}" if self.shards else ""
        content = f", content hash {self.hash[:16]}" if self.hash else ""
        lines = [
            f"{self.rows} images of split {self.split}{where}",
            f"largest {self.maximum_height} x {self.maximum_width} (height x width){content}",
            f"{sum(self.segments)} segments, {self.crowds} of them crowds{self._shares()}:",
            indent(classes, "  "),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _of_all(self, kind: str, count: int) -> str:
        """The share of all pixels, for kinds that count pixels."""
        counts = self.statistics
        return f" ({percent(count, counts.pixels)} of all)" if counts and kind.startswith("pixels ") else ""

    def _shares(self) -> str:
        counts = self.statistics
        if counts is None:
            return ""
        shares = f"crowds {percent(counts.crowd, counts.pixels)}, void {percent(counts.void, counts.pixels)}"
        return f"; of the pixels: {shares}"


def is_shards(uri: storage.Uri) -> bool:
    """True where a finished set of shards is there."""
    return storage.exists(storage.join(uri, MANIFEST))


class Former(TypedDict):
    """The part of a manifest of an earlier schema version that is still read."""

    schema_version: int
    hash: str
    categories: CocoCategories
    source: dict[str, Any]


def former_manifest(uri: storage.Uri) -> Former | None:
    """The manifest of a folder of shards of an earlier schema version; None of the present one and of anything else."""
    file = storage.join(uri, MANIFEST)
    try:
        data = storage.read_bytes(file)
        if not 0 < _VERSION.validate_json(data, strict=True)["schema_version"] < SCHEMA_VERSION:
            return None
        return _FORMER.validate_json(data)
    except (FileNotFoundError, ValidationError):
        return None


def content_hash(categories: Categories, digests: Iterable[str]) -> str:
    """The manifest's `hash`: of the categories and the digest of each row, in order."""
    content = hashlib.sha256(json.dumps(categories.to_coco()).encode())
    content.update("".join(digests).encode())
    return content.hexdigest()


def _parse(data: bytes, file: str) -> Manifest:
    """The manifest that the bytes hold, checked against its schema.

    Raises:
        ValueError: it is no JSON, of another version, or a field is missing, unknown or of another kind; in one line.
    """
    try:
        version = _VERSION.validate_json(data, strict=True)["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{file}: schema_version is {version}, this software reads {SCHEMA_VERSION}; prepare the shards again"
            )
        return _SCHEMA.validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(f"{file}: {readable(error)}; {REMEDY}") from error


def readable(error: ValidationError) -> str:
    """The first problems that pydantic lists: place, value and what is wrong, for a message of one line."""
    problems = error.errors(include_url=False, include_context=False)
    lines = []
    for problem in problems[:SHOWN]:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        value = "" if problem["type"] in ("missing", "json_invalid") else f" (is {_short(problem['input'])})"
        lines.append(f"{place or 'the file'}: {problem['msg']}{value}")
    return "; ".join(lines) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")


def _short(value: object, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _contradictions(manifest: Manifest) -> list[str]:
    """Fields of a manifest that contradict others."""
    problems = []
    rows = sum(shard.rows for shard in manifest.shards)
    if rows != manifest.rows:
        problems.append(f"rows is {manifest.rows}, but the shards have {rows}")
    counted, classes = len(manifest.segments), len(manifest.categories)
    if counted != classes:
        problems.append(f"segments counts {counted} classes, but categories lists {classes}")
    for key in ("path", "sha256"):  # a copy of a shard under another name has its sha256
        times = Counter(getattr(shard, key) for shard in manifest.shards)
        problems += [f"shards lists the {key} {value} {count} times" for value, count in times.items() if count > 1]
    return problems


def _file_problems(shards: Sequence[Shard], stamps: Mapping[str, tuple[int, int]]) -> list[str]:
    """Files that are missing or have another size, and shards too small for the rows that they are said to have."""
    problems = [] if INDEX in stamps else [f"index: {INDEX} is missing from the folder"]
    for place, shard in enumerate(shards):
        size = stamps.get(shard.path, (-1, 0))[0]
        if size < 0:
            problems.append(f"shards[{place}].path: {shard.path} is missing from the folder")
        elif shard.rows * SMALLEST_ROW > size:
            problems.append(f"shards[{place}].rows: {shard.rows} rows cannot lie in {shard.path} ({size} bytes)")
        elif size != shard.size:
            problems.append(f"shards[{place}].size: is {shard.size}, but {shard.path} has {size} bytes")
    return problems


def problem_table(problems: Sequence[Problem], limit: int = 20) -> str:
    """A line of file name, reason and remedy for each of the first `limit` problems, and how many more there are."""
    rows = [("file", "problem"), *((problem.name, _one_line(problem)) for problem in problems[:limit])]
    lines = [text_table(rows, words=("problem",), widest=WIDEST)]
    return indent("\n".join(lines + [f"and {len(problems) - limit} more"] * (len(problems) > limit)), "  ")


def _one_line(problem: Problem) -> str:
    """Reason and remedy, separated by an arrow."""
    return " → ".join(" ".join(part.split()) for part in (problem.reason, problem.remedy) if part)


class _Version(TypedDict):
    """The field that says how to read the others."""

    schema_version: int


_VERSION: TypeAdapter[_Version] = TypeAdapter(_Version)
_FORMER: TypeAdapter[Former] = TypeAdapter(Former)
_SCHEMA: TypeAdapter[Manifest] = TypeAdapter(Manifest)
