"""Trainings with as many workers as there is room for: their number, and the notice when there is room for more.

Ray Train's own elastic scaling (`ScalingConfig(num_workers=(1, 4))`, Ray 2.60) may choose a number by which the batch
cannot be shared, and ends workers without notice to take in new ones, which repeats the steps since the last
checkpoint. So each attempt has a fixed number here, and more room is a notice.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pipelines.config import least_workers
from pipelines.training import notice
from pipelines.training.preflight import worker_cpus
from pipelines.training.sharing import workers_for
from pipelines.training.state import Job

logger = logging.getLogger(__name__)

INTERVAL = "PANOPTIC_ELASTIC_INTERVAL"
"""Environment variable: seconds after which more room is looked for, by default 60, as Ray Train does."""

PAUSE = 0.5
"""Seconds between two looks at the cluster while workers are waited for."""

SETTLING = 5.0
"""Seconds that processes of the attempt before may need to give back what they held."""


def is_elastic(job: Job) -> bool:
    """True if the number of workers is a range."""
    return least_workers(job.experiment.train.workers) < job.experiment.train.workers


def sized(job: Job) -> Job:
    """The job with a number of workers for which there is room now; waits for the fewest.

    A job whose number is fixed comes back as it is.
    """
    if not is_elastic(job):
        return job
    options = job.experiment.train
    begin = told = time.monotonic()
    while True:
        room = free_room(job)
        now = time.monotonic()
        if room >= options.workers or (now - begin > SETTLING and room >= _fewest(job)):
            count, cpus = workers_for(options, room), worker_cpus(job.experiment)
            print(f"{job.experiment.name}: training with {count} workers, of {options.workers}", flush=True)
            chosen = replace(options, workers=count, cpus_per_worker=cpus)
            return replace(job, experiment=replace(job.experiment, train=chosen))
        if now - told > 60:
            logger.warning("%s: room for %d workers, waiting for %d", job.experiment.name, room, _fewest(job))
            told = now
        time.sleep(PAUSE)


def _fewest(job: Job) -> int:
    """The fewest workers with which the job can train."""
    options = job.experiment.train
    return next(n for n in range(least_workers(options.workers), options.workers + 1) if options.batch % n == 0)


def free_room(job: Job) -> int:
    """The number of further workers that the machines of the cluster hold, without those that are being drained."""
    import ray

    # Ray's public calls tell what is free in the whole cluster, not whether one machine has it together
    from ray._private.state import available_resources_per_node, state

    needs = {"CPU": worker_cpus(job.experiment) + job.experiment.feed.reserved_cpus} | ({"GPU": 1} if job.gpu else {})
    leaving = state.get_draining_nodes() or {}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
    free = {node: found for node, found in available_resources_per_node().items() if node in alive}
    return sum(
        int(min(found.get(name, 0.0) / need + 1e-6 for name, need in needs.items() if need)) for found in free.values()
    )


@contextmanager
def asking_for_more(whole: Job, attempt: Job) -> Iterator[None]:
    """A context that asks the workers of an attempt to stop as soon as there is room for more of them.

    Args:
        whole: with the range of workers.
        attempt: with the number that trains.
    """
    if not is_elastic(whole) or attempt.experiment.train.workers == whole.experiment.train.workers:
        yield
        return
    over, seconds = threading.Event(), float(os.environ.get(INTERVAL) or 60)

    def look() -> None:
        now = attempt.experiment.train.workers
        while not over.wait(seconds):
            try:
                if not notice.has_begun(attempt.key):
                    continue  # what these workers are about to take is still free
                count = workers_for(whole.experiment.train, now + free_room(attempt))
            except Exception as error:  # of a cluster that is changing; the next look sees it
                logger.debug("no look at the cluster (%s)", error)
                continue
            if count > now:
                notice.ask(attempt.key, f"room for {count} workers")
                return

    thread = threading.Thread(target=look, name="elastic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)
        notice.withdraw(attempt.key)
