"""Images a second of a training by its number of workers, on the cores of this machine: `make benchmark ROWS=workers`.

The demo's training, each time as a process of its own with a Ray of its own. Of the log's lines the median counts,
without the first, in which everything is still being loaded.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.timing import Row

ROOT = Path(__file__).resolve().parents[2]
RATE = re.compile(r"^step \d+/.* \| ([\d.]+) images/s \|", re.MULTILINE)

WAYS = {
    "two workers of one thread": (2, 1),
    "one worker of one thread": (1, 1),
    "one worker of two threads": (1, 2),
}
"""Workers and threads of each."""


def rows(folder: Path, steps: int) -> list[Row]:
    """Two workers beside one, with one thread and with two.

    Args:
        folder: for runs, which share scenes and shards.
        steps: of each training.
    """
    rates = {name: measured(folder, steps, *way) for name, way in WAYS.items()}
    ours, *others = WAYS
    work = f"training of the demo, {steps} steps of 8 scenes, {ours}"
    return [
        Row("workers", work, rates[ours], "images/s", other, rates[other], rates[ours] / rates[other])
        for other in others
    ]


def measured(folder: Path, steps: int, workers: int, threads: int) -> float:
    """Images a second of one training."""
    options = {
        "--name": f"workers-{workers}-threads-{threads}",
        "--storage": str(folder),
        "--train.steps": str(steps),
        "--train.validate-every": str(steps),
        "--train.log-every": str(max(1, steps // 6)),
        "--train.overlays": "0",
        "--train.workers": str(workers),
        "--train.threads": str(threads),
    }
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "jobs/train.py", "demo", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return rate(done.stdout)


def rate(log: str) -> float:
    """The median of what the lines of a log say, but for the first."""
    return statistics.median(map(float, RATE.findall(log)[1:]))
