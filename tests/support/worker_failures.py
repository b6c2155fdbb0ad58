"""Failures of workers in the types and with the messages of Ray 2.60."""

from __future__ import annotations

from collections.abc import Mapping

from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:54996: Connection reset by peer")
"""Error of a worker that lost another one."""


def group_error(failures: Mapping[int, Exception]) -> WorkerGroupError:
    """The error of a training whose workers failed, by rank."""
    return WorkerGroupError("[Rank 0]", dict(failures))


def unhealthy(failure: Exception) -> WorkerHealthCheckFailedError:
    """The error of a worker that does not answer."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(\n)", failure)


def actor_died(cause: str) -> ActorDiedError:
    """The error of a call to a worker that is gone."""
    return ActorDiedError(ActorDiedErrorContext(error_message=cause, class_name="RayTrainWorker", actor_id=b"1" * 16))


KILLED = unhealthy(
    actor_died(
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the "
        "worker crashed unexpectedly due to SIGSEGV"
    )
)
"""Error of a worker that SIGKILL ended."""

NODE_LOST = unhealthy(
    actor_died("The actor died because its node has died. Node Id: 1a. the actor's node was terminated")
)
"""Error of a worker whose machine is gone."""

MONITORED = unhealthy(
    OutOfMemoryError(
        "4 worker(s) were killed due to the node running low on memory. Memory on the node was 10.72GB used / 23.54GB\n"
        "OOM kill reason: Memory usage 11454595072B exceeded threshold\nTo disable worker killing, set RAY_memory"
    )
)
"""Error of a worker that Ray's memory monitor ended."""

MONITORED_CONTROLLER = ControllerError(
    OutOfMemoryError(
        "5 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 335d7) "
        "was 11.11GB used / 23.54GB limit (0.471802)\n"
        "OOM kill reason: Memory usage 11811667968B exceeded threshold of 11728300032B (46.4% of 25276510208B limit)\n"
        "Object store memory usage: [- objects spillable: 1\n- bytes spillable: 10370\n]\n"
        "Ray killed 5 worker(s) based on the killing policy\nConsidered workers: [\n"
        "Selected to kill: (Worker with no lease granted: pid=6816, actual memory used=0.40GB)\n"
        "Selected to kill: (Actor(1bcd7): task name=AutoscalingCoordinator:_AutoscalingCoordinatorActor.__init__)\n"
        "Selected to kill: (Actor(b4407): task name=DatasetManager.__init__)\n"
        "Selected to kill: (Actor(c4637): task name=RayTrainWorker.__init__)\n"
        "Selected to kill: (Actor(a37f9): task name=RayTrainWorker.__init__)\n]\n"
        "Total non-selected idle workers: 0\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n8224\t0.97\tray::Worker"
    )
)
"""Error of a real training of two workers whose memory monitor ended both, their data's manager and an idle process.

Seen with RAY_memory_usage_threshold=0.464 and another process that took the rest; ids are shortened. The controller
met the workers' end while it ended them itself. The training went on and had every metric of its 24 steps once.
"""
