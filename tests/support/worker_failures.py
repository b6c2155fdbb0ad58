"""Failures of workers as Ray 2.60 reports them."""

from __future__ import annotations


class GroupError(RuntimeError):
    """As Ray Train's, which holds the workers' errors."""

    def __init__(self, failures):
        super().__init__("Worker group failed: [Rank 0]")
        self.worker_failures = failures


DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\nThe actor is dead because "
    "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer "
    "due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV"
)


MONITOR = (
    "4 worker(s) were killed due to the node running low on memory. Memory on the node was 10.72GB used / 23.54GB\n"
    "OOM kill reason: Memory usage 11454595072B exceeded threshold\nTo disable worker killing, set RAY_memory_monitor"
)


GLOO = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:54996: Connection reset by peer"


def unhealthy(failure: Exception) -> Exception:
    """As Ray Train's, of a worker that does not answer."""
    error = RuntimeError("A worker health check failed.\nWorker info: Worker(\n)")
    error.health_check_failure = failure  # type: ignore[attr-defined]
    return error
