"""The order of training data: pure functions, without Ray, torch or files.

Training reads one endless stream that crosses epochs. `order` maps a position of the stream to (epoch, row),
and global batch s is positions [sB, (s + 1)B) whatever the number of workers: rank r of W takes the r-th
contiguous part of it, in equal micro-batches. So a step's samples and their augmentation depend on nothing
but (seed, position), and the position is all that a checkpoint keeps.

A stream may read a part of the rows (`limit`), each row in two copies, which count as samples of their own, or rows of
rare classes more often (`repeats`).

A permutation of n rows takes 8n bytes, and is drawn once an epoch and process: 3 ms for 118,000 rows, 2 s and 70 MB for
9 million, 9 s and 400 MB for 50 million (measured on two busy cores).

Where a request costs more than its bytes (S3 billed by requests, a store with long latency), `window` reads K
neighbouring rows at once. Each epoch lays a grid of windows of K rows over the data set, at an offset of its own, and
permutes the windows and the rows in each. A global batch has B lanes, one for each place in it; a lane takes whole
windows one after the other, so whoever owns the lane reads a window in one request and holds it for K steps. Samples
are the same for any number of workers, and every epoch still has every row once. Mixing: the B rows of a batch come
from B windows anywhere in the data set, so that neighbours hardly ever meet in a batch (with K = 16 and B = 16 over
25,600 rows a batch has 0.02 pairs of rows less than 16 apart, of 120; in the global order it has 0.15), but the K rows
of a window come within K steps of each other, in place of anywhere in the epoch. Neighbours in shards are no neighbours
in the data set: a training split is shuffled once when it is prepared. Where a global batch changes on the way, as in
an exchange of a population, some rows of that epoch come twice and some not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW = 16
"""Batches whose rows an evaluation holds at once, to find images of one size among them."""

PARTS = 16
"""Windows into which the rows of an evaluation fall at least, where there are batches enough: they are shared out."""


def order(seed: int, position: int, rows: int) -> tuple[int, int]:
    """(epoch, row) at a position of the stream; every epoch is a permutation of its own of all rows."""
    epoch, place = divmod(position, rows)
    return epoch, int(_permutation(seed, epoch, rows)[place])


@lru_cache(maxsize=3)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(rows)


@dataclass(frozen=True, eq=False)
class Repeats:
    """The number of times that each sample comes in an epoch, for a stream in which these differ."""

    factors: np.ndarray
    """float64 [samples], 1 or more; an epoch has the whole number above or below, which is drawn anew for each."""

    @property
    def size(self) -> int:
        """Positions of an epoch, the same for all."""
        return max(1, round(float(self.factors.sum())))

    def locate(self, seed: int, position: int) -> tuple[int, int, int]:
        """Epoch, sample, and how often that sample came before in this epoch."""
        epoch, place = divmod(position, self.size)
        samples, times = _repeated(self, seed, epoch)
        return epoch, int(samples[place]), int(times[place])


@lru_cache(maxsize=3)
def _repeated(repeats: Repeats, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [positions] twice: the sample at each position of an epoch, and how often it came before.

    Systematic sampling: the factors lie one after the other on a line that has the length of the epoch, and each point
    of a grid with distances of 1, whose offset is drawn, takes the sample in which it lies.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    # the end of each sample on the line; rounding must not cost or add a position at the last one
    ends = np.cumsum(repeats.factors) * (repeats.size / repeats.factors.sum())
    ends[-1] = repeats.size
    # points of the grid within each sample
    counts = np.diff(np.floor(np.concatenate([[0.0], ends]) + rng.random())).astype(np.int64)
    samples = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    # all positions of a sample side by side, in the order of the epoch, and there counted from 0
    by_sample = np.argsort(samples, kind="stable")
    times = np.empty_like(samples)
    times[by_sample] = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    return samples, times


class Place(NamedTuple):
    """A position of a stream with windows: its sample, and those that its lane reads with it."""

    epoch: int
    sample: int
    rest: range
    """Places in the epoch's order of windows that the lane takes of this window, from this one on."""

    @property
    def window(self) -> tuple[int, int]:
        """The key of the window: its epoch, and where it ends in the epoch's order of windows."""
        return self.epoch, self.rest.stop


