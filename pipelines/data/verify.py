"""The check of a whole folder of shards: every file, every row, and the content's hash."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipelines.cluster import storage
from pipelines.data.manifest import Manifest, content_hash, problem_table
from pipelines.data.prepare import read_row
from pipelines.data.readers.source import Problem
from pipelines.data.shard_file import REMEDY, ShardFile, check_schema, decode_row, open_shard, read_shard, shard_schema
from pipelines.data.shard_index import Index, load_index
from pipelines.data.shard_writer import row_digest

THREADS = 4
"""Images that are decoded at a time."""


def verify(uri: storage.Uri) -> Manifest:
    """Read every shard and decode every row, and compare them with the manifest and its hash.

    Raises:
        ValueError: the manifest is not one, or its content is another; a table of the shards that are missing or
            differ.
    """
    manifest = Manifest.load(uri, files=False)
    shards = manifest.shard_set
    index = load_index(shards)
    problems: list[Problem] = []
    digests: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for number, (shard, file) in enumerate(zip(manifest.shards, shards.files, strict=True)):
            try:
                digests += _digests(number, file, index, shards.classes, pool)
            except (ValueError, OSError) as error:
                problems.append(Problem(shard.path, str(error).removeprefix(f"{file.uri}: ")))
    if problems:
        differing = f"{len(problems)} of {len(manifest.shards)} shards at {manifest.uri} are not what was written"
        raise ValueError(f"{differing}:\n{problem_table(problems)}\nPrepare the shards again.")
    if content_hash(manifest.categories, digests) != manifest.hash:
        raise ValueError(
            f"{manifest.uri}: the manifest's hash is of other content (its categories or the order of its shards "
            "changed); prepare the shards again"
        )
    return manifest


def _digests(number: int, shard: ShardFile, index: Index, classes: int, pool: ThreadPoolExecutor) -> Sequence[str]:
    """The digest of each row of a shard, of which the file, the columns and the place of every row are checked."""
    data, schema = read_shard(shard), shard_schema(index.image_id)
    check_schema(shard, open_shard(shard), index.header(number), schema)
    try:
        batches = pa.ipc.open_file(pa.py_buffer(data)).num_record_batches
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot be read as an Arrow file ({error}); {REMEDY}") from error
    if batches != shard.rows:
        raise ValueError(f"has {batches} rows where the manifest says {shard.rows}; {REMEDY}")

    def digest(row: int) -> str:
        span = index.span(row)
        part = data[span.offset : span.offset + span.length]
        if zlib.crc32(part) != span.crc32:
            raise ValueError(f"row {row - index.starts[number]} has another checksum than the index says; {REMEDY}")
        columns = decode_row(part, schema, classes)
        return row_digest(columns, read_row(columns).truth)

    return list(pool.map(digest, range(index.starts[number], index.starts[number + 1])))
