"""Times of the phases of a step: forward, backward and the optimiser's.

On a GPU they are those of the device, by events in its stream, which cost microseconds and wait for nothing; where the
host does not keep up they hold the gaps, too. Elsewhere they are those of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal

import torch

Phase = Literal["forward", "backward", "optimiser"]
"""forward: the batch's copy, network and losses; backward: with the exchange of gradients between workers; optimiser:
clipping, the update, and the average of the weights."""


class Phases:
    """The phases of one step: each ends where the next one of `end` begins, and may come several times."""

    def __init__(self, device: torch.device) -> None:
        """Make an empty record of a step that runs on this device."""
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Phase | None, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Begin a phase here; what came since the last one ended belongs to none."""
        self._mark(None)

    def end(self, phase: Phase) -> None:
        """End a phase here, and begin the next one."""
        self._mark(phase)

    def _mark(self, phase: Phase | None) -> None:
        if not self._cuda:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def seconds(self) -> dict[Phase, float]:
        """Seconds of each phase; waits for the device where it has not done the step yet."""
        sums: dict[Phase, float] = {}
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                sums[phase] = sums.get(phase, 0.0) + _seconds(start, end)
        return sums


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def mean_seconds(steps: Iterable[Phases]) -> dict[Phase, float]:
    """Mean seconds of each phase of several steps."""
    found = [step.seconds() for step in steps]
    names: dict[Phase, None] = dict.fromkeys(name for seconds in found for name in seconds)
    return {name: sum(seconds.get(name, 0.0) for seconds in found) / len(found) for name in names}
