"""The check of a whole folder of shards: every file, every row, and the content's hash."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.cluster import storage
from pipelines.data.manifest import Manifest, content_hash, problem_table
from pipelines.data.prepare import read_row
from pipelines.data.readers.source import Problem
from pipelines.data.shard_file import ShardFile, open_shard, read_group
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
    problems: list[Problem] = []
    digests: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for shard, file in zip(manifest.shards, manifest.shard_files, strict=True):
            try:
                digests += _digests(file, len(manifest.categories), pool)
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


def _digests(shard: ShardFile, classes: int, pool: ThreadPoolExecutor) -> Sequence[str]:
    """The digest of each row of a shard."""
    file = open_shard(shard)
    digests: list[str] = []
    for group in range(file.num_row_groups):
        digests += pool.map(_digest, read_group(shard, file, group, classes).to_pylist())
    return digests


def _digest(row: dict) -> str:
    return row_digest(row, read_row(row).truth)