def windowed(seed: int, position: int, samples: int, batch: int, window: int) -> Place:
    """The place of a position in a stream that reads windows of neighbouring samples; see the module.

    Every epoch is a permutation of all samples. It depends on the global batch too, which belongs to a run.
    """
    epoch, within = divmod(position, samples)
    lane, (share, more) = position % batch, divmod(samples, batch)
    # The lanes of an epoch take `share` samples each, and the `more` lanes that come first in it take one more.
    first = epoch * samples % batch
    shift = (lane - first) % batch
    before = lane * share + max(0, min(lane, first + more) - first) + min(lane, max(0, first + more - batch))
    begin, end = before + (within - shift) // batch, before + share + (shift < more)
    last = min(end, (begin // window + 1) * window)
    return Place(epoch, _grid(seed, epoch, samples, window).sample(begin), range(begin, last))


class _Grid(NamedTuple):
    """The windows of an epoch in their order."""

    seed: int
    epoch: int
    samples: int
    window: int
    offset: int
    order: np.ndarray
    """int64 [whole windows]"""

    def sample(self, place: int) -> int:
        """The sample at a place of the epoch's order of windows. The rows that fill no window come last."""
        number, inside = divmod(place, self.window)
        whole = number < len(self.order)
        window = int(self.order[number]) if whole else len(self.order)
        count = self.window if whole else self.samples - len(self.order) * self.window
        inner = _inner(self.seed, self.epoch, window, count)
        return (self.offset + window * self.window + int(inner[inside])) % self.samples


@lru_cache(maxsize=2)
def _grid(seed: int, epoch: int, samples: int, window: int) -> _Grid:
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, window]))
    offset = int(rng.integers(samples))  # so that no two epochs have the same windows, nor the same rows left over
    return _Grid(seed, epoch, samples, window, offset, rng.permutation(samples // window))


@lru_cache(maxsize=1 << 12)
def _inner(seed: int, epoch: int, window: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, window, count])).permutation(count)


@lru_cache(maxsize=1)
def limited(rows: int, limit: int, seed: int) -> np.ndarray:
    """int64 [limit], the rows that a data set cut to `limit` keeps: the first ones of a shuffle of its own.

    A smaller limit keeps a part of what a larger one keeps.

    Raises:
        ValueError: there are not so many rows.
    """
    if not 0 < limit <= rows:
        raise ValueError(f"data.limit {limit}: the training split has {rows} rows; give 1 to {rows}, or 0 for all")
    return np.random.default_rng(np.random.SeedSequence([seed])).permutation(rows)[:limit]


def chosen_rows(rows: int, limit: int, skip: int, seed: int, option: str) -> tuple[int, ...]:
    """The rows, ascending, that an evaluation of a part of a split reads; () = all.

    They are places `skip` to `skip + limit` of the shuffle by `seed`, so that parts of one seed that do not overlap
    there share no image: a validation set and a test set of one split.

    Args:
        option: name of the limit, for the error.

    Raises:
        ValueError: there are not so many rows.
    """
    if not limit and not skip:
        return ()
    end = skip + limit if limit else rows
    if not skip < end <= rows:
        raise ValueError(f"{option} {limit} and skip {skip}: the split has {rows} rows; together they are at most that")
    return tuple(sorted(np.random.default_rng(np.random.SeedSequence([seed])).permutation(rows)[skip:end].tolist()))


def micro_batches(
    step: int, batch: int, world: int = 1, rank: int = 0, accumulation: int = 1, start: int = 0
) -> list[range]:
    """The positions of one rank's micro-batches of a step.

    Step s covers positions start + [sB, (s + 1)B) for a global batch of B, cut into world x accumulation equal
    micro-batches; a rank has `accumulation` neighbouring ones.

    Raises:
        ValueError: the global batch cannot be cut into equal micro-batches.
    """
    if batch % (world * accumulation):
        raise ValueError(
            f"a global batch of {batch} cannot be cut into {world} workers x {accumulation} accumulation steps of "
            f"equal size; choose a multiple of {world * accumulation}"
        )
    size = batch // (world * accumulation)
    first = start + step * batch + rank * accumulation * size
    return [range(first + k * size, first + (k + 1) * size) for k in range(accumulation)]


