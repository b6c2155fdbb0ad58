"""Seconds from the command to the first step of a training, by part: `python -m tests.benchmarks.startup FOLDER`.

On one machine, in a Ray of its own, and then through `jobs/submit.py` on a cluster of two nodes on this machine, twice:
the second submission finds its code on the machines. The model is tiny and the data small: what is left is start-up.
The load of the machine is printed, since it makes all of it longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

TINY = """
--model.rates 2 --model.aspp-channels 16 --model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --train.steps 1 --train.batch 4 --train.overlays 0
--train.log-every 1 --train.workers 2
"""


def main() -> None:
    """Print both tables."""
    folder = Path(sys.argv[1]).absolute()
    if sys.argv[2:] == ["here"]:
        here(folder)
        return
    subprocess.run([sys.executable, "-m", "tests.benchmarks.startup", str(folder), "here"], check=True)
    submitted(folder)


def options(folder: Path, name: str) -> list[str]:
    """Of a training of one step on eight drawn scenes."""
    return [
        "demo",
        "--name",
        name,
        "--storage",
        str(folder),
        "--data.scenes.train",
        "8",
        "--data.scenes.val",
        "4",
        *TINY.split(),
    ]


def here(folder: Path) -> None:
    """In this process, whose functions say when they are done."""
    marks: list[tuple[str, float]] = []
    begin = psutil.Process().create_time()

    def mark(name: str) -> None:
        marks.append((name, time.time()))

    from jobs import train
    from pipelines.cluster import session
    from pipelines.training import driver

    mark("Python, imports")

    def timed(module: Any, name: str, before: str = "", after: str = "") -> None:
        function: Callable[..., Any] = getattr(module, name)

        def run(*arguments: Any, **named: Any) -> Any:
            if before:
                mark(before)
            result = function(*arguments, **named)
            if after:
                mark(after)
            return result

        setattr(module, name, run)

    timed(session, "connect", "options, model, store checked", "Ray")
    timed(driver, "prepare_data", "", "scenes drawn, shards written")
    timed(driver, "_open_run", "", "MLflow run (a new store)")
    write = sys.stdout.write

    def watched(text: str) -> int:
        if "step 1/" in text:
            mark("Ray Train: controller, two workers, process group, first step")
        return write(text)

    sys.stdout.write = watched  # type: ignore[method-assign]
    train.main(options(folder, f"here-{time.time():.0f}"))
    last, seen = begin, set()
    print(f"\non one machine (load {os.getloadavg()[0]:.0f})")
    for name, moment in marks:
        if name not in seen:  # Ray is joined again by what comes later
            print(f"{moment - last:6.1f} s  {name}")
            last = moment
            seen.add(name)
    print(f"{last - begin:6.1f} s  in all")


def submitted(folder: Path) -> None:
    """Through the job server, from what is printed."""
    from tests.support import two_nodes

    store = f"sqlite:///{folder}/mlflow.db"
    with two_nodes.cluster_of_nodes(2, environment={"PYTHONPATH": ""}) as cluster:
        for title in ("through submit, the first time", "the second time"):
            asked = [sys.executable, "jobs/submit.py", "train", *options(folder, f"job-{time.time():.0f}")]
            command = [*asked, "--tracking.uri", store, "--train.cpus-per-worker", "1"]
            begin, moments = time.time(), {}
            job = subprocess.Popen(
                command, env=cluster.environment, stdout=subprocess.PIPE, text=True, cwd=two_nodes.ROOT
            )
            for name in parts(job):
                moments[name] = time.time() - begin
                if name == "first step":
                    break
            job.communicate()
            print(f"\n{title} (load {os.getloadavg()[0]:.0f})")
            last = 0.0
            for name, moment in moments.items():
                print(f"{moment - last:6.1f} s  {name}")
                last = moment
            print(f"{last:6.1f} s  in all", flush=True)


PARTS = (
    (" submitted; ", "client: Python, imports, code packed and sent"),
    ("Running entrypoint", "job server: the code unpacked on the head"),
    ("(TrainController", "driver: imports, model and store checked, Ray joined, MLflow run, controller"),
    ("(RayTrainWorker", "two workers: code unpacked, imports, process group, model"),
    ("step 1/", "first step"),
)
"""What a line of a job's log holds when a part of the start is over, and the part. All but the third are always there:
Ray prints a warning as the controller starts."""


def parts(job: subprocess.Popen[str]) -> Iterator[str]:
    """The parts that are over, as the lines of a job tell."""
    assert job.stdout is not None
    left = list(PARTS)
    for line in job.stdout:
        over = [number for number, (text, _) in enumerate(left) if text in line]
        if over:
            yield left[over[-1]][1]
            del left[: over[-1] + 1]


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
