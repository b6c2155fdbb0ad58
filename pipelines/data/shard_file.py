"""The file of one shard: its schema, and what is checked when a process opens it.

A shard is trusted as far as its manifest is: before anything in it is used, its bytes are compared with the manifest's
sha256, and its footer with the schema, the rows and the layout that `shard_writer` writes. As columns are not
compressed and row groups are small, what is read is bounded by the size of the file.

Torch is not imported: Ray's tasks that only move bytes start without it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster import storage

ROW_GROUP = 16
"""The most rows of a row group: what a reader must hold at once."""

REMEDY = "delete this file and prepare the shards again"


class ShardFile(NamedTuple):
    """A shard as its manifest describes it."""

    uri: str
    rows: int
    sha256: str


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


def open_shard(shard: ShardFile) -> pq.ParquetFile:
    """The open file, of which sha256, schema, rows and layout are those of the manifest.

    A process hashes a file once, and again where its size or its time of change are others: about 0.05 s for 64 MiB.

    Raises:
        ValueError: the file is missing, is not what was written, or is no shard; names it and the remedy.
    """
    filesystem, path = storage.resolve(shard.uri)
    try:
        info = filesystem.get_file_info(path)
        if not info.is_file:
            raise ValueError(f"{shard.uri}: the shard is missing; prepare the shards again")
        _check_hash(shard, info.size, info.mtime_ns or 0)
        file = pq.ParquetFile(filesystem.open_input_file(path))
        _check_footer(shard, file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard.uri}: cannot be read as a shard ({_first_line(error)}); {REMEDY}") from error
    return file


def read_group(shard: ShardFile, file: pq.ParquetFile, group: int, classes: int) -> pa.Table:
    """The rows of a row group of an open shard.

    Args:
        classes: of the manifest: labels are below it.

    Raises:
        ValueError: the group cannot be read, lacks values, or has labels of classes that do not exist.
    """
    try:
        table = file.read_row_group(group, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard.uri}: row group {group} cannot be read ({_first_line(error)}); {REMEDY}") from error
    for name in table.column_names:
        values = table[name]
        if values.null_count or (pa.types.is_list(values.type) and values.combine_chunks().flatten().null_count):
            raise ValueError(f"{shard.uri}: row group {group} has no value in a row of the column {name}; {REMEDY}")
    labels = table["labels"].combine_chunks().flatten().to_numpy()
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{shard.uri}: row group {group} has labels from {labels.min()} to {labels.max()}, the manifest has "
            f"{classes} classes; {REMEDY}"
        )
    return table


@lru_cache(maxsize=1 << 16)
def _check_hash(shard: ShardFile, size: int, changed: int) -> None:
    """Compare the file with the manifest's sha256; `size` and `changed` (ns) are there so that another is read anew."""
    filesystem, path = storage.resolve(shard.uri)
    with filesystem.open_input_stream(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    if digest != shard.sha256:
        raise ValueError(
            f"{shard.uri}: has another sha256 than the manifest says ({size} bytes; {digest[:16]}, not "
            f"{shard.sha256[:16]}): it was changed, cut or replaced after it was written; {REMEDY}"
        )


def _check_footer(shard: ShardFile, file: pq.ParquetFile) -> None:
    """Check what the footer says before a row is read: columns, rows, and how much memory reading them takes."""
    schema, metadata = file.schema_arrow, file.metadata
    index = schema.get_field_index("image_id")
    image_id = pa.string() if index >= 0 and schema.field(index).type == pa.string() else pa.int64()
    expected = shard_schema(image_id)
    differing = [
        f"{name} is {schema.field(name).type if schema.get_field_index(name) >= 0 else 'missing'}, not {kind}"
        for name, kind in zip(expected.names, expected.types, strict=True)
        if schema.get_field_index(name) < 0 or schema.field(name).type != kind
    ]
    differing += [f"{name} is unknown or there twice" for name in set(schema.names) - set(expected.names)]
    if differing or len(schema.names) != len(expected.names):
        raise ValueError(f"{shard.uri}: its columns are not those of a shard ({'; '.join(differing)}); {REMEDY}")
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != shard.rows or metadata.num_rows != rows:
        raise ValueError(f"{shard.uri}: has {rows} rows where the manifest says {shard.rows}; prepare it again")
    if any(group.num_rows > ROW_GROUP for group in groups):
        raise ValueError(f"{shard.uri}: has row groups of more than {ROW_GROUP} rows; {REMEDY}")
    if any(group.column(k).compression != "UNCOMPRESSED" for group in groups for k in range(group.num_columns)):
        raise ValueError(f"{shard.uri}: has compressed columns, which shards do not have; {REMEDY}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
