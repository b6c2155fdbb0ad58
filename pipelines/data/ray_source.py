"""Rows that Ray Data reads, decodes and augments in its tasks, on whatever machine has CPUs to spare.

A dataset of Ray Data whose tasks follow the order of the stream. Every worker executes its own: Ray's split of one
dataset over the workers gives no say in who gets which row, drops the tail and starts 8 s later. One execution streams
for `MOST_TASKS` tasks, 128,000 rows: Ray Data keeps some memory of each execution, and plans all tasks of one before
its first row, so there are neither many executions nor endless ones.

Training does not wait where one execution follows another (`in_turn`). The next one is planned in a thread while the
former runs, and starts when the last rows of the former have left Ray, while the last `HELD` micro-batches are used.
Never before: tasks of two executions at once would hold more CPUs than a worker reserves, and where nobody takes their
rows yet they would keep them from whoever is waited for. Planning 2,000 tasks takes 1.2 to 1.9 s of CPU, beginning an
execution that is planned 0.13 to 0.25 s until its first row. A `Datasource` of our own is planned when it begins: it
took 3.2 to 5.9 s then (three of each on a busy machine of two cores). There a training of 100 ms a step waited 2.5 s
before the first row of an execution of 2,000 tasks when nothing was done ahead, and at most 0.01 s now.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipelines.cluster import session
from pipelines.data.copies import Copies
from pipelines.data.sampler import Stream
from pipelines.data.shard_index import ShardSet
from pipelines.data.shard_reader import Rows, pack, single_threaded, view

if TYPE_CHECKING:
    from panoptic.transforms import Augment

Plan = TypeVar("Plan")
Item = TypeVar("Item")

ROWS_PER_TASK = 64
"""Rows that one Ray task reads, so that it works for about a second."""
MOST_TASKS = 2000
"""Tasks of one execution."""
BLOCK_BYTES = 4 << 20
"""Size at which a task hands on what it has read."""
HELD = 8
"""Micro-batches that this process holds while the next execution begins."""


@dataclass(frozen=True)
class Reading:
    """The rows of a stream, and what is to be done with them."""

    stream: Stream
    shards: ShardSet
    augment: Augment | None = None
    """The augmentation of decoded rows; None = hand on the rows as they are."""
    copies: Copies | None = None
    """Copies among the rows."""

    def tables(self, indices: range) -> Iterator[pa.Table]:
        """One table of decoded and augmented samples for each of the micro-batches `indices`.

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
    whole = range(len(reading.stream))
    parts = [whole[first : first + per_execution] for first in range(0, len(whole), per_execution)]

    def plan(part: range) -> Any:
        return dataset(reading, part, tasks, cpus, ahead)

    def begin(planned: Any) -> Generator[pa.Table, None, None]:
        yield from planned.iter_batches(batch_size=reading.stream.size, batch_format="pyarrow", prefetch_batches=2)

    with contextlib.closing(in_turn(parts, plan, begin)) as tables:
        for table in tables:
            yield table.to_pylist()


def in_turn(
    parts: Sequence[range], plan: Callable[[range], Plan], begin: Callable[[Plan], Generator[Item, None, None]]
) -> Generator[Item, None, None]:
    """The items of one execution after another, each begun before the last items of the former are taken.

    A thread plans each execution once half of the former has been taken. When `HELD` items are left, it takes them off
    the former and at once begins the next one, as far as its first item. No two executions run at a time.

    Args:
        parts: the items of each execution, of which it has as many.
        plan: makes an execution ready.
        begin: an execution, which runs from when its first item is asked for until it has no more, or is closed.

    Raises:
        Exception: what `plan` and `begin` raise, when all items before have been taken.
    """
    end, closing = object(), threading.Event()
    begun: deque[Generator[Item, None, None]] = deque(maxlen=2)  # earlier executions have ended

    def start(planned: Plan) -> Iterator[Item]:
        begun.append(begin(planned))
        return chain(list(islice(begun[-1], 1)), begun[-1])

    def go_on(running: Iterator[Item], rest: queue.SimpleQueue[Any], planned: Future[Plan]) -> Iterator[Item]:
        try:
            for item in running:
                rest.put(item)
                if closing.is_set():
                    return running
            return start(planned.result())
        finally:
            rest.put(end)

    thread = ThreadPoolExecutor(1, "plan")
    try:
        running = start(plan(parts[0])) if parts else iter(())
        for part, after in zip_longest(parts, parts[1:]):
            alone = max(0, len(part) - HELD)
            half = min(alone, len(part) // 2)
            yield from islice(running, half)
            if after is None:
                yield from running
                return
            planned = thread.submit(plan, after)
            yield from islice(running, alone - half)
            rest: queue.SimpleQueue[Any] = queue.SimpleQueue()
            following = thread.submit(go_on, running, rest, planned)
            yield from iter(rest.get, end)
            running = following.result()
    finally:
        closing.set()
        thread.shutdown(cancel_futures=True)
        for execution in begun:
            execution.close()


def _per_task(stream: Stream) -> int:
    """Micro-batches of one task; with windows as many as take the rows of one."""
    return max(1, ROWS_PER_TASK // stream.size, stream.window)


def chunks_of(stream: Stream, part: range) -> list[range]:
    """The micro-batches of each task, of some micro-batches of a stream."""
    per_task = _per_task(stream)
    return [part[first : first + per_task] for first in range(0, len(part), per_task)]


def dataset(reading: Reading, part: range, tasks: int, cpus: float, ahead: int) -> Any:
    """The Ray Data dataset of some micro-batches, in order, which is planned but not begun; see `stream_rows`."""
    import ray
    from ray.data import ExecutionResources, TaskPoolStrategy

    session.data_context()
    chunks = chunks_of(reading.stream, part)
    shared = ray.put(reading)
    blocks = ray.data.from_items(
        [{"first": chunk.start, "end": chunk.stop} for chunk in chunks], override_num_blocks=len(chunks)
    )
    context = blocks.context  # a copy, of this dataset alone
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks * cpus, object_store_memory=ahead << 20)
    context.target_max_block_size = BLOCK_BYTES
    # A validation may last longer than Ray Data waits for an execution of which nobody takes anything (30 minutes).
    context.execution_no_progress_timeout_s = -1

    def read(block: pa.Table) -> Iterator[pa.Table]:
        for chunk in block.to_pylist():
            yield from ray.get(shared).tables(range(chunk["first"], chunk["end"]))

    return blocks.map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        compute=TaskPoolStrategy(min(tasks, len(chunks))),
    )
