"""Work on many items by Ray Data actors that set up once: load a model, then serve item after item.

An actor that dies is started again and its item with it, so a failure costs time only; an item that kills every
actor ends the work with an error that names it. What comes back is small (counts, lists of segments), and images
never cross the object store: actors read and write them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pipelines.cluster import session, storage

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_CPU_ACTORS = 16
"""The most actors that a machine without GPU starts by default: each holds a model of its own."""

RETRIES = 3
"""Attempts to repeat an item after its actor died over it, and to set up an actor that dies. Ray would go
on for ever, and its own bounds are on their way out of `map_batches`."""


class Killed(ValueError):
    """An item whose actor died each time, or actors that all die while they set up."""

    def __init__(self, item: Any, tries: int) -> None:
        """Args: the item, None for setting up, and how often it was begun."""
        super().__init__(
            f"{'setting up' if item is None else _named(item)}: the actor died {tries} times (out of memory, killed, "
            "or crashed). Fewer --actors need less memory; with --actors 0 this process does the work and shows more"
        )
        self.item = item


@dataclass(frozen=True)
class Pool:
    """The number of actors, and the resources of each."""

    actors: int = -1
    """Processes that each load the model; -1 = one a GPU, or one a core up to 16; 0 = this process, without Ray."""
    threads: int = 0
    """Torch threads of each actor. 0 = one, however many actors there are: sums over two threads differ in their last
    bits from sums over one. Without actors 0 leaves this process as many as torch takes."""
    gpu: bool | None = None
    """Each actor has a GPU; None = if the cluster has any."""
    retries: int = RETRIES


def each(
    build: Callable[..., Callable[[Item], Result]], arguments: tuple, items: Sequence[Item], pool: Pool
) -> Iterator[Result]:
    """`build(*arguments)(item)` of every item, each exactly once, in any order.

    Args:
        build: called once in each actor; a function of a module, as are the arguments' types.
        items: of some seconds of work each.

    Raises:
        ValueError: as the function raises it, or there are fewer GPUs than actors.
        storage.Unavailable: a store was away for longer than it is waited for.
        Killed: an item's actor died over it again and again.
    """
    if not items:
        return
    if pool.actors == 0:
        with _threads(pool.threads):
            work = build(*arguments)
            yield from (work(item) for item in items)
        return
    session.connect()
    shares = _shares_here(pool, len(items))
    for row in _dataset(build, arguments, items, shares).iter_rows():
        kind, value = pickle.loads(row["result"])
        if kind == _KILLED:
            raise Killed(None if row["number"] < 0 else items[row["number"]], value)
        if kind == _REFUSED:
            raise ValueError(value)
        if kind == _AWAY:
            raise storage.Unavailable(value)
        yield value


_DONE, _REFUSED, _KILLED, _AWAY = range(4)


def _dataset(build: Callable, arguments: tuple, items: Sequence[Any], shares: Shares) -> Any:
    import ray.data

    shared = ray.put(arguments)  # once, not in every actor's constructor: a model may be among them
    journal = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Journal).remote()
    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(build, shared, shares, journal),
        batch_size=1,  # Ray Data takes no whole blocks where GPUs are asked for
        compute=ray.data.ActorPoolStrategy(size=shares.actors),
        num_cpus=shares.cpus,
        num_gpus=shares.gpus,
    )


class _Journal:
    """A process that outlives the actors and counts how often each item was begun."""

    def __init__(self) -> None:
        self._items: Counter[int] = Counter()
        self._starts = 0

    def begin(self, number: int) -> int:
        """The number of times that this item was begun before."""
        self._items[number] += 1
        return self._items[number] - 1

    def start(self) -> int:
        """The number of actors that began to set up since one was ready."""
        self._starts += 1
        return self._starts - 1

    def ready(self) -> None:
        self._starts = 0


class _Actor:
    """The function as an actor of Ray Data keeps it: built once, called for every item."""

    def __init__(self, build: Callable, arguments: Any, shares: Shares, journal: Any) -> None:
        import ray
        import torch

        torch.set_num_threads(shares.threads)
        if not shares.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._journal, self._retries, self._error = journal, shares.retries, None
        before: Any = ray.get(journal.start.remote())
        if before >= shares.actors * (1 + shares.retries):
            self._error = -1, (_KILLED, before)
            return
        try:
            self._work = build(*ray.get(arguments))
        except ValueError as error:  # raised here it would only start the actor again
            self._error = 0, (_REFUSED, str(error))
        except storage.Unavailable as error:
            self._error = 0, (_AWAY, str(error))
        ray.get(journal.ready.remote())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number, result = self._error or self._one(int(batch["number"][0]), batch["item"][0])
        return {"number": [number], "result": [pickle.dumps(result)]}

    def _one(self, number: int, item: bytes) -> tuple[int, tuple[int, Any]]:
        import ray

        before: Any = ray.get(self._journal.begin.remote(number))
        if before > self._retries:
            return number, (_KILLED, before)
        try:
            return number, (_DONE, self._work(pickle.loads(item)))
        except ValueError as error:
            return number, (_REFUSED, str(error))
        except storage.Unavailable as error:
            return number, (_AWAY, str(error))


class Shares(NamedTuple):
    """The actors that a pool comes to on a cluster."""

    actors: int
    cpus: float
    """CPUs that each actor reserves."""
    gpus: float
    """GPUs that each actor reserves."""
    threads: int
    """Torch threads of each actor."""
    retries: int


def shares_of(pool: Pool, items: int, cores: int, gpus: int, nodes: int = 1) -> Shares:
    """The actors that `items` items of work get on a cluster.

    Raises:
        ValueError: there are fewer GPUs than actors.
    """
    with_gpu = gpus > 0 if pool.gpu is None else pool.gpu
    most = nodes * min(MOST_CPU_ACTORS, os.cpu_count() or 1)
    wanted = pool.actors if pool.actors > 0 else gpus if with_gpu else min(cores, most)
    actors = max(1, min(wanted, items))
    if with_gpu and gpus < actors:
        raise ValueError(
            f"{actors} actors need {actors} GPUs and the cluster has {gpus}; give --actors {max(gpus, 1)}, or hide the "
            'GPUs (CUDA_VISIBLE_DEVICES="" before Ray starts) to work on CPUs'
        )
    # half of the CPUs at most, so that Ray Data and whoever else works there keep some
    return Shares(actors, min(1.0, cores / (2 * actors)), float(with_gpu), pool.threads or 1, pool.retries)


def _shares_here(pool: Pool, items: int) -> Shares:
    import ray

    there = ray.cluster_resources()
    nodes = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    return shares_of(pool, items, int(there.get("CPU", 1)), int(there.get("GPU", 0)), nodes)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """A context with `number` torch threads in this process; 0 = as many as before."""
    if not number:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(item: Any) -> str:
    """An item, for people."""
    if isinstance(item, range):
        return f"row {item[0]}" if len(item) == 1 else f"rows {item[0]} to {item[-1]}"
    text = str(item)
    return text if len(text) <= 200 else f"{text[:200]} …"
