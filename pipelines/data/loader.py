"""From shards to micro-batches: the order is ours (`sampler.py`), Ray Data executes it (`shard_reader.py`).

Decoding and augmenting run in Ray Data's tasks ("map") or in threads of the training process ("collate"),
where only encoded bytes cross the object store. Every row carries its position; an unexpected one stops the
run. Nothing but (seed, position) decides what comes out.

Shapes: B images of a micro-batch, H x W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import pyarrow as pa
from torch import Tensor

from panoptic.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from panoptic.segmentation import Sample, Targets, collate
from panoptic.transforms import Augment, Resize, evaluation_view
from pipelines.data.prepare import Manifest, read_row
from pipelines.data.sampler import Stream, evaluation_rows, evaluation_window
from pipelines.data.shard_reader import Reading, Rows, execute, single_threaded, unpack, view

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

FIRST_ROWS = 64
"""Rows of the first execution: few, so that training starts, and enough to know how large a row is."""

PATIENCE = 60.0
"""Seconds of waiting after which the log says so."""


@dataclass(frozen=True)
class FeedConfig:
    """The machinery that brings data to the workers."""

    decode: Literal["collate", "map"] = "collate"
    """Decode and augment in threads of the training process, or in Ray Data's tasks (spare CPUs, other machines)."""
    threads: PositiveInt = 2
    """Decoding threads of each worker (collate, evaluation)."""
    prefetch: PositiveInt = 4
    """Micro-batches that wait ready for training."""
    tasks: PositiveInt = 1
    """Ray Data tasks of each worker at a time."""
    cpus: PositiveFloat = 0.2
    """CPUs that each of these tasks reserves; a cluster needs workers x (their CPUs + tasks x this)."""
    ahead: PositiveInt = 128
    """MiB of rows of each worker that may wait in the object store."""
    cache: NonNegativeInt = 256
    """MiB of shards that each task process keeps in memory."""


