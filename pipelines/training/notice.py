"""The notice that a training is to stop soon, of three kinds, and how the workers hear of it.

- A worker got SIGTERM: a machine that is taken back ends its processes so.
- The node of a worker is drained: a worker of each node asks Ray for it.
- The driver asks: it got SIGTERM or Ctrl-C, or there is room for more workers. It writes a key into the store of the
  cluster's head, which rank 0 reads.

The workers then save a checkpoint at their next common step and return; the driver goes on, or ends.

Ray Train has a watcher of drained nodes of its own (`RAY_TRAIN_ENABLE_PREEMPTION_WATCHER`), which is switched off: it
is an actor without resources, which Ray starts on any node. Where that is the one to be drained, and drained before the
watcher's process is up, the raylet keeps the request until it ends, and nobody hears of the notice (Ray 2.60; seen on a
busy machine). A worker needs no process and no message of another to know about its node.

Workers and Ray Train's controller import this module before a training begins, so it imports little.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

NAMESPACE = b"panoptic-ray"
"""The namespace of our keys in Ray's internal key-value store."""

BEGUN = "/begun"
"""Suffix of a training's key; under that name rank 0 notes that all workers have started."""

TIMES = 2
"""SIGTERMs with which a worker ends at once."""

DRAINED = "a node is taken back"
"""The reason of a worker whose node is drained."""

_came = 0


def catch_sigterm() -> Any:
    """A callback of Ray Train with which SIGTERM of a worker is a notice; another SIGTERM ends the process."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class CatchSigterm(WorkerCallback):
        def after_init_train_context(self) -> None:
            install()

    return CatchSigterm()


def install() -> None:
    """Take SIGTERM of this process for a notice. Called in its main thread; a training runs in another one."""
    global _came
    _came = 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note)


def _note(number: int, frame: Any) -> None:
    global _came
    _came += 1
    if _came >= TIMES:
        os._exit(128 + number)


def of_this_worker() -> str:
    """SIGTERM, if that is why this worker is to stop soon, else ""."""
    return "SIGTERM" if _came else ""


def is_drained() -> bool:
    """True if Ray was told that the machine of this process will be taken away."""
    import ray
    from ray._private.state import state  # Ray's public calls do not tell

    return ray.get_runtime_context().get_node_id() in (state.get_draining_nodes() or {})


def ask(key: str, reason: str) -> None:
    """The driver asks the workers of the training `key` to stop at their next look."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key.encode(), reason.encode(), namespace=NAMESPACE)


def withdraw(key: str) -> None:
    """Withdraw a notice of the driver, and the note that the workers have started."""
    from ray.experimental import internal_kv

    for name in (key, key + BEGUN):
        internal_kv._internal_kv_del(name.encode(), namespace=NAMESPACE)


def tell_begun(key: str) -> None:
    """Rank 0 says that the workers of the training `key` are there and hold their machines' resources."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put((key + BEGUN).encode(), b"1", namespace=NAMESPACE)


def has_begun(key: str) -> bool:
    """True if the workers of the training `key` have said that they are there."""
    from ray.experimental import internal_kv

    return internal_kv._internal_kv_exists((key + BEGUN).encode(), namespace=NAMESPACE)


def asked(key: str) -> str:
    """The reason for which the driver asked the workers to stop; "" where it has not."""
    from ray.experimental import internal_kv

    return (internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE) or b"").decode()


def listen(key: str, rank: int) -> Listener | None:
    """The thread of a worker that asks the head for notices, where it needs one.

    Rank 0 looks for a notice of the driver, and one worker of each node asks whether the node is drained.
    """
    first = is_first_of_node()
    return Listener(key if rank == 0 else "", first) if first or rank == 0 else None


def is_first_of_node() -> bool:
    """True for one worker of each node."""
    from ray.train import get_context

    return get_context().get_local_rank() == 0


class Listener:
    """A thread that asks the head for notices, so that one that does not answer keeps no step waiting.

    Args:
        key: of the training whose workers are announced as started and whose notices are read; "" does neither.
        node: ask whether the node of this process is drained.
    """

    SECONDS = 0.5
    """Seconds between two requests for a notice of the driver."""

    NODE_SECONDS = 2.0
    """Seconds between two requests for drained nodes."""

    def __init__(self, key: str, node: bool) -> None:
        self.reason = ""
        """The reason of the driver's notice, as of `asked`, or `DRAINED`; "" where there is no notice."""
        self._key, self._node = key, node
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="notice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a request that is on its way ends by itself."""
        self._stop.set()

    def _listen(self) -> None:
        looked, told = -math.inf, False
        while not self._stop.wait(self.SECONDS):
            try:
                if self._key and not told:
                    tell_begun(self._key)
                    told = True
                if self._node and time.monotonic() - looked >= self.NODE_SECONDS:
                    looked = time.monotonic()
                    if is_drained():
                        self.reason = DRAINED
                        return
                if self._key:
                    self.reason = asked(self._key)
            except Exception:  # of Ray, where the head is away: the cluster ends the training then, not this thread
                continue
