"""Progress of long work: a bar in a terminal, and where there is none, a line of the log every ten seconds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

INTERVAL = 10.0
"""Seconds between two lines of a log."""


class Progress:
    """The units of work that are done, shown as a bar or in lines; made by `progress`."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._began = time.monotonic()
        self._done = self._before = 0
        self._counts: Mapping[str, int] = {}
        self.bar: tqdm | None = None

    def advance(self, count: int, before: bool = False, **counts: int) -> None:
        """Count more units of work as done.

        Args:
            count: how much more.
            before: it was done in an earlier run, so it says nothing about the speed of this one.
            counts: figures to show beside, of all that is done: `rejected=3`.
        """
        self._done += count
        self._before += count * before
        self._counts = counts or self._counts
        if self.bar is not None:
            self.bar.initial += count * before
            self.bar.set_postfix(self._counts, refresh=False)
            self.bar.update(count)

    def line(self) -> str:
        """The state in one line: done, total, speed, the counts given, and the time that is left."""
        share = f"{self._done / max(self._total, 1):.1%}"
        parts = [f"{self._what} {self._done:,} of {self._total:,} {self._unit} ({share})"]
        counts = [f"{count:,} {name}" for name, count in self._counts.items()]
        fresh = self._done - self._before
        if not fresh:
            return ", ".join(parts + counts)
        speed = fresh / max(time.monotonic() - self._began, 1e-9)
        left = tqdm.format_interval((self._total - self._done) / speed)
        return ", ".join([*parts, f"{speed:.1f} {self._unit}/s", *counts, f"{left} left"])


@contextmanager
def progress(what: str, total: int, unit: str = "images", stream: TextIO | None = None) -> Iterator[Progress]:
    """A context that shows the progress of the work in it.

    Where the stream is a terminal, a bar stands in its last line and log lines appear above it. Elsewhere, as in a
    job's log, there is a line every `INTERVAL` seconds, also while nothing comes to an end.

    Args:
        what: is done, a participle: "prepared".
        total: of the work, in units.
        unit: what is counted.
        stream: where a bar is shown; None is the error stream.
    """
    terminal = sys.stderr if stream is None else stream
    state = Progress(what, total, unit)
    if terminal is not None and terminal.isatty():
        with (
            tqdm(total=total, desc=what, unit=f" {unit}", file=terminal, smoothing=0.1, **_width(terminal)) as bar,
            logging_redirect_tqdm(),
        ):
            state.bar = bar
            yield state
        return
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(INTERVAL):
            logger.info("%s", state.line())

    thread = threading.Thread(target=tell, daemon=True, name="progress")
    thread.start()
    try:
        yield state
    finally:
        stop.set()
        thread.join()


def _width(terminal: TextIO) -> dict[str, Any]:
    """The options of tqdm for the width of a terminal. A container's or a script's may say 0, where nothing shows."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": 80}