def ray_tables(reading: Reading, config: FeedConfig) -> Iterator[pa.Table]:
    """The rows of each micro-batch, through Ray Data, in executions of about half of `config.ahead` each.

    Each runs to its end while the one before is consumed. One execution for the whole run would wait for its
    consumer most of the time, and Ray Data's executor waits by polling: measured on two cores, the demo then
    trained at 12 to 14 images/s instead of 26 to 31.
    """
    stream, first, count = reading.stream, 0, max(1, FIRST_ROWS // reading.stream.size)
    with ThreadPoolExecutor(1, "reading") as pool:
        pending = pool.submit(execute, reading, range(min(count, len(stream))), config.tasks, config.cpus)
        while first < len(stream):
            tables = pending.result()
            first += len(tables)
            each = max(1, sum(table.nbytes for table in tables) // max(1, len(tables)))
            count = max(1, (config.ahead << 19) // each)
            part = range(first, min(first + count, len(stream)))
            if not tables:
                return  # the feed says which position is missing
            if part:
                pending = pool.submit(execute, reading, part, config.tasks, config.cpus)
            yield from tables


class Feed:
    """Micro-batches of one rank, prepared in the background.

    Iterate it once; leaving the `with` block ends the thread and the Ray Data execution.
    """

    def __init__(
        self,
        manifest: Manifest,
        stream: Stream,
        augment: Augment,
        config: FeedConfig = FeedConfig(),
        divisor: int = 1,
        source: Callable[[Reading, FeedConfig], Iterable[pa.Table]] = ray_tables,
    ) -> None:
        """Start reading.

        Args:
            manifest: of the training shards.
            stream: this rank's part.
            augment: the training view.
            config: machinery; no choice of it changes what comes out.
            divisor: the model's; canvases are padded to it.
            source: who executes the reading; another one than Ray Data is for tests and measurements.

        Raises:
            ValueError: there are no rows, the stream was made for another number of rows, or the global batch
                cannot be cut into equal micro-batches.
        """
        if manifest.rows == 0 or stream.rows != manifest.rows:
            raise ValueError(f"{manifest.uri}: {manifest.rows} rows, but the feed was asked to read {stream.rows}")
        if stream.copies != 1 + augment.doubled:
            raise ValueError(
                f"augment.doubled {augment.doubled}, but the stream has {stream.copies} copies of each row"
            )
        if stream.size < 1:  # also refuses here, not in the thread, what cannot be cut
            raise ValueError(f"a global batch of {stream.batch} images: it needs at least one")
        self.waited = 0.0
        """Seconds that the consumer waited since the first micro-batch."""
        self.startup = 0.0
        """Seconds that it waited for the first one."""
        self.position = stream.start
        """The position where the stream goes on once the micro-batches taken so far are done (whole steps only)."""
        self._stream, self._augment, self._config, self._divisor = stream, augment, config, divisor
        in_map = augment if config.decode == "map" else None
        self._reading = Reading(stream, manifest.shard_files, len(manifest.categories), config.cache, in_map)
        self._source = source
        self._ready: queue.Queue[Any] = queue.Queue(config.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._taken = 0
        self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background work; micro-batches not taken are dropped."""
        self._stop.set()
        self._thread.join(timeout=30)

    def __len__(self) -> int:
        """Micro-batches of the stream."""
        return len(self._stream)

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        """Images uint8 [B, 3, H, W] and targets on the CPU, `accumulation` times a step.

        Raises:
            RuntimeError: a row came that the order does not expect, or Ray Data ended early.
        """
        while self._taken < len(self._stream):
            begin = time.perf_counter()
            item = self._next()
            seconds = time.perf_counter() - begin
            if self._taken:
                self.waited += seconds
            else:
                self.startup = seconds
            if isinstance(item, BaseException):
                self._ready.put(item)  # the thread has ended: whoever asks again gets the same answer
                raise item
            self._taken += 1
            self.position = self._stream.start + self._taken // self._stream.accumulation * self._stream.batch
            yield item

    def _next(self) -> Any:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=PATIENCE)
            logger.warning(
                "no data for %.0f s; Ray Data needs %g CPUs for each worker (feed.tasks x feed.cpus) beside its own",
                PATIENCE,
                self._config.tasks * self._config.cpus,
            )

    def _run(self) -> None:
        """The thread: rows in, collated micro-batches out, errors handed on."""
        try:
            single_threaded()
            with ThreadPoolExecutor(self._config.threads, "decode") as pool:
                for decoding in _one_ahead(self._decoding(pool)):
                    if not self._put(collate([sample.result() for sample in decoding], self._divisor)):
                        return
        except BaseException as error:
            self._put(error)

    def _decoding(self, pool: ThreadPoolExecutor) -> Iterator[list[Future[Sample]]]:
        """Micro-batches whose decoding has begun, each checked against the order."""
        tables = iter(self._source(self._reading, self._config))
        for index in range(len(self._stream)):
            table = next(tables, None)
            expected = self._stream[index]
            if table is None:
                raise RuntimeError(f"the data ended before position {expected.start}, the next one in order")
            positions = table["position"].to_pylist()
            if positions != list(expected):
                raise RuntimeError(
                    f"positions {list(expected)} were due and {positions} came: rows were lost or reordered between "
                    "the shards and this worker"
                )
            yield [pool.submit(self._decode, row) for row in table.to_pylist()]

    def _decode(self, row: dict[str, Any]) -> Sample:
        return unpack(row) if self._config.decode == "map" else view(row, self._stream, self._augment)

    def _put(self, item: Any) -> bool:
        """Hand an item to the consumer; False where it does not want it any more."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False


def evaluation_batches(
    manifest: Manifest,
    resize: Resize,
    batch: int,
    *,
    rank: int = 0,
    world: int = 1,
    divisor: int = 1,
    threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Targets, list[Sample]]]:
    """Every row of this rank (or of `rows`) once; the next batch is decoded while the last one is evaluated.

    Only images of one size share a batch: padding would change what a network that pools over the whole
    canvas says, and so the figures would depend on the batch. Within a window of rows they are sorted for it; ranks
    share whole windows, so that the batches are those of one worker. `rows` are whole windows for the same reason.

    Yields:
        images uint8 [B, 3, H, W], targets on the CPU, and the samples: `original` is the truth at the size of
        the source, `position` the row. A batch may be smaller; a rank may have none.
    """
    single_threaded()
    reader = Rows(manifest.shard_files, len(manifest.categories), cache=32 << 20)

    def decode(row: dict[str, Any]) -> Sample:
        return evaluation_view(replace(read_row(row), position=row["position"]), resize)

    def decoding(pool: ThreadPoolExecutor) -> Iterator[list[Future[Sample]]]:
        window = evaluation_window(manifest.rows, batch)
        mine = evaluation_rows(manifest.rows, rank, world, window) if rows is None else rows
        if batch == 1:  # every row is a batch, in any window
            window = 1
        for first in range(0, len(mine), window):
            numbers = mine[first : first + window]
            table = reader.table(numbers).append_column("position", pa.array(numbers, pa.int64()))
            for alike in _by_size(table.to_pylist()):
                for start in range(0, len(alike), batch):
                    yield [pool.submit(decode, row) for row in alike[start : start + batch]]

    with ThreadPoolExecutor(threads, "decode") as pool:
        for batch_of_futures in _one_ahead(decoding(pool)):
            samples = [sample.result() for sample in batch_of_futures]
            images, targets = collate(samples, divisor, resize.canvas)
            yield images, targets, samples


def _by_size(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows in groups of one image size, in order of first appearance."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["height"], row["width"]), []).append(row)
    return list(groups.values())


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each handed on when the next one has begun."""
    waiting: Item | None = None
    for item in items:
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting
