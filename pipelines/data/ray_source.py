"""Rows that Ray Data reads, decodes and augments in its tasks, on whatever machine has CPUs to spare.

A Ray Data source whose tasks follow the order of the stream. Every worker executes its own: Ray's split of one dataset
over the workers gives no say in who gets which row, drops the tail and starts 8 s later. One execution streams for
`MOST_TASKS` tasks, 128,000 rows: Ray Data keeps some memory of each execution, and plans all tasks of one before its
first row (about 1 ms each), so there are neither many executions nor endless ones.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.cluster import session
from pipelines.data.copies import Copies
from pipelines.data.sampler import Stream
from pipelines.data.shard_index import ShardSet
from pipelines.data.shard_reader import Rows, pack, single_threaded, view

if TYPE_CHECKING:
    from panoptic.transforms import Augment

ROWS_PER_TASK = 64
"""Rows that one Ray task reads, so that it works for about a second."""
MOST_TASKS = 2000
"""Tasks of one execution."""
BLOCK_BYTES = 4 << 20
"""Size at which a task hands on what it has read."""


@dataclass(frozen=True)
class Reading:
    """The rows of a stream, and what is to be done with them."""

    stream: Stream
    shards: ShardSet
    augment: Augment | None = None
    """None = hand on the rows as they are."""
    copies: Copies | None = None
    """Copies among the rows."""

    def tables(self, indices: range) -> Iterator[pa.Table]:
        """One table of decoded and augmented samples for each of these micro-batches.

        With windows, all rows of these micro-batches are read first, neighbours in one request.
        """
        if self.augment is None:
            raise ValueError("without an augmentation there is nothing to do but to read, which needs no Ray Data")
        rows, together = _shared_rows(self.shards), {}
        if self.stream.window > 1:
            numbers = sorted({self.stream.locate(p)[1] for index in indices for p in self.stream[index]})
            together = dict(zip(numbers, rows.rows(numbers), strict=True))

        def read(position: int) -> dict[str, Any]:
            number = self.stream.locate(position)[1]
            return (together.get(number) or rows.row(number)) | {"position": position}

        single_threaded()
        for index in indices:
            rows_read = [read(position) for position in self.stream[index]]
            yield pack([view(row, self.stream, self.augment, self.copies) for row in rows_read])


@lru_cache(maxsize=2)
def _shared_rows(shards: ShardSet) -> Rows:
    """One reader a task process: its open files outlive the task."""
    return Rows(shards)


def stream_rows(
    reading: Reading, tasks: int, cpus: float, ahead: int
) -> Generator[Sequence[dict[str, Any]], None, None]:
    """The samples of each micro-batch as rows that `unpack` takes, in order.

    Args:
        reading: what to read.
        tasks: how many Ray tasks run at a time.
        cpus: that each of them reserves.
        ahead: MiB that may wait in the object store.
    """
    per_execution = MOST_TASKS * _per_task(reading.stream)
    for first in range(0, len(reading.stream), per_execution):
        part = range(first, min(first + per_execution, len(reading.stream)))
        batches = dataset(reading, part, tasks, cpus, ahead).iter_batches(
            batch_size=reading.stream.size, batch_format="pyarrow", prefetch_batches=2
        )
        for table in batches:
            yield table.to_pylist()


def _per_task(stream: Stream) -> int:
    """Micro-batches of one task; with windows as many as take the rows of one."""
    return max(1, ROWS_PER_TASK // stream.size, stream.window)


def dataset(reading: Reading, part: range, tasks: int, cpus: float, ahead: int) -> Any:
    """The lazy Ray Data dataset of some micro-batches, in order; see `stream_rows`."""
    import ray
    from ray.data import DataContext, Datasource, ExecutionResources
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    stream = reading.stream
    per_task = _per_task(stream)
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
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks * cpus, object_store_memory=ahead << 20)
    context.target_max_block_size = BLOCK_BYTES
    # A validation may last longer than Ray Data waits for an execution of which nobody takes anything (30 minutes).
    context.execution_no_progress_timeout_s = -1
    with DataContext.current(context):
        return ray.data.read_datasource(
            StreamSource(),
            num_cpus=cpus,
            concurrency=min(tasks, len(chunks)),
            override_num_blocks=len(chunks),
        )
