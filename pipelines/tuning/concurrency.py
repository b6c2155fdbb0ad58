"""Room for trials: how many a cluster holds at once, and what each may use of a machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from pipelines.cluster import session, storage
from pipelines.config import Experiment
from pipelines.tracking import runs
from pipelines.training.driver import prepare_data, worker_cpus
from pipelines.tuning.trial import DRIVER_CPUS, DRIVER_MEMORY


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


def ready(
    base: Experiment, concurrent: int, first: Experiment, metric: str = "val/pq", mode: str = "max"
) -> Experiment:
    """An experiment with paths that hold in every process, its data prepared, as many threads as its trials may have,
    and checkpoints kept by what the trials are compared by.

    Raises:
        ValueError: it has no data, or data that cannot be prepared.
    """
    root = storage.absolute(first.storage)
    data = replace(base.data, shards=base.data.shards or storage.join(root, "shards"))
    if data.root != "scenes":
        data = replace(data, root=storage.absolute(data.root)) if data.root else data
    local = first.storage if "://" not in first.storage else "runs"
    uri = runs.resolve_uri(first.tracking, local)
    threads = base.train.threads or max(1, (os.cpu_count() or 1) // (concurrent * base.train.workers))
    named = replace(base, data=data, storage=root, tracking=replace(base.tracking, uri=uri, register=""))
    train_set, _ = prepare_data(named)
    if data.root == "scenes":  # drawn below the storage, which is another folder in a trial
        named = replace(named, data=replace(data, root=str(PurePosixPath(train_set.uri).parent)))
    return replace(named, train=replace(named.train, threads=threads, score=metric, score_mode=mode))
