"""Alternating measurements of ours and of peers on the same inputs, and their table.

Times are CPU milliseconds of one thread, so that other programs on the machine disturb them little.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from panoptic.metrics.text import markdown_table

SLOW = 60.0
"""Seconds of CPU after which a case stops repeating once it has three rounds: one peer takes 10 s a call."""


@dataclass(frozen=True)
class Case:
    """One piece of work, done by us and by peers."""

    name: str
    work: str
    ours: Callable[[int], Any]
    """Does the work on input number k."""
    peers: Mapping[str, Callable[[int], Any]] = field(default_factory=dict)
    compare: Mapping[str, Callable[[Any, Any], None]] = field(default_factory=dict)
    """For each peer: raises ValueError where (ours, theirs) differ by more than the work allows."""
    inputs: int = 1
    """A round goes through all of them."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    work: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    """How many times better ours is."""


def measure(case: Case, repeat: int) -> list[Row]:
    """Check that all agree, then take the median of `repeat` rounds, ours and theirs in turn.

    Raises:
        ValueError: a peer's result differs from ours; the message names the case, the peer and the input.
    """
    for name, peer in case.peers.items():
        for k in range(case.inputs):
            try:
                case.compare[name](case.ours(k), peer(k))
            except ValueError as error:
                raise ValueError(
                    f"{case.name}, {name}, input {k}: {error}; no ratio counts before it agrees"
                ) from error
    runs = [case.ours, *case.peers.values()]
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(0)
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for done in range(repeat):
            if done >= 3 and sum(map(sum, seconds)) > SLOW:
                break
            for run, taken in zip(runs, seconds, strict=True):
                taken.append(_round(run, case.inputs))
            gc.collect()
    finally:
        gc.enable()
    ours, *theirs = (1e3 * statistics.median(taken) / case.inputs for taken in seconds)
    if not theirs:
        return [Row(case.name, case.work, ours, "ms")]
    return [
        Row(case.name, case.work, ours, "ms", name, value, value / ours)
        for name, value in zip(case.peers, theirs, strict=True)
    ]


def _round(run: Callable[[int], Any], inputs: int) -> float:
    begin = time.thread_time()
    for k in range(inputs):
        run(k)
    return time.thread_time() - begin


def same_partition(ours: np.ndarray, theirs: np.ndarray, tolerance: float, what: str) -> None:
    """Two maps cut an image into the same parts, whatever the parts are called.

    Args:
        ours, theirs: int [H, W], any numbering.
        tolerance: share of pixels that may lie in another part.
        what: is compared, for the message.

    Raises:
        ValueError: more pixels differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: ours is {ours.shape}, theirs is {theirs.shape}")
    _, a = np.unique(ours, return_inverse=True)
    _, b = np.unique(theirs, return_inverse=True)
    shared = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(shared, (a.ravel(), b.ravel()), 1)
    moved = max(ours.size - shared.max(1).sum(), ours.size - shared.max(0).sum()) / ours.size
    if moved > tolerance:
        raise ValueError(f"{what}: {100 * moved:.3f} % of the pixels differ, at most {100 * tolerance:g} % may")


def close(ours: Any, theirs: Any, what: str) -> None:
    """Equal arrays, up to float32 rounding.

    Raises:
        ValueError: they differ.
    """
    if not np.allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6, atol=1e-5):
        worst = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
        raise ValueError(f"{what}: differs by up to {worst:g}")


def hardware() -> str:
    """CPU, cores, load and the versions that matter, in a line."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in _lines(info) if line.startswith("model name")]
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}, "
        f"NumPy {np.__version__}"
    )


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    cells = [("row", "work", "ours", "peer", "theirs", "ratio")]
    for row in rows:
        theirs = "-" if row.theirs is None else f"{_digits(row.theirs)} {row.unit}"
        ratio = "-" if row.ratio is None else f"{_digits(row.ratio)}x"
        cells.append((row.name, row.work, f"{_digits(row.ours)} {row.unit}", row.peer or "-", theirs, ratio))
    return markdown_table(cells)


def _digits(value: float) -> str:
    """Three significant digits at most, none behind the point from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
