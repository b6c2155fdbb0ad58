"""Reads the rows of a training stream at random from the shards, through Ray Data.

A Ray Data source whose tasks read row by row in stream order. Every worker executes its own: Ray's split of
one dataset over the workers gives no say in who gets which row, drops the tail and starts 8 s later.

Torch is imported inside the functions that need it: Ray's tasks that only move bytes start without it.

Shapes: H x W pixels.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster import session
from pipelines.data.sampler import Stream
from pipelines.data.shard_file import ShardFile, open_shard, read_group

if TYPE_CHECKING:
    from panoptic.segmentation import Sample
    from panoptic.transforms import Augment

ROWS_PER_TASK = 64
"""Rows that one Ray task reads, so that it works for some 50 ms; more where a run would need too many tasks."""
MOST_TASKS = 2000
"""Most tasks of one execution: Ray Data takes about 1 ms each before the first row."""
BLOCK_BYTES = 4 << 20
"""Size at which a task hands on what it has read."""


# Rows at random from shards


class Rows:
    """Reads rows of a set of shards in any order; keeps the row groups read last."""

    def __init__(self, shards: Sequence[ShardFile], classes: int, cache: int) -> None:
        """Args: the shards and the number of classes of their manifest, and bytes to keep."""
        self._shards = shards
        self._classes = classes
        self._ends = np.cumsum([shard.rows for shard in shards])
        self._room = cache
        self._open = lru_cache(maxsize=64)(self._open_shard)
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def table(self, rows: Sequence[int]) -> pa.Table:
        """These rows, in this order."""
        return pa.concat_tables([self._row(row) for row in rows]).combine_chunks()

    def _row(self, row: int) -> pa.Table:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        offset = row - (int(self._ends[shard - 1]) if shard else 0)
        _, ends = self._open(shard)
        group = int(np.searchsorted(ends, offset, side="right"))
        return self._group(shard, group).slice(offset - (int(ends[group - 1]) if group else 0), 1)

    def _group(self, shard: int, group: int) -> pa.Table:
        table = self._groups.get((shard, group))
        if table is None:
            table = read_group(self._shards[shard], self._open(shard)[0], group, self._classes)
            self._groups[shard, group] = table
            self._room -= table.nbytes
            while self._room < 0 and len(self._groups) > 1:
                self._room += self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end((shard, group))
        return table

    def _open_shard(self, shard: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """The open file, checked, and the end of each of its row groups."""
        file = open_shard(self._shards[shard])
        return file, np.cumsum([file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)])


@lru_cache(maxsize=2)
def _shared_rows(shards: tuple[ShardFile, ...], classes: int, cache: int) -> Rows:
    """One reader a task process: its cache outlives the task."""
    return Rows(shards, classes, cache << 20)


# One sample


def view(row: dict[str, Any], stream: Stream, augment: Augment) -> Sample:
    """Decode and augment a shard row that carries its position.

    Where the data set is doubled, the first copy keeps its colours and the second always changes them alike.
    """
    from panoptic.transforms import copy_generator, generator, training_view
    from pipelines.data.prepare import read_row

    epoch, number = stream.locate(row["position"])
    sample = replace(read_row(row), position=row["position"])
    if not augment.doubled:
        return training_view(sample, augment, generator(stream.seed, epoch, number))
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


# The execution


@dataclass(frozen=True)
class Reading:
    """The rows that Ray's tasks read, and what they do with them."""

    stream: Stream
    shards: tuple[ShardFile, ...]
    classes: int
    cache: int
    augment: Augment | None
    """None = hand on the rows as they are."""

    def tables(self, indices: range) -> Iterator[pa.Table]:
        """One table for each of these micro-batches."""
        rows = _shared_rows(self.shards, self.classes, self.cache)
        if self.augment is not None:
            single_threaded()
        for index in indices:
            positions = self.stream[index]
            table = rows.table([self.stream.locate(position)[1] for position in positions])
            table = table.append_column("position", pa.array(positions, pa.int64()))
            if self.augment is not None:
                table = pack([view(row, self.stream, self.augment) for row in table.to_pylist()])
            yield table


def execute(reading: Reading, part: range, tasks: int, cpus: float) -> list[pa.Table]:
    """The rows of some micro-batches, one table each, in order: one Ray Data execution, run to its end.

    Args:
        reading: what to read.
        part: which micro-batches of the stream.
        tasks: how many Ray tasks run at a time.
        cpus: that each of them reserves.
    """
    import ray

    rows = pa.concat_tables(ray.get(dataset(reading, part, tasks, cpus).to_arrow_refs()))
    size = reading.stream.size
    return [rows.slice(first, size) for first in range(0, rows.num_rows, size)]


def dataset(reading: Reading, part: range, tasks: int, cpus: float) -> Any:
    """The lazy Ray Data dataset of some micro-batches, in order; see `execute`."""
    import ray
    from ray.data import DataContext, Datasource, ExecutionResources
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    stream = reading.stream
    per_task = max(1, ROWS_PER_TASK // stream.size, -(-len(part) // MOST_TASKS))
    chunks = [part[first : first + per_task] for first in range(0, len(part), per_task)]
    shared = ray.put(reading)

    def task(indices: range) -> ReadTask:
        rows = len(indices) * stream.size
        metadata = BlockMetadata(num_rows=rows, size_bytes=None, exec_stats=None, input_files=None)
        return ReadTask(lambda: ray.get(shared).tables(indices), metadata)

    class StreamSource(Datasource):
        """Ray Data's view of the stream: one read task for each chunk of micro-batches."""

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
        ) -> list[ReadTask]:
            return [task(indices) for indices in chunks]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    session.data_context()
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks * cpus)
    context.target_max_block_size = BLOCK_BYTES
    with DataContext.current(context):
        return ray.data.read_datasource(
            StreamSource(),
            num_cpus=cpus,
            concurrency=min(tasks, len(chunks)),
            override_num_blocks=len(chunks),
        )