@dataclass(frozen=True)
class Stream:
    """One rank's part of the training stream."""

    seed: int
    rows: int
    """Rows of the dataset."""
    batch: int
    """Images of one update over all ranks."""
    steps: int
    """Steps of the optimiser until the stream ends."""
    start: int = 0
    """Position at which step 0 begins: 0, or the one that a checkpoint kept."""
    world: int = 1
    rank: int = 0
    accumulation: int = 1
    limit: int = 0
    """Rows that are read, see `limited`; 0 = all."""
    limit_seed: int = 0
    copies: int = 1
    """Samples that each row stands for; 2 where an augmentation doubles the data set."""
    window: int = 0
    """Neighbouring samples that are read at once; 0 or 1 = none, the global order."""
    repeats: Repeats | None = None
    """Numbers of times that the rows that are read come in an epoch; None = each comes once."""

    def __post_init__(self) -> None:
        if self.limit:
            limited(self.rows, self.limit, self.limit_seed)  # refuses here what cannot be
        if self.repeats is not None and (self.window > 1 or self.copies > 1):
            raise ValueError(
                "data.balance: cannot be combined with data.window or augment.doubled; turn off one of them"
            )
        if self.limit and self.window > 1:
            raise ValueError(
                f"data.window {self.window}: the rows that data.limit {self.limit} keeps are no neighbours; set one of "
                "them to 0"
            )

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __getitem__(self, index: int) -> range:
        """The positions of this rank's micro-batch `index`."""
        step, part = divmod(index, self.accumulation)
        return micro_batches(step, self.batch, self.world, self.rank, self.accumulation, self.start)[part]

    @property
    def size(self) -> int:
        """Images of a micro-batch."""
        return len(self[0])

    @property
    def samples(self) -> int:
        """Positions of one epoch: each image as often as it has copies, or comes."""
        if self.repeats is not None:
            return self.repeats.size
        return (self.limit or self.rows) * self.copies

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, row) of a position."""
        if self.window > 1:
            place = self.place(position)
            return place.epoch, place.sample // self.copies
        if self.repeats is not None:
            epoch, row, _ = self.repeats.locate(self.seed, position)
        else:
            epoch, sample = order(self.seed, position, self.samples)
            row = sample // self.copies
        return epoch, int(limited(self.rows, self.limit, self.limit_seed)[row]) if self.limit else row

    def times(self, position: int) -> int:
        """The number of times that the row at a position came before in its epoch; 0 where each comes once."""
        return 0 if self.repeats is None else self.repeats.locate(self.seed, position)[2]

    def copy(self, position: int) -> int:
        """The number of the copy of its row that stands at a position, from 0."""
        if self.window > 1:
            return self.place(position).sample % self.copies
        return order(self.seed, position, self.samples)[1] % self.copies

    def place(self, position: int) -> Place:
        """The place of a position where there are windows."""
        return windowed(self.seed, position, self.samples, self.batch, self.window)

    def read_with(self, place: Place) -> list[int]:
        """The samples that one request brings: that of the place, and those that its lane takes next."""
        grid = _grid(self.seed, place.epoch, self.samples, self.window)
        return [grid.sample(k) for k in place.rest]


def evaluation_window(rows: int, batch: int) -> int:
    """Rows of which batches are made, in the order of the dataset: a multiple of the batch.

    It depends on nothing else, so that the batches are the same however many workers share the rows.
    """
    return batch * min(max(rows // (PARTS * batch), 1), WINDOW)


def evaluation_rows(rows: int, rank: int = 0, world: int = 1, window: int = 1) -> range:
    """This rank's rows: neighbouring windows, equally many to within one. A rank may have none."""
    windows = -(-rows // window)
    first, end = (min(k * windows // world * window, rows) for k in (rank, rank + 1))
    return range(first, end)
