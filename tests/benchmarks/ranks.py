"""Many ranks on one machine: the waiting for the feed and the CPU of Ray's own processes, by the number of ranks.

`python -m tests.benchmarks.ranks [--decode map] 2 8 32`: each rank is a process with a feed of its own over the same
shards; its step sleeps. So the cores are free for what is measured: the feeds, and Ray's processes, which on a cluster
sit on the head node. By default no Ray is started, since the feed does not call it: the ranks are forked from one
process, with which they share what it has imported. With `--decode map` they are Ray's actors. The table is printed as
Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from panoptic.metrics.text import markdown_table
from panoptic.transforms import Augment
from pipelines.cluster import session
from pipelines.data.loader import Feed, FeedConfig
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import Stream
from tests.benchmarks.inputs import categories
from tests.benchmarks.timing import hardware
from tests.support.processes import Usage, usage
from tests.support.stored import write_shards

STEP = 0.05
"""Seconds of a step."""
IMAGES = 256
"""Of 48 x 64 pixels: small, as 32 ranks share the cores."""
BATCH = 2
"""Images of a rank and step."""
SKIPPED = 20
"""Steps before the clock starts."""
AT_ONCE = 4
"""Processes that start together: Ray gives up those that a busy machine starts too slowly."""


def rank(manifest: Manifest, stream: Stream, config: FeedConfig) -> tuple[float, float, float]:
    """Seconds of waiting, seconds in all and CPU seconds of this process, after the first steps."""
    with Feed(manifest, stream, Augment(), config) as feed:
        waited = begin = cpu = 0.0
        for k, _ in enumerate(feed):
            time.sleep(STEP)
            if k == SKIPPED:
                waited, begin, cpu = feed.waited, time.perf_counter(), time.process_time()
        return feed.waited - waited, time.perf_counter() - begin, time.process_time() - cpu


def measure_forked(manifest: Manifest, world: int, steps: int, config: FeedConfig) -> list[str]:
    """One line of the table: all ranks at once, without Ray."""
    context = multiprocessing.get_context("fork")
    given: Any = context.SimpleQueue()
    begin = context.Barrier(world)

    def run(number: int) -> None:
        stream = Stream(0, manifest.rows, BATCH * world, steps, world=world, rank=number)
        begin.wait()
        given.put(rank(manifest, stream, config))

    ranks = [context.Process(target=run, args=(number,)) for number in range(world)]
    for process in ranks:
        process.start()
    found = [given.get() for _ in ranks]
    for process in ranks:
        process.join()
    return [*_of_ranks(world, found), *["no call"] * 3, "-"]


def _of_ranks(world: int, found: Sequence[tuple[float, float, float]]) -> list[str]:
    """The cells of the ranks themselves."""
    waiting = 100 * sum(line[0] for line in found) / sum(line[1] for line in found)
    longest = max(100 * line[0] / line[1] for line in found)
    own = 100 * sum(line[2] for line in found) / sum(line[1] for line in found)
    return [str(world), f"{waiting:.2f} %", f"{longest:.2f} %", f"{own:.1f} %"]


def measure(manifest: Manifest, world: int, steps: int, config: FeedConfig) -> list[str]:
    """One line of the table: all ranks at once, as Ray's actors."""
    import ray

    @ray.remote(num_cpus=1)
    class Rank:
        def ready(self) -> None:
            """Its process has started and imported what it needs."""

        def run(self, number: int) -> tuple[float, float, float]:
            stream = Stream(0, manifest.rows, BATCH * world, steps, world=world, rank=number)
            return rank(manifest, stream, config)

    ranks: list[Any] = []
    for first in range(0, world, AT_ONCE):
        ranks += [Rank.remote() for _ in range(first, min(first + AT_ONCE, world))]
        ray.get([worker.ready.remote() for worker in ranks])
    time.sleep(5)  # what starting processes has left to do
    before, begin = usage(), time.perf_counter()
    found = ray.get([worker.run.remote(number) for number, worker in enumerate(ranks)])
    seconds, after = time.perf_counter() - begin, usage()
    for worker in ranks:
        ray.kill(worker)

    def grown(figure: str, choose: Any) -> float:
        nothing = Usage("", 0, 0.0, 0)
        return sum(
            getattr(now, figure) - getattr(before.get(pid, nothing), figure)
            for pid, now in after.items()
            if choose(now.name)
        )

    def head(name: str) -> bool:
        return not name.startswith(("ray::Rank", "ray::ReadStreamSource", "ray::IDLE"))

    return [
        *_of_ranks(world, found),
        f"{100 * grown('cpu', lambda name: name == 'gcs_server') / seconds:.1f} %",
        f"{100 * grown('cpu', lambda name: name == 'raylet') / seconds:.1f} %",
        f"{100 * grown('cpu', head) / seconds:.1f} %",
        f"{grown('memory', head) / 2**20:+.0f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", type=int, default=[2, 8, 32], help="numbers of ranks")
    parser.add_argument("--decode", choices=("collate", "map"), default="collate")
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    print(hardware())
    torch.set_num_threads(1)
    config = FeedConfig(decode=given.decode, threads=1)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        manifest = write_shards(Path(folder), categories(8, 11), IMAGES)
        if given.decode == "map":
            session.connect(cpus=max(given.worlds) + 8)
        way = measure if given.decode == "map" else measure_forked
        lines = [way(manifest, world, given.steps, config) for world in given.worlds]
    titles = ["ranks", "waiting", "worst rank", "CPU of a rank", "GCS", "raylet", "all of Ray's own", "MiB grown"]
    print(markdown_table([titles, *lines]))


if __name__ == "__main__":
    sys.exit(main())
