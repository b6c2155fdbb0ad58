"""The file of one shard: an Arrow IPC file with a record batch for each row, so that a row is read alone.

Any Arrow tool reads it as a table. We read rows by position: `shard_index` says where each lies, and a row is one
Arrow message, which is decoded by the schema of this software. Nothing is compressed, as images and maps are already.

A shard is trusted as far as its manifest is. When a process first opens a file, its size and its schema are compared
with the manifest; each row that is read is compared with its CRC-32 in the index, whose sha256 the manifest holds.
`prepare --verify` compares the sha256 of whole files too. So a row costs one read of its own bytes, and every byte
that is used has been checked; hashing a file when it is first opened would read all of it for the sake of one row.

Torch is not imported: processes that only move bytes start without it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.cluster import storage

SUFFIX = ".arrow"

MAGIC = b"ARROW1\0\0"
"""First bytes of an Arrow IPC file; the schema follows, then the rows."""

REMEDY = "delete this file and prepare the shards again"


class ShardFile(NamedTuple):
    """A shard as its manifest describes it."""

    uri: str
    rows: int
    size: int
    """Bytes of the file."""
    sha256: str


class Span(NamedTuple):
    """The place of a row in its file."""

    offset: int
    length: int
    crc32: int


class Encoded(NamedTuple):
    """The content of a shard's file, and where its rows lie in it."""

    data: memoryview
    spans: list[Span]


@cache  # 7 microseconds, of 170 that a row takes
def shard_schema(image_id: pa.DataType) -> pa.Schema:
    """The columns of a shard. `image_id` is int64, or string where the data set's ids are text."""
    return pa.schema(
        [
            ("name", pa.string()),
            ("image", pa.binary()),
            ("segments", pa.binary()),
            ("labels", pa.list_(pa.int32())),
            ("crowd", pa.list_(pa.bool_())),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("image_id", image_id),
        ]
    )


def encode_shard(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Encoded:
    """The file of some rows, whose keys are the columns of the schema."""
    sink = pa.BufferOutputStream()
    ends = []
    with pa.ipc.new_file(sink, schema) as writer:
        for row in rows:
            columns = [pa.array([row[field.name]], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            ends.append(sink.tell())
    data = memoryview(sink.getvalue())
    starts = [_header_size(data), *ends[:-1]]
    return Encoded(data, [Span(a, b - a, zlib.crc32(data[a:b])) for a, b in zip(starts, ends, strict=True)])


def open_shard(shard: ShardFile) -> pa.NativeFile:
    """The open file, whose size is that of the manifest.

    Raises:
        ValueError: the file is missing or has another size than was written; names it and the remedy.
        OSError: it could not be opened.
    """
    try:
        file = storage.open_file(shard.uri)
    except FileNotFoundError as error:
        raise ValueError(f"{shard.uri}: the shard is missing; prepare the shards again") from error
    size = file.size()
    if size != shard.size:
        raise ValueError(
            f"{shard.uri}: has {size} bytes where the manifest says {shard.size}: it was changed, cut or replaced "
            f"after it was written; {REMEDY}"
        )
    return file


def read_shard(shard: ShardFile) -> memoryview:
    """The whole file, compared with its sha256.

    Raises:
        ValueError: the file is missing or is not what was written.
    """
    try:
        data = storage.read_bytes(shard.uri)
    except FileNotFoundError as error:
        raise ValueError(f"{shard.uri}: the shard is missing; prepare the shards again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        raise ValueError(
            f"{shard.uri}: has another sha256 than the manifest says ({len(data)} bytes; {digest[:16]}, not "
            f"{shard.sha256[:16]}): it was changed, cut or replaced after it was written; {REMEDY}"
        )
    return memoryview(data)


def decode_row(data: bytes | memoryview, schema: pa.Schema, classes: int) -> dict[str, Any]:
    """The row that the bytes of its message hold; nothing in them is trusted.

    Args:
        data: as the row's span gives them.
        schema: of the shards.
        classes: of the manifest: labels are below it.

    Raises:
        ValueError: it is no row of a shard, lacks values, or has labels of classes that do not exist; says why.
    """
    try:
        message = pa.ipc.read_message(data)
        if message.type == "record batch" and is_compressed(message.metadata.to_pybytes()):
            raise ValueError("its columns are compressed, which those of shards are not")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot be read as a row of a shard ({first_line(error)})") from error
    if batch.num_rows != 1:
        raise ValueError(f"is a record batch of {batch.num_rows} rows, not of one")
    (row,) = batch.to_pylist()
    for name, value in row.items():
        if value is None or (isinstance(value, list) and None in value):
            raise ValueError(f"has no value in the column {name}")
    labels = row["labels"]
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"has labels from {min(labels)} to {max(labels)}, the manifest has {classes} classes")
    return row


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _header_size(data: memoryview) -> int:
    """Bytes before the first row: the magic and the schema."""
    reader = pa.BufferReader(data)
    reader.seek(len(MAGIC))
    pa.ipc.read_schema(reader)
    return reader.tell()


def check_schema(shard: ShardFile, file: pa.NativeFile, header: int, expected: pa.Schema) -> None:
    """Check the columns that an open file states, before a row is read.

    Args:
        header: bytes before its first row.
        expected: the schema that it must have.

    Raises:
        ValueError: it is no Arrow file or has other columns; names the file, the columns and the remedy.
        OSError: it could not be read.
    """
    data = file.read_at(header, 0)
    try:
        if not data.startswith(MAGIC):
            raise pa.ArrowInvalid("not an Arrow IPC file")
        schema = pa.ipc.read_schema(pa.py_buffer(data[len(MAGIC) :]))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard.uri}: cannot be read as a shard ({first_line(error)}); {REMEDY}") from error
    differing = [
        f"{name} is {schema.field(name).type if schema.get_field_index(name) >= 0 else 'missing'}, not {kind}"
        for name, kind in zip(expected.names, expected.types, strict=True)
        if schema.get_field_index(name) < 0 or schema.field(name).type != kind
    ]
    differing += [f"{name} is unknown or there twice" for name in set(schema.names) - set(expected.names)]
    if not differing and schema.names != expected.names:
        differing = [f"their order is {', '.join(schema.names)}"]
    if differing:
        raise ValueError(f"{shard.uri}: its columns are not those of a shard ({'; '.join(differing)}); {REMEDY}")


def is_compressed(metadata: bytes) -> bool:
    """True for a message of a record batch whose buffers are compressed: a few bytes could become any number.

    Arrow decompresses when it reads the batch and has no option against it, so the metadata is looked at before: the
    field `compression` of the RecordBatch, in the flatbuffer that Message.fbs describes and that Arrow has verified.
    """
    (message,) = struct.unpack_from("<I", metadata, 0)
    place = message + _field(metadata, message, 2)  # Message.header
    batch = place + struct.unpack_from("<I", metadata, place)[0]
    return _field(metadata, batch, 3) != 0  # RecordBatch.compression


def _field(metadata: bytes, table: int, number: int) -> int:
    """The offset of a field within a flatbuffer's table; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    (size,) = struct.unpack_from("<H", metadata, vtable)
    entry = 4 + 2 * number
    return struct.unpack_from("<H", metadata, vtable + entry)[0] if entry < size else 0
