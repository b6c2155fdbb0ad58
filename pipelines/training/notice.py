"""The notice that a training is to stop soon, of three kinds, and how the workers hear of it.

- A worker got SIGTERM: a machine that is taken back ends its processes so.
- The node of a worker is drained: Ray Train's watcher tells every worker (`RAY_TRAIN_ENABLE_PREEMPTION_WATCHER`).
- The driver asks: it got SIGTERM or Ctrl-C, or there is room for more workers. It writes a key into the store of the
  cluster's head, which rank 0 reads.

The workers then save a checkpoint at their next common step and return; the driver goes on, or ends.

Workers and Ray Train's controller import this module before a training begins, so it imports little.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

NAMESPACE = b"panoptic-ray"
"""The namespace of our keys in Ray's internal key-value store."""

TIMES = 2
"""SIGTERMs with which a worker ends at once."""

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
    """The reason why this worker, or one of its group, is to stop soon; "" where it knows none."""
    if _came:
        return "SIGTERM"
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return "" if info is None else "a node is taken back"


def ask(key: str, reason: str) -> None:
    """The driver asks the workers of the training `key` to stop at their next look."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key.encode(), reason.encode(), namespace=NAMESPACE)


def withdraw(key: str) -> None:
    """Take back what was asked for."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key.encode(), namespace=NAMESPACE)


def asked(key: str) -> str:
    """The reason for which the driver asked the workers to stop; "" where it has not."""
    from ray.experimental import internal_kv

    return (internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE) or b"").decode()


class Listener:
    """A thread that asks for the driver's notice, so that a head that does not answer keeps no step waiting."""

    SECONDS = 0.5

    def __init__(self, key: str) -> None:
        self.reason = ""
        """As `asked`."""
        self._key = key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="notice", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a request that is on its way ends by itself."""
        self._stop.set()

    def _listen(self) -> None:
        while not self._stop.wait(self.SECONDS):
            try:
                self.reason = asked(self._key)
            except Exception:  # of Ray, where the head is away: the cluster ends the training then, not this thread
                continue
