"""The index of a set of shards: where each row lies, in one Arrow file beside the manifest.

A row of the index is a row of the set, in order: the number of its shard, the offset and length of its message, the
CRC-32 of these bytes, and the image's name and id, so that listing a set opens no shard. The manifest holds the
index's sha256. 20 bytes a row are kept in memory: 2.4 MB for COCO's 118,000 images.

Torch is not imported: processes that only move bytes start without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.cluster import storage
from pipelines.data.shard_file import MAGIC, ShardFile, Span, first_line, is_compressed

INDEX = "_index.arrow"
"""The index's file. `pyarrow.dataset` leaves out names that begin with an underscore."""

REMEDY = "it was changed, cut or replaced after it was written: prepare the shards again"


class ShardSet(NamedTuple):
    """All shards of a split, as a process that reads them needs to know them."""

    uri: str
    """Folder of the shards."""
    files: tuple[ShardFile, ...]
    index: str
    """sha256 of the index."""
    classes: int
    """Number of classes."""


class Entries(NamedTuple):
    """The rows of one shard, as the index lists them."""

    spans: Sequence[Sequence[int]]
    """`Span`s, or as many numbers."""
    names: Sequence[str]
    image_ids: Sequence[int] | Sequence[str]


class Index(NamedTuple):
    """The index in memory."""

    starts: np.ndarray
    """int64 [shards + 1], the row at which each shard begins, and the number of rows."""
    offsets: np.ndarray
    """int64 [rows]"""
    lengths: np.ndarray
    """int64 [rows]"""
    checksums: np.ndarray
    """uint32 [rows]"""
    image_id: pa.DataType
    """int64 or string."""

    def shard(self, row: int) -> int:
        """The number of the shard of a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def span(self, row: int) -> Span:
        """The place of a row in its shard."""
        return Span(int(self.offsets[row]), int(self.lengths[row]), int(self.checksums[row]))

    def header(self, shard: int) -> int:
        """Bytes before the first row of a shard."""
        return int(self.offsets[self.starts[shard]])


def index_schema(image_id: pa.DataType) -> pa.Schema:
    """The columns of an index."""
    return pa.schema(
        [
            ("shard", pa.int32()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("crc32", pa.uint32()),
            ("name", pa.string()),
            ("image_id", image_id),
        ]
    )


def write_index(folder: storage.Uri, shards: Iterable[Entries], image_id: pa.DataType) -> str:
    """Write the index of a folder of shards, in their order; its sha256."""
    schema = index_schema(image_id)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for number, shard in enumerate(shards):
            spans = [Span(*span) for span in shard.spans]
            content = {
                "shard": [number] * len(spans),
                "offset": [span.offset for span in spans],
                "length": [span.length for span in spans],
                "crc32": [span.crc32 for span in spans],
                "name": shard.names,
                "image_id": shard.image_ids,
            }
            writer.write_table(pa.table(content, schema=schema))
    data = memoryview(sink.getvalue())
    storage.write_bytes(storage.join(folder, INDEX), data)
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=2)
def load_index(shards: ShardSet) -> Index:
    """The index of a set, compared with the manifest and with itself.

    Raises:
        ValueError: it is missing, is not what was written, or does not fit the shards; names it and the remedy.
    """
    table = _read(shards)
    file = storage.join(shards.uri, INDEX)
    numbers, offsets, lengths, checksums = (table[name].to_numpy() for name in ("shard", "offset", "length", "crc32"))
    rows = np.array([shard.rows for shard in shards.files])
    if not np.array_equal(numbers, np.repeat(np.arange(len(rows)), rows)):
        raise ValueError(f"{file}: lists other rows than the manifest ({rows.sum()} in {len(rows)} shards); {REMEDY}")
    starts = np.concatenate([[0], np.cumsum(rows)])
    sizes = np.array([shard.size for shard in shards.files])
    first = np.zeros(len(offsets), bool)
    first[starts[:-1]] = True
    follows = np.concatenate([[0], offsets[:-1] + lengths[:-1]])
    if (
        (lengths <= 0).any()
        or (lengths > sizes.max()).any()
        or (offsets[starts[:-1]] <= 0).any()
        or (offsets != follows)[~first].any()
        or (offsets[starts[1:] - 1] + lengths[starts[1:] - 1] > sizes).any()
    ):
        raise ValueError(f"{file}: lists rows that do not lie one after the other in their shards; {REMEDY}")
    return Index(starts, offsets.copy(), lengths.copy(), checksums.copy(), table.schema.field("image_id").type)


def list_images(shards: ShardSet) -> list[tuple[str, Any]]:
    """Name and id of each image, in order.

    Raises:
        ValueError: as `load_index`.
    """
    load_index(shards)
    table = _read(shards)
    return list(zip(table["name"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def _table(data: bytes) -> pa.Table:
    """The table in the bytes of an index, which takes no more memory than they do.

    The messages are read one after the other. The footer, which may list one of them a million times, is left alone,
    and compressed columns, of which a few bytes may become any number, are refused before they are read.

    Raises:
        ValueError: it is no Arrow file, has other columns, or compressed ones.
    """
    if not data.startswith(MAGIC):
        raise pa.ArrowInvalid("not an Arrow IPC file")
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(data)[len(MAGIC) :])
    schema = pa.ipc.read_schema(messages.read_next_message())
    if schema not in (index_schema(pa.int64()), index_schema(pa.string())):
        raise ValueError("its columns are not those of an index")
    batches = []
    for message in messages:
        if message.type != "record batch" or is_compressed(message.metadata.to_pybytes()):
            raise ValueError("its columns are compressed, which those of an index are not")
        batches.append(pa.ipc.read_record_batch(message, schema))
    table = pa.Table.from_batches(batches, schema)
    table.validate(full=True)
    return table


def _read(shards: ShardSet) -> pa.Table:
    """The index as a table, of which hash and columns are checked."""
    file = storage.join(shards.uri, INDEX)
    try:
        data = storage.read_bytes(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: the index of the shards is missing; prepare the shards again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != shards.index:
        raise ValueError(
            f"{file}: has another sha256 than the manifest says ({len(data)} bytes; {digest[:16]}, not "
            f"{shards.index[:16]}): {REMEDY}"
        )
    try:
        table = _table(data)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as an index ({first_line(error)}); {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from error
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{file}: has no value in some of its rows; {REMEDY}")
    return table
