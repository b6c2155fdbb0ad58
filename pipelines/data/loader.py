"""From shards to micro-batches. Nothing but (seed, position) decides what comes out.

The order is ours (`sampler.py`), and so is reading (`shard_reader.py`): a thread pool reads the rows of the next
micro-batches, each by its position and checked, from disk or S3, and another decodes and augments them. With
`feed.decode map` Ray Data does both in its tasks, on whatever machine has CPUs to spare (`ray_source.py`). Every row
carries its position; an unexpected one stops the run.

Ray Data as an engine: it writes the shards (`prepare.py`: one task a shard, on all machines) and decodes elsewhere
where that is asked for. It has no part in reading for training by default, because none of its parts gives what is
needed there: a global permutation that any number of workers share and that begins at any position
(`streaming_split` gives equal parts in an order of its own and drops the tail; `random_shuffle` holds everything in
memory), and reads of single rows. A source of our own in it, one short execution after another, cost 53 ms of CPU an
execution and left 1.1 MiB behind in Ray's processes each time (1,200 executions of four micro-batches, on a busy
machine of two cores).

Shapes: B images of a micro-batch, H x W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from panoptic.segmentation import Sample, Targets, collate
from panoptic.training.device import pinned
from panoptic.transforms import Augment, Resize, evaluation_view
from pipelines.data.config import FeedConfig
from pipelines.data.copies import copies_of
from pipelines.data.prepare import Manifest, read_row
from pipelines.data.ray_source import Reading, stream_rows
from pipelines.data.sampler import Stream, evaluation_rows, evaluation_window
from pipelines.data.shard_reader import Rows, single_threaded, unpack, view

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

Row = dict[str, Any]
"""A shard's row and its `position`; or what `pack` made of it."""

PATIENCE = 60.0
"""Seconds of waiting after which the log says so."""

DISK_READS = 4
S3_READS = 32
"""Reads at a time where `feed.reads` does not say."""


PIECE = 16
"""Neighbouring rows that an evaluation reads at once."""

DEFAULT = FeedConfig()
"""The machinery where none is named."""


Source = Callable[[Reading, FeedConfig], Generator[Sequence[Row], None, None]]
"""A function that yields the rows of each micro-batch, in order."""


def read_ahead(reading: Reading, config: FeedConfig) -> Generator[Sequence[Row], None, None]:
    """The rows of each micro-batch, read in threads while those before them are used.

    Beside the micro-batch that is due, so many rows are under way as keep every thread busy; at least those of the
    next one.
    """
    stream = reading.stream
    threads = config.reads or (S3_READS if reading.shards.uri.startswith("s3://") else DISK_READS)
    requests = _Requests(Rows(reading.shards), stream, threads)
    waiting: deque[list[_Requested]] = deque()
    following, rows, size = 0, 0, 0  # the next micro-batch to begin; rows and bytes behind the one that is due
    try:
        while following < len(stream) or waiting:
            while following < len(stream) and (len(waiting) < 2 or (rows < 2 * threads and size < config.ahead << 20)):
                waiting.append([requests.begin(position) for position in stream[following]])
                following += 1
                if len(waiting) > 1:
                    rows += len(waiting[-1])
                    size += _bytes(waiting[-1])
            due = waiting.popleft()
            if waiting:  # the next one is due now
                rows -= len(waiting[0])
                size -= _bytes(waiting[0])
            yield [request.row() for request in due]
    finally:
        requests.close()


@dataclass(frozen=True)
class _Requested:
    """A row that is being read, by itself or with others of its window."""

    position: int
    number: int
    size: int
    """Bytes of the row."""
    rows: Future[Mapping[int, Row]]

    def row(self) -> Row:
        return self.rows.result()[self.number] | {"position": self.position}


def _bytes(requests: Sequence[_Requested]) -> int:
    return sum(request.size for request in requests)


