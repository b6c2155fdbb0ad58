"""Reads rows of shards by position: one read of its own bytes for each, from disk or S3.

A row of 161 kB takes 0.08 ms of CPU from a disk's cache (a third of it the checksum, a quarter its values in Python)
and 0.6 ms from S3. The schema of a shard is read once a process, and its size whenever it is opened, which is once too
but on sets of more shards than stay open.

Torch is imported inside the functions that need it: processes that only move bytes start without it.

Shapes: H x W pixels.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.cluster import storage
from pipelines.data.copies import Copies
from pipelines.data.sampler import Stream
from pipelines.data.shard_file import REMEDY, Span, check_schema, decode_row, first_line, open_shard, shard_schema
from pipelines.data.shard_index import Index, ShardSet, load_index

if TYPE_CHECKING:
    from panoptic.segmentation import Sample
    from panoptic.transforms import Augment

OPEN_FILES = 128
OPEN_OBJECTS = 1 << 14
"""Files that a process keeps open, on disks and on S3. To open one again takes 0.04 ms on a disk, a request on S3."""

GAP = 1 << 20
"""Bytes between two rows that are read along, rather than asked for by a request of its own."""

PAUSES = (0.1, 0.5, 2.0, 5.0)
"""Seconds before each further attempt of a read that failed. Arrow's S3 client has tried three times by then."""


# Rows at random from shards

OPENED_AT_ONCE = 64
"""Shards that may be opened at the same time, each by one thread."""


class Rows:
    """Reads rows of a set of shards in any order, in any number of threads."""

    def __init__(self, shards: ShardSet) -> None:
        """Nothing is read yet; the index is, with the first row."""
        self.shards = shards
        self._limit = OPEN_OBJECTS if shards.uri.startswith("s3://") else OPEN_FILES
        self._files: OrderedDict[int, pa.NativeFile] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in range(OPENED_AT_ONCE)]

    @cached_property
    def index(self) -> Index:
        """The place of each row."""
        return load_index(self.shards)

    def row(self, number: int) -> dict[str, Any]:
        """One row of the set, its columns by name.

        Raises:
            ValueError: the row or its shard is not what was written, or could not be read in several attempts; names
                the shard, the row and the remedy.
        """
        index = self.index
        shard, span = index.shard(number), index.span(number)
        return self._decode(shard, number, span, self._read(shard, number, span))

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of `numbers`, in that order; rows that are neighbours in a shard, or nearly so, come in one read.

        Raises:
            ValueError: as `row`.
        """
        index, found = self.index, {}
        for shard, part in self._parts(sorted(set(numbers))):
            first, last = index.span(part[0]), index.span(part[-1])
            whole = Span(first.offset, last.offset + last.length - first.offset, 0)
            data = memoryview(self._read(shard, part[0], whole))
            for number in part:
                span = index.span(number)
                begin = span.offset - first.offset
                found[number] = self._decode(shard, number, span, data[begin : begin + span.length])
        return [found[number] for number in numbers]

    def _parts(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """The shard and the numbers of rows that one read brings; `numbers` rise."""
        index, part, at, end = self.index, [], -1, 0
        for number in numbers:
            shard, span = index.shard(number), index.span(number)
            if part and (shard != at or span.offset - end > GAP):
                yield at, part
                part = []
            part.append(number)
            at, end = shard, span.offset + span.length
        if part:
            yield at, part

    def _decode(self, shard: int, number: int, span: Span, data: bytes | memoryview) -> dict[str, Any]:
        if zlib.crc32(data) != span.crc32:  # once more: it may have been a fault on the way
            data = self._read(shard, number, span)
        try:
            if zlib.crc32(data) != span.crc32:
                raise ValueError("has another checksum than the index says: it was changed after it was written")
            return decode_row(data, shard_schema(self.index.image_id), self.shards.classes)
        except ValueError as error:
            raise ValueError(f"{self._place(shard, number)} {error}; {REMEDY}") from error

    def _read(self, shard: int, number: int, span: Span) -> bytes:
        """The bytes of a span, tried again a few times where reading fails.

        Raises:
            ValueError: it could not be read; names the row.
            storage.Unavailable: S3 is away.
        """
        for pause in (*PAUSES, None):
            try:
                data = self._open(shard).read_at(span.length, span.offset)
            except storage.Unavailable:  # S3 was asked again and again already
                raise
            except OSError as error:
                with self._lock:
                    self._files.pop(shard, None)
                if pause is None or isinstance(error, PermissionError):
                    place = self._place(shard, number)
                    raise ValueError(f"{place} could not be read ({first_line(error)}); try again later") from error
                time.sleep(pause)
            else:
                if len(data) != span.length:
                    raise ValueError(f"{self._place(shard, number)} ends too early: the file was cut; {REMEDY}")
                return data
        raise AssertionError("unreachable")

    def _open(self, shard: int) -> pa.NativeFile:
        """The open file, checked when it was opened; one thread opens it, and the others wait for that."""
        if (file := self._opened(shard)) is not None:
            return file
        with self._opening[shard % OPENED_AT_ONCE]:
            if (file := self._opened(shard)) is not None:
                return file
            described = self.shards.files[shard]
            file = open_shard(described)
            if shard not in self._checked:
                check_schema(described, file, self.index.header(shard), shard_schema(self.index.image_id))
            with self._lock:
                self._checked.add(shard)
                self._files[shard] = file
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)  # closed once no thread reads from it any more
            return file

    def _opened(self, shard: int) -> pa.NativeFile | None:
        """The file where it is open."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
            return file

    def _place(self, shard: int, number: int) -> str:
        return f"{self.shards.files[shard].uri}: row {number - int(self.index.starts[shard])}"


