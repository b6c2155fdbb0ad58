"""The looks that workers take up from their steps: is a checkpoint due, are they to stop?

A checkpoint is taken by all workers at one step, so they must agree on it, though only rank 0 knows the time and
whether the one before is written, and perhaps only one of them has a notice. They do in a collective operation of three
numbers, at steps that all of them know beforehand: about one a second, and at every multiple of
`train.checkpoint_every`. In a validation, which may take minutes, they do not meet; there the one with the notice sets
a mark, at which the others look once a second.
"""

from __future__ import annotations

import math
import time
from typing import Literal

import torch

from panoptic.distributed import is_marked, mark, world_size
from pipelines.training import notice
from pipelines.training.state import State
from pipelines.training.writer import Writer

SECONDS = 1.0
"""Seconds between looks."""

MOST_STEPS = 50
"""Steps between looks at the most."""

DRAINED = 2.0
"""The value by which a worker tells the others that its node is drained; that of any other notice is 1."""

OF_ANOTHER = "notice of another worker"
"""The reason of a worker that has no notice itself."""


class Watch:
    """The agreement of the workers of one training; each has its own. A context, to be left when the steps end."""

    def __init__(self, state: State, writer: Writer) -> None:
        options = state.experiment.train
        self._device, self._rank = state.device, state.rank
        self._writer = writer
        self._every, self._seconds = options.checkpoint_every, 60 * options.checkpoint_minutes
        self._looked, self._looked_at = state.step, time.monotonic()
        self._next = state.step + 1
        self._key = state.job.key
        self._mark, self._interrupted_at = f"notice after step {state.step}", -math.inf
        self._listener = notice.listen(self._key, state.rank) if self._key else None
        self.reason = ""
        """The reason for which this worker would stop; "" where it has none."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        if self._listener is not None:
            self._listener.close()

    def asks(self, step: int) -> Literal["", "checkpoint", "stop"]:
        """The action that is due now; every worker calls it after every step, and all get one answer.

        To stop is to save a checkpoint before.

        Args:
            step: updates done.
        """
        if step < self._next and (not self._every or step % self._every):
            return ""
        now = time.monotonic()
        steps = (step - self._looked) * SECONDS / max(now - self._looked_at, 1e-6)
        self.reason = self._noticed()
        told = DRAINED if self.reason == notice.DRAINED else float(bool(self.reason))
        stop, due, steps = self._agree(told, self._rank == 0 and self._due(step, now), min(MOST_STEPS, max(1.0, steps)))
        self._looked, self._looked_at, self._next = step, time.monotonic(), step + int(steps)
        if stop:
            self.reason = self.reason or (notice.DRAINED if stop == DRAINED else OF_ANOTHER)
            return "stop"
        return "checkpoint" if due else ""

    def interrupts(self) -> bool:
        """True if a worker has a notice. Asked between the batches of a validation, where workers do not meet."""
        now = time.monotonic()
        if not self.reason and now - self._interrupted_at >= SECONDS:
            self._interrupted_at, self.reason = now, self._noticed()
            if self.reason:
                mark(self._mark)
            elif is_marked(self._mark):
                self.reason = OF_ANOTHER
        return bool(self.reason)

    def _noticed(self) -> str:
        if not self._key:  # no driver, as in tests
            return ""
        return notice.of_this_worker() or ("" if self._listener is None else self._listener.reason)

    def _due(self, step: int, now: float) -> bool:
        """True if rank 0 has reason to take a checkpoint, and may."""
        if step == self._writer.saved or self._writer.busy:
            return False
        if self._every and step // self._every > self._writer.saved // self._every:
            return True
        return bool(self._seconds) and now - self._writer.saved_at >= self._seconds

    def _agree(self, *values: float) -> list[float]:
        """The largest of all workers' values; the speeds of rank 0 alone count."""
        if world_size() == 1:
            return list(values)
        own = [*values[:-1], values[-1] if self._rank == 0 else 0.0]
        told = torch.tensor(own, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return told.tolist()