class _Requests:
    """Begins to read the rows of positions, each by itself or window by window as the stream says."""

    def __init__(self, reader: Rows, stream: Stream, threads: int) -> None:
        self._reader, self._stream = reader, stream
        self._pool = ThreadPoolExecutor(threads, "read")
        self._windows: dict[tuple[int, int], Future[Mapping[int, Row]]] = {}

    def begin(self, position: int) -> _Requested:
        """The request of a position, of which those of a lane come in their order."""
        number = self._stream.locate(position)[1]
        rows = self._window(position) if self._stream.window > 1 else self._pool.submit(self._read, [number])
        return _Requested(position, number, int(self._reader.index.lengths[number]), rows)

    def close(self) -> None:
        """End the threads; what was not begun is left."""
        self._pool.shutdown(cancel_futures=True)

    def _window(self, position: int) -> Future[Mapping[int, Row]]:
        """The rows of a position's window, asked for with the first of its positions and dropped after the last."""
        place = self._stream.place(position)
        rows = self._windows.get(place.window)
        if rows is None:
            numbers = sorted({sample // self._stream.copies for sample in self._stream.read_with(place)})
            rows = self._windows[place.window] = self._pool.submit(self._read, numbers)
        if len(place.rest) == 1:
            del self._windows[place.window]
        return rows

    def _read(self, numbers: Sequence[int]) -> Mapping[int, Row]:
        return dict(zip(numbers, self._reader.rows(numbers), strict=True))


def rows_of(reading: Reading, config: FeedConfig) -> Generator[Sequence[Row], None, None]:
    """The rows of each micro-batch, read as `feed.decode` says."""
    if reading.augment is None:
        return read_ahead(reading, config)
    return stream_rows(reading, config.tasks, config.cpus, config.ahead)


class Feed:
    """Micro-batches of one rank, prepared in the background.

    Iterate it once; leaving the `with` block ends its threads and what it runs in Ray Data.
    """

    def __init__(
        self,
        manifest: Manifest,
        stream: Stream,
        augment: Augment,
        config: FeedConfig = DEFAULT,
        divisor: int = 1,
        source: Source = rows_of,
        pin: bool = False,
    ) -> None:
        """Start reading.

        Args:
            manifest: of the training shards.
            stream: this rank's part.
            augment: the training view.
            config: machinery; no choice of it changes what comes out.
            divisor: the model's; canvases are padded to it.
            source: who brings the rows; another one is for tests and measurements.
            pin: put micro-batches into pinned memory, from which a GPU copies beside its other work.

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
        self._copies = copies_of(manifest.source)
        self._reading = Reading(stream, manifest.shard_set, in_map, self._copies)
        self._source, self._pin = source, pin
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
            ValueError: a row is not what was written.
            RuntimeError: a row came that the order does not expect, or the rows ended early.
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
            needs = f"; Ray Data needs {self._config.reserved_cpus:g} CPUs for each worker beside its own"
            logger.warning("no data for %.0f s%s", PATIENCE, needs if self._config.decode == "map" else "")

    def _run(self) -> None:
        """The thread: rows in, collated micro-batches out, errors handed on."""
        try:
            single_threaded()
            source = self._source(self._reading, self._config)
            with contextlib.closing(source), ThreadPoolExecutor(self._config.threads, "decode") as pool:
                for decoding in _one_ahead(self._decoding(source, pool)):
                    batch = collate([sample.result() for sample in decoding], self._divisor)
                    if not self._put(pinned(*batch) if self._pin else batch):
                        return
        except BaseException as error:
            self._put(error)

    def _decoding(self, source: Iterator[Sequence[Row]], pool: ThreadPoolExecutor) -> Iterator[list[Future[Sample]]]:
        """Micro-batches whose decoding has begun, each checked against the order."""
        for index in range(len(self._stream)):
            rows = next(source, None)
            expected = self._stream[index]
            if rows is None:
                raise RuntimeError(f"the data ended before position {expected.start}, the next one in order")
            positions = [row["position"] for row in rows]
            if positions != list(expected):
                raise RuntimeError(
                    f"positions {list(expected)} were due and {positions} came: rows were lost or reordered between "
                    "the shards and this worker"
                )
            yield [pool.submit(self._decode, row) for row in rows]

    def _decode(self, row: Row) -> Sample:
        return unpack(row) if self._config.decode == "map" else view(row, self._stream, self._augment, self._copies)

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
    reader = Rows(manifest.shard_set)
    window = evaluation_window(manifest.rows, batch)
    mine = evaluation_rows(manifest.rows, rank, world, window) if rows is None else rows
    if batch == 1:  # every row is a batch, in any window
        window = PIECE

    def decode(row: Row) -> Sample:
        return evaluation_view(replace(read_row(row), position=row["position"]), resize)

    def read(numbers: Sequence[int]) -> list[Row]:
        found = reader.rows(manifest.stored_rows(numbers))
        return [row | {"position": number} for row, number in zip(found, numbers, strict=True)]

    def reading(pool: ThreadPoolExecutor) -> Iterator[list[Future[list[Row]]]]:
        """Windows whose reading has begun."""
        for first in range(0, len(mine), window):
            numbers = mine[first : first + window]
            yield [pool.submit(read, numbers[k : k + PIECE]) for k in range(0, len(numbers), PIECE)]

    def decoding(readers: ThreadPoolExecutor, decoders: ThreadPoolExecutor) -> Iterator[list[Future[Sample]]]:
        """Batches whose decoding has begun."""
        for pieces in _one_ahead(reading(readers)):
            read_rows = [row for piece in pieces for row in piece.result()]
            for alike in [[row] for row in read_rows] if batch == 1 else _by_size(read_rows):
                for start in range(0, len(alike), batch):
                    yield [decoders.submit(decode, row) for row in alike[start : start + batch]]

    with ThreadPoolExecutor(DISK_READS, "read") as readers, ThreadPoolExecutor(threads, "decode") as decoders:
        for batch_of_futures in _one_ahead(decoding(readers, decoders)):
            samples = [sample.result() for sample in batch_of_futures]
            images, targets = collate(samples, divisor, resize.canvas)
            yield images, targets, samples


def _by_size(rows: list[Row]) -> list[list[Row]]:
    """The rows in groups of one image size, in order of first appearance."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["height"], row["width"]), []).append(row)
    return list(groups.values())


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Prefetch by one: an item is yielded only after the next was fetched, so that the work of both overlaps."""
    waiting: Item | None = None
    for item in items:
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting
