"""The number of trials at once: what the cluster holds, and an actor at which trials wait for their turn.

Ray Tune limits the trials that a searcher draws. On `--resume` it starts every unfinished and every failed one at once,
and their workers would wait for each other's CPUs; at the `ConcurrencyLimiter` trials wait before they ask for any.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cluster import session
from pipelines.config import Experiment
from pipelines.training.driver import worker_cpus
from pipelines.training.preflight import check_machine

TRIAL_CPUS = 0.01
"""CPUs that Ray reserves for a trial's own function, beside those of its workers; Ray refuses 0."""

TRIAL_MEMORY = 768 << 20
"""Bytes that Ray reserves for a trial's own function. Its process takes 0.7 GiB (measured), and --resume asks for all
unfinished trials at once: those that no machine has memory for are started when others end."""

POLL_SECONDS = 1.0


def join_cluster(limit: int, experiments: Sequence[Experiment]) -> int:
    """Join or start Ray, and return how many trials may run at once.

    Args:
        limit: at most so many; 0 = no such limit.
        experiments: every trial that may be drawn; the largest one counts.

    Raises:
        ValueError: the cluster or this machine does not hold one trial; names what is missing.
    """
    import ray

    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        for experiment in experiments:
            check_machine(experiment)
        cores = os.cpu_count() or 1
        workers = max(experiment.train.workers for experiment in experiments)
        concurrent = limit or max(1, cores // workers)
        largest = max(
            experiment.train.workers * ((experiment.train.cpus_per_worker or 1.0) + _data_cpus(experiment))
            for experiment in experiments
        )
        session.connect(max(cores, 2 * workers, math.ceil(concurrent * (largest + TRIAL_CPUS))))
        gpus = ray.cluster_resources().get("GPU", 0)
        limit = concurrent if not gpus else limit
    session.connect()
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0)
    needs = {
        (experiment.train.workers, worker_cpus(experiment) + _data_cpus(experiment), experiment.train.gpu)
        for experiment in experiments
    }
    return min(
        max_concurrent_trials(resources, workers, cpus, gpu == "yes" or (gpu == "auto" and gpus >= workers), limit)
        for workers, cpus, gpu in needs
    )


def cores() -> int:
    """The cores that all trials share: those of this machine in a session of our own, else the cluster's CPUs."""
    import ray

    if session.own_folder() or not ray.is_initialized():
        return os.cpu_count() or 1
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _data_cpus(experiment: Experiment) -> float:
    """The CPUs that Ray Data takes for one worker."""
    return experiment.feed.reserved_cpus


def max_concurrent_trials(resources: Mapping[str, float], workers: int, cpus: float, gpu: bool, limit: int = 0) -> int:
    """The number of trials that a cluster holds at once without any waiting for CPUs or GPUs that another has.

    Args:
        resources: of the cluster, as `ray.cluster_resources` gives them.
        workers: of a trial.
        cpus: of a worker and its data.
        gpu: each worker takes one.
        limit: at most so many; 0 = no such limit.

    Raises:
        ValueError: the cluster does not hold one trial; names what is missing.
    """
    trial_cpus = workers * cpus + TRIAL_CPUS
    concurrent = math.floor(resources.get("CPU", 0) / trial_cpus + 1e-9)
    if gpu:
        concurrent = min(concurrent, math.floor(resources.get("GPU", 0) / workers))
    memory = resources.get("memory", math.inf)
    if memory < TRIAL_MEMORY:
        raise ValueError(
            f"a trial's own process takes {TRIAL_MEMORY >> 20} MiB, and Ray counts {memory / 2**20:.0f} MiB of free "
            "memory; end what else runs there"
        )
    concurrent = min(concurrent, math.floor(min(memory / TRIAL_MEMORY, 1e9)))
    if concurrent < 1:
        needed = f"{trial_cpus:g} CPUs" + (f" and {workers} GPUs" if gpu else "")
        raise ValueError(
            f"one trial needs {needed} ({workers} workers, their data and the trial itself), the cluster has "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; lower --train.workers or "
            "--train.cpus-per-worker"
        )
    return min(concurrent, limit) if limit else concurrent


class ConcurrencyLimiter:
    """Decides which of the trials that Tune has started may train; an actor of the sweep."""

    def __init__(self, max_concurrent: int) -> None:
        """Args:
        max_concurrent: trials that may train at once.
        """
        self._max_concurrent = max_concurrent
        self._admitted: list[str] = []

    def update(self, running: Sequence[str]) -> list[str]:
        """Admit trials, given the ids of all that run now, and return the ids of those admitted.

        Those that were admitted and still run keep their place; the first of the others take what is free.
        """
        kept = [trial_id for trial_id in self._admitted if trial_id in running]
        waiting = [trial_id for trial_id in running if trial_id not in kept]
        self._admitted = kept + waiting[: max(0, self._max_concurrent - len(kept))]
        return self._admitted

    def admitted(self, trial_id: str) -> bool:
        """True if a trial may train."""
        return trial_id in self._admitted


def start_limiter(parent: str, max_concurrent: int) -> Any:
    """Start the limiter of the sweep whose MLflow run is `parent`; the actor lives as long as its handle."""
    import ray

    return ray.remote(num_cpus=0)(ConcurrencyLimiter).options(name=limiter_name(parent)).remote(max_concurrent)


def find_limiter(parent: str) -> Any:
    """The handle of a sweep's limiter, None where there is none."""
    import ray

    try:
        return ray.get_actor(limiter_name(parent))
    except ValueError:
        return None


def wait_for_turn(parent: str, trial_id: str) -> None:
    """Return when the limiter of the sweep admits a trial, at once where there is no limiter."""
    import ray

    limiter = find_limiter(parent)
    while limiter is not None and not ray.get(limiter.admitted.remote(trial_id)):
        time.sleep(POLL_SECONDS)


def limiter_name(parent: str) -> str:
    """The name under which Ray finds a sweep's limiter."""
    return f"concurrency-limiter-{parent}"
