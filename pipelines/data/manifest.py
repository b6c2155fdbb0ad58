"""The manifest of a folder of shards: what is in it, and whether it is still what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from panoptic.segmentation import Categories
from pipelines.cluster import storage
from pipelines.data.readers.source import Problem

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a set."""

    path: str
    """Relative to the manifest."""
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about a folder of shards."""

    schema_version: int
    split: str
    rows: int
    hash: str
    """Of the content (names, image bytes, maps, labels, order, categories), whatever wrote it."""
    categories: Categories
    shards: tuple[Shard, ...]
    maximum_height: int
    maximum_width: int
    segments: tuple[int, ...]
    """Of each class."""
    crowds: int
    empty: int
    """Images without a segment."""
    unannotated: int
    """Images that the annotations list but do not annotate; left out."""
    skipped: tuple[Problem, ...]
    """Images that failed validation and were left out, where that was asked for."""
    area_mismatches: int
    """Segments whose area in the annotations differs from their pixels (the area is never used)."""
    source: dict[str, Any]
    """reader, root, split and the fingerprint of files and options."""
    uri: str = field(default="", compare=False)
    """The folder it was loaded from."""

    @classmethod
    def load(cls, uri: storage.Uri) -> Manifest:
        """From a folder of shards.

        Raises:
            ValueError: no finished set of shards is there, or another version of this software wrote it.
        """
        file = storage.join(storage.absolute(uri), MANIFEST)
        if not storage.exists(file):
            raise ValueError(f"{file}: not found, so {uri} holds no finished shards; run jobs/prepare.py to write them")
        content = json.loads(storage.read_bytes(file))
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{file}: schema_version is {content.get('schema_version')}, this software reads {SCHEMA_VERSION}; "
                "prepare the shards again"
            )
        content["categories"] = Categories.from_coco(content["categories"], file)
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        content["skipped"] = tuple(Problem(**problem) for problem in content["skipped"])
        content["segments"] = tuple(content["segments"])
        return cls(**content, uri=storage.absolute(uri))

    def to_json(self) -> bytes:
        """The text of `manifest.json`."""
        content = asdict(replace(self, categories=None))  # type: ignore[arg-type]
        del content["uri"]
        content["categories"] = self.categories.to_coco()
        return json.dumps(content, indent=1).encode()

    @property
    def files(self) -> tuple[str, ...]:
        """The URI of each shard, in order."""
        return tuple(storage.join(self.uri, shard.path) for shard in self.shards)

    @property
    def notes(self) -> list[str]:
        """What is odd about the data without being wrong."""
        counts = {
            "images have no segment": self.empty,
            "images are listed but not annotated, and were left out": self.unannotated,
            "images failed validation and were skipped": len(self.skipped),
            "segments state an area that their pixels deny (the pixels count)": self.area_mismatches,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]

    def summary(self) -> str:
        """What a person wants to know, as lines of text."""
        width = max(len(name) for name in self.categories.names)
        kinds = ("thing" if thing else "stuff" for thing in self.categories.is_thing)
        classes = zip(self.categories.names, kinds, self.segments, strict=True)
        lines = [
            f"{self.rows} images of split {self.split} in {len(self.shards)} shards at {self.uri}",
            f"largest {self.maximum_height} x {self.maximum_width} (height x width), content hash {self.hash[:16]}",
            f"{sum(self.segments)} segments, {self.crowds} of them crowds:",
            *(f"  {name:{width}}  {kind}  {count:7d}" for name, kind, count in classes),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def is_shards(uri: storage.Uri) -> bool:
    """Whether a finished set of shards is there."""
    return storage.exists(storage.join(uri, MANIFEST))


def verify(uri: storage.Uri) -> Manifest:
    """Read every shard and compare rows and sha256 with the manifest.

    Raises:
        ValueError: a table of the shards that are missing or differ.
    """
    manifest = Manifest.load(uri)
    problems = [Problem(s.path, _difference(s, f)) for s, f in zip(manifest.shards, manifest.files, strict=True)]
    problems = [problem for problem in problems if problem.reason]
    if problems:
        what = f"{len(problems)} of {len(manifest.shards)} shards at {manifest.uri} are not what was written"
        raise ValueError(f"{what}:\n{problem_table(problems)}\nPrepare the shards again.")
    return manifest


def _difference(shard: Shard, file: str) -> str:
    if not storage.exists(file):
        return "is missing"
    data = storage.read_bytes(file)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "has another sha256"
    rows = pq.read_metadata(pa.BufferReader(data)).num_rows
    return "" if rows == shard.rows else f"has {rows} rows, not {shard.rows}"


def problem_table(problems: Sequence[Problem], limit: int = 20) -> str:
    """Lines of file name and reason, the first `limit` of them, and how many more there are."""
    shown = problems[:limit]
    width = max(len(problem.name) for problem in shown)
    lines = [f"  {problem.name:{width}}  {problem.reason}" for problem in shown]
    return "\n".join(lines + [f"  and {len(problems) - limit} more"] * (len(problems) > limit))
