"""Progress: a bar in a terminal, lines in a log."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import time

import pytest

from pipelines.cluster import progress as module
from pipelines.cluster.progress import Progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_with_speed_counts_and_time_left() -> None:
    terminal = Terminal()
    with progress("prepared", 40, stream=terminal) as state:
        state.advance(10, rejected=0)
        time.sleep(0.15)
        state.advance(20, rejected=3)
    last = terminal.getvalue().split("\r")[-1]
    assert "prepared:  75%" in last and "30/40" in last and "images/s" in last and "rejected=3" in last


def test_a_terminal_that_does_not_know_its_width_has_a_bar() -> None:
    """As those of containers and of `script` are: 0 columns."""
    ours, theirs = os.openpty()
    shown = ""
    with os.fdopen(theirs, "w") as terminal:
        assert os.get_terminal_size(theirs).columns == 0
        with progress("prepared", 40, stream=terminal) as state:
            state.advance(20, rejected=3)
            time.sleep(0.15)
            state.advance(20, rejected=3)
        while "prepared: 100%" not in shown and select.select([ours], [], [], 10)[0]:
            shown += os.read(ours, 1000).decode()
    os.close(ours)
    assert "prepared: 100%" in shown and "images/s" in shown and "rejected=3" in shown


def wait_for(caplog: pytest.LogCaptureFixture, lines: int) -> None:
    end = time.monotonic() + 20
    while len(caplog.messages) < lines and time.monotonic() < end:
        time.sleep(0.01)


def test_a_log_has_a_line_again_and_again_also_while_nothing_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.02)
    with caplog.at_level(logging.INFO), progress("prepared", 40, stream=io.StringIO()) as state:
        wait_for(caplog, 1)
        state.advance(10, rejected=1)
        wait_for(caplog, len(caplog.messages) + 2)
    assert caplog.messages[0] == "prepared 0 of 40 images (0.0%)"
    assert re.fullmatch(
        r"prepared 10 of 40 images \(25\.0%\), \d+\.\d images/s, 1 rejected, 00:0\d left", caplog.messages[-1]
    )
    count = len(caplog.messages)
    time.sleep(0.05)
    assert len(caplog.messages) == count


def test_what_an_earlier_run_did_says_nothing_about_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    state = Progress("prepared", 1000, "images")
    state.advance(500, before=True)
    state.advance(100)
    assert state.line() == "prepared 600 of 1,000 images (60.0%), 10.0 images/s, 00:40 left"
