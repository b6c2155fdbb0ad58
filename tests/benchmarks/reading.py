"""Rows of a large set in a global order: by the index of Arrow shards, and by row groups of Parquet (row read).

The set is 100 times larger than the memory for it, so that every read counts; the peer is what this project's shards
were before: Parquet files in row groups of 16 rows, the groups read last kept. Times are CPU milliseconds of one
thread, with the files in the page cache.

Shapes: none.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sampler import order
from pipelines.data.shard_file import ShardFile, encode_shard, shard_schema
from pipelines.data.shard_index import Entries, ShardSet, write_index
from pipelines.data.shard_reader import Rows
from tests.benchmarks.timing import Row

BYTES = 161_000
"""Of a row: a photograph and its map, as COCO's are."""
SHARD = 64
"""Rows of a shard."""
GROUP = 16
"""Rows of a row group of the former shards."""


class Counted:
    """A local file that counts what is read from it, for both ways."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")  # as long as its reader
        self.calls = self.bytes = 0
        self.closed = False

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self.calls, self.bytes = self.calls + 1, self.bytes + len(data)
        return data

    def close(self) -> None:
        self._file.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


class Groups:
    """The former reader: whole row groups, of which the last ones are kept."""

    def __init__(self, files: list[Any], room: int) -> None:
        self._files = [pq.ParquetFile(file) for file in files]
        self._room = room
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def row(self, number: int) -> dict[str, Any]:
        """One row of the set."""
        key = (number // SHARD, number % SHARD // GROUP)
        table = self._groups.get(key)
        if table is None:
            table = self._groups[key] = self._files[key[0]].read_row_group(key[1], use_threads=False)
            self._room -= table.nbytes
            while self._room < 0 and len(self._groups) > 1:
                self._room += self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end(key)
        (row,) = table.slice(number % GROUP, 1).to_pylist()
        return row


def rows(folder: Path, count: int, size: int = BYTES) -> list[Row]:
    """Bytes read for each byte used, reads and CPU milliseconds a row, of both.

    Args:
        folder: for the shards.
        count: of rows: whole shards.
        size: bytes of a row.

    Raises:
        ValueError: the two do not give the same rows.
    """
    shards = _write(folder, count, size)
    numbers = [order(0, position, count)[1] for position in range(count)]
    used = count * size

    def arrow(counted: list[Counted]) -> Callable[[int], dict[str, Any]]:
        reader = Rows(shards)
        if counted:
            reader._open = lambda shard: _Positioned(counted[shard])  # type: ignore[method-assign,assignment]
        return reader.row

    def groups(counted: list[Counted]) -> Callable[[int], dict[str, Any]]:
        return Groups(counted or sorted(folder.glob("shard-*.parquet")), used // 100).row

    ours, theirs = (_figures(way, folder, suffix, numbers) for way, suffix in ((arrow, "arrow"), (groups, "parquet")))
    table = []
    if ours.pop("content") != theirs.pop("content"):
        raise ValueError("read: other rows than the Parquet shards'; no ratio counts before they agree")
    peer, work = f"Parquet, row groups of {GROUP}", f"{count} rows of {size // 1000} kB in a global order"
    for name, unit in (("bytes read per byte used", "x"), ("reads a row", ""), ("CPU a row", "ms")):
        scale = 1 / size if unit == "x" else 1.0
        mine, other = ours[name] * scale, theirs[name] * scale
        table.append(Row("read", f"{work}: {name}", mine, unit, peer, other, other / mine))
    return table


class _Positioned:
    """The counted file as `Rows` reads one."""

    def __init__(self, file: Counted) -> None:
        self._file = file

    def read_at(self, length: int, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)


def _figures(way: Callable, folder: Path, suffix: str, numbers: list[int]) -> dict[str, Any]:
    """Bytes and reads are counted in one pass, time is taken in another without the counting."""
    counted = [Counted(path) for path in sorted(folder.glob(f"shard-*.{suffix}"))]
    row = way(counted)
    content = [(found["name"], len(found["image"]), found["height"]) for found in map(row, numbers)]
    calls, read = sum(file.calls for file in counted), sum(file.bytes for file in counted)
    row = way([])
    row(numbers[0])
    begin = time.process_time()
    for number in numbers:
        row(number)
    seconds = time.process_time() - begin
    count = len(numbers)
    return {
        "content": content,
        "bytes read per byte used": read / count,
        "reads a row": calls / count,
        "CPU a row": 1e3 * seconds / count,
    }


def _write(folder: Path, count: int, size: int) -> ShardSet:
    """The same rows as Arrow shards with their index, and as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, schema, files, entries = np.random.default_rng(7), shard_schema(pa.int64()), [], []
    for shard in range(count // SHARD):
        content = [
            {
                "name": f"{number:06d}.jpg",
                "image": rng.bytes(size * 15 // 16),
                "segments": rng.bytes(size // 16),
                "labels": list(range(12)),
                "crowd": [False] * 12,
                "height": 480,
                "width": 640,
                "image_id": number,
            }
            for number in range(shard * SHARD, (shard + 1) * SHARD)
        ]
        data, spans = encode_shard(content, schema)
        file = folder / f"shard-{shard:05d}.arrow"
        file.write_bytes(data)
        files.append(ShardFile(str(file), SHARD, len(data), ""))
        entries.append(Entries(spans, [row["name"] for row in content], [row["image_id"] for row in content]))
        table = pa.Table.from_pylist(content, schema)
        pq.write_table(table, file.with_suffix(".parquet"), row_group_size=GROUP, compression="none")
    return ShardSet(str(folder), tuple(files), write_index(folder, entries, pa.int64()), 12)
