"""Work on many items by Ray Data actors that set up once: load a model, then serve item after item.

An actor that dies is started again and its item with it, so a failure costs time only. What comes back is
small (counts, lists of segments), and images never cross the object store: actors read and write them.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines import runtime

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_CPU_ACTORS = 8
"""Started by default where there is no GPU: each holds a model of its own, and threads use the other cores."""


@dataclass(frozen=True)
class Pool:
    """How many actors work, and with what."""

    actors: int = -1
    """Processes that each load the model; -1 = one a GPU, or one a core up to 8; 0 = this process, without Ray."""
    threads: int = 0
    """Torch threads of each; 0 = the machine's cores shared out."""
    gpu: bool | None = None
    """One GPU each; None = where the cluster has as many."""


def each(
    build: Callable[..., Callable[[Item], Result]], arguments: tuple, items: Sequence[Item], pool: Pool
) -> Iterator[Result]:
    """`build(*arguments)(item)` of every item, each exactly once, in any order.

    Args:
        build: called once in each actor; a function of a module, as are the arguments' types.
        items: of some seconds of work each.

    Raises:
        ValueError: as the function raises it.
    """
    if not items:
        return
    if pool.actors == 0:
        work = build(*arguments)
        yield from (work(item) for item in items)
        return
    import ray.data

    runtime.connect()
    actors, cpus, gpus, threads = _shares(pool, len(items))
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(build, arguments, threads, bool(gpus)),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in dataset.iter_rows():
        done, value = pickle.loads(row["result"])
        if not done:
            raise ValueError(value)
        yield value


class _Actor:
    """What Ray Data keeps alive: the built function."""

    def __init__(self, build: Callable, arguments: tuple, threads: int, gpu: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._error = ""
        try:
            self._work = build(*arguments)
        except ValueError as error:  # raised here it would only start the actor again
            self._error = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [self._one(item) for item in batch["item"]]}

    def _one(self, item: bytes) -> bytes:
        if self._error:
            return pickle.dumps((False, self._error))
        try:
            return pickle.dumps((True, self._work(pickle.loads(item))))
        except ValueError as error:
            return pickle.dumps((False, str(error)))


def _shares(pool: Pool, items: int) -> tuple[int, float, float, int]:
    """Actors, CPUs and GPUs that each reserves, torch threads of each."""
    import ray

    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    nodes = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    wanted = pool.actors if pool.actors > 0 else (gpus if gpus and pool.gpu is not False else min(cores, _most(nodes)))
    actors = max(1, min(wanted, items))
    with_gpu = (gpus >= actors) if pool.gpu is None else pool.gpu
    if with_gpu and gpus < actors:
        raise ValueError(f"{actors} actors with a GPU each need {actors} GPUs, the cluster has {gpus}; lower --actors")
    threads = pool.threads or max(1, (os.cpu_count() or 1) // -(-actors // nodes))
    # half of the CPUs at most, so that Ray Data and whoever else works there keep some
    return actors, min(1.0, cores / (2 * actors)), float(with_gpu), threads


def _most(nodes: int) -> int:
    return nodes * min(MOST_CPU_ACTORS, os.cpu_count() or 1)
