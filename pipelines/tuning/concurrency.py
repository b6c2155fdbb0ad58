"""Room for trials: how many a cluster holds at once, and what each may use of a machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cluster import session
from pipelines.config import Experiment
from pipelines.training.driver import worker_cpus


def join_cluster(wanted: int, experiments: Sequence[Experiment]) -> int:
    """Join or start Ray, and say how many trials may run at once.

    Args:
        wanted: at most so many; 0 = no such limit.
        experiments: every trial that may be drawn; the largest one counts.
    """
    import ray

    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        cores = os.cpu_count() or 1
        workers = max(one.train.workers for one in experiments)
        at_once = wanted or max(1, cores // workers)
        each = max(one.train.workers * ((one.train.cpus_per_worker or 1.0) + _data(one)) for one in experiments)
        session.connect(max(cores, 2 * workers, math.ceil(at_once * (each + DRIVER_CPUS))))
        gpus = ray.cluster_resources().get("GPU", 0)
        wanted = at_once if not gpus else wanted
    session.connect()
    there = ray.cluster_resources()
    kinds = {(one.train.workers, worker_cpus(one) + _data(one), one.train.gpu) for one in experiments}
    return min(
        concurrency(there, workers, cpus, gpu == "yes" or (gpu == "auto" and there.get("GPU", 0) >= workers), wanted)
        for workers, cpus, gpu in kinds
    )


def _data(experiment: Experiment) -> float:
    """CPUs of a worker's data."""
    return experiment.feed.tasks * experiment.feed.cpus


def concurrency(there: Mapping[str, float], workers: int, cpus: float, gpu: bool, wanted: int = 0) -> int:
    """Trials that a cluster holds at once without any waiting for CPUs or GPUs that another has.

    Args:
        there: the cluster's resources.
        workers: of a trial.
        cpus: of a worker and its data.
        gpu: whether each worker takes one.
        wanted: at most so many; 0 = no such limit.

    Raises:
        ValueError: it does not hold one; names what is missing.
    """
    each = workers * cpus + DRIVER_CPUS
    most = math.floor(there.get("CPU", 0) / each + 1e-9)
    if gpu:
        most = min(most, math.floor(there.get("GPU", 0) / workers))
    memory = there.get("memory", math.inf)
    if memory < DRIVER_MEMORY:
        raise ValueError(
            f"a trial's own process takes {DRIVER_MEMORY >> 20} MiB, and Ray counts {memory / 2**20:.0f} MiB of free "
            "memory; end what else runs there"
        )
    most = min(most, math.floor(min(memory / DRIVER_MEMORY, 1e9)))
    if most < 1:
        asked = f"{each:g} CPUs" + (f" and {workers} GPUs" if gpu else "")
        raise ValueError(
            f"one trial needs {asked} ({workers} workers, their data and the trial itself), the cluster has "
            f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; lower --train.workers or "
            "--train.cpus-per-worker"
        )
    return min(most, wanted) if wanted else most


DRIVER_CPUS = 0.01
"""Of a trial's function; 0 is refused by Ray."""


DRIVER_MEMORY = 768 << 20
"""Bytes that it reserves. Its process takes 0.7 GiB (measured), and --resume asks for all unfinished trials at once:
those that no machine has memory for are started when others end."""


POLL_SECONDS = 1.0


class TrialLimit:
    """Which of the trials that Tune has started may train."""

    def __init__(self, most: int) -> None:
        """Args:
        most: at once.
        """
        self._most = most
        self._allowed: list[str] = []

    def update(self, running: Sequence[str]) -> list[str]:
        """Those that went through and still run keep their place; the first of the others take what is free."""
        kept = [identity for identity in self._allowed if identity in running]
        waiting = [identity for identity in running if identity not in kept]
        self._allowed = kept + waiting[: max(0, self._most - len(kept))]
        return self._allowed

    def allowed(self, identity: str) -> bool:
        """Whether a trial may train."""
        return identity in self._allowed


def create_trial_limit(parent: str, most: int) -> Any:
    """The trial_limit of the sweep whose MLflow run is `parent`; it stands as long as its handle."""
    import ray

    return ray.remote(num_cpus=0)(TrialLimit).options(name=name_of(parent)).remote(most)


def find_trial_limit(parent: str) -> Any:
    """The trial_limit of a sweep, None where there is none."""
    import ray

    try:
        return ray.get_actor(name_of(parent))
    except ValueError:
        return None


def wait(parent: str, identity: str) -> None:
    """Until a trial may train."""
    import ray

    trial_limit = find_trial_limit(parent)
    while trial_limit is not None and not ray.get(trial_limit.allowed.remote(identity)):
        time.sleep(POLL_SECONDS)


def name_of(parent: str) -> str:
    """Of the actor."""
    return f"trial_limit-{parent}"