# One sample


def view(row: dict[str, Any], stream: Stream, augment: Augment, copies: Copies | None = None) -> Sample:
    """Decode and augment a shard row that carries its position.

    A row that is an augmented copy already gets what is left to be done to it (`Copies.left`), a row of features
    nothing. Where the data set is
    doubled, the first copy keeps its colours and the second always changes them alike.
    """
    from panoptic.transforms import copy_generator, generator, training_view
    from pipelines.data.feature_maps import is_features
    from pipelines.data.shard_row import read_features, read_row

    if is_features(row["image"]):
        return replace(read_features(row), position=row["position"])
    epoch, number = stream.locate(row["position"])
    sample = replace(read_row(row), position=row["position"])
    if copies is not None:
        augment = copies.left(augment, number)
    if not augment.doubled:
        drawn = number + stream.rows * stream.times(row["position"])  # an image that comes again looks different
        return training_view(sample, augment, generator(stream.seed, epoch, drawn))
    copy = stream.copy(row["position"])
    rng = generator(stream.seed, epoch, 2 * number + copy)
    if copy == 0:
        return training_view(sample, replace(augment, colour="none", doubled=False), rng)
    return training_view(sample, augment, rng, copy_generator(stream.seed, number))


def pack(samples: Sequence[Sample]) -> pa.Table:
    """Decoded samples as a table: pixels as bytes, the map in as few bytes as its segments need."""
    from panoptic.transforms.views import narrow

    maps = [narrow(s.truth) for s in samples]
    return pa.table(
        {
            "position": [s.position for s in samples],
            "name": [s.name for s in samples],
            "size": [list(s.truth.size) for s in samples],
            "image": pa.array([np.ascontiguousarray(s.image).tobytes() for s in samples], pa.large_binary()),
            "segments": pa.array([np.ascontiguousarray(m).tobytes() for m in maps], pa.large_binary()),
            "kind": [m.dtype.str for m in maps],
            "labels": pa.array([s.truth.labels.tolist() for s in samples], pa.list_(pa.int64())),
            "crowd": pa.array([s.truth.is_crowd().tolist() for s in samples], pa.list_(pa.bool_())),
            "drawn": [json.dumps(dict(s.drawn)) for s in samples],
        }
    )


def unpack(row: dict[str, Any]) -> Sample:
    """The sample that `pack` made a row of."""
    from panoptic.segmentation import Sample, Segmentation

    image = np.frombuffer(row["image"], np.uint8).reshape(*row["size"], 3).copy()  # writable, as torch asks
    segments = np.frombuffer(row["segments"], row["kind"]).reshape(row["size"]).astype(np.int32)
    truth = Segmentation(segments, np.array(row["labels"], np.int64), np.array(row["crowd"], bool))
    return Sample(image, truth, row["name"], position=row["position"], drawn=json.loads(row["drawn"]))


def single_threaded() -> None:
    """One image, one thread: parallelism comes from the images."""
    import cv2

    cv2.setNumThreads(0)
