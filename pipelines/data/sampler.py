"""The order of training data: pure functions, without Ray, torch or files.

Training reads one endless stream that crosses epochs. `order` maps a position of the stream to (epoch, row),
and global batch s is positions [sB, (s + 1)B) whatever the number of workers: rank r of W takes the r-th
contiguous part of it, in equal micro-batches. So a step's samples and their augmentation depend on nothing
but (seed, position), and the position is all that a checkpoint keeps.

A stream may read a part of the rows (`limit`), and each row in two copies, which count as samples of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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


@lru_cache(maxsize=1)
def limited(rows: int, limit: int, seed: int) -> np.ndarray:
    """int64 [limit], the rows that a data set cut to `limit` keeps: the first so many of a shuffle of its own.

    A smaller limit keeps a part of what a larger one keeps.

    Raises:
        ValueError: there are not so many rows.
    """
    if not 0 < limit <= rows:
        raise ValueError(f"data.limit {limit}: the training split has {rows} rows; give 1 to {rows}, or 0 for all")
    return np.random.default_rng(np.random.SeedSequence([seed])).permutation(rows)[:limit]


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

    def __post_init__(self) -> None:
        if self.limit:
            limited(self.rows, self.limit, self.limit_seed)  # refuses here what cannot be

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
        """Positions of one epoch: each image as often as it has copies."""
        return (self.limit or self.rows) * self.copies

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, row) of a position."""
        epoch, sample = order(self.seed, position, self.samples)
        row = sample // self.copies
        return epoch, int(limited(self.rows, self.limit, self.limit_seed)[row]) if self.limit else row

    def copy(self, position: int) -> int:
        """The number of the copy of its row that stands at a position, from 0."""
        return order(self.seed, position, self.samples)[1] % self.copies


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
