"""The reason why a training ended, in one line, and the kinds of failures: memory, killed processes, taken machines.

Errors are told apart by their types. Three kinds have none and are known by their messages, each in one place: the
bare RuntimeErrors about memory (`allocation_failed`) and of Gloo (`CONSEQUENCE`), and Ray's one type for a process that
was killed, for a lost machine and for an actor that was ended on purpose (`PROCESS_DIED`).
"""

from __future__ import annotations

import re

from ray import exceptions as ray_exceptions
from torch.distributed import DistError

from panoptic.training.memory import allocation_failed
from pipelines.cluster.causes import causes
from pipelines.training.early_end import EndsRun


class OutOfMemory(RuntimeError, EndsRun):
    """Raised to end a run at once that would run out of memory again if it were started as it was."""


OUT_OF_MEMORY = (ray_exceptions.OutOfMemoryError, OutOfMemory)
"""Errors of Ray's memory monitor, and our own, where memory runs out."""


def out_of_memory(error: BaseException) -> bool:
    """True if an error, or what caused it on a worker, is that memory ran out."""
    return any(isinstance(part, OUT_OF_MEMORY) or allocation_failed(part) for part in _chain(error))


def machine_out_of_memory(error: BaseException) -> bool:
    """True if Ray's memory monitor killed something: a machine has too little, whatever of it the training took."""
    return any(isinstance(part, ray_exceptions.OutOfMemoryError) for part in _chain(error))


def perhaps_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out, or a worker was killed, which the kernel does without saying why."""
    return out_of_memory(error) or any(map(killed, _chain(error)))


PROCESS_DIED = "worker process has died"
"""Ray's words, within an `ActorDiedError`, for an actor whose process ended by itself.

Only they tell it from one whose machine is gone and from one that was ended on purpose: the error is made of an
`ActorDiedErrorContext`, of which it keeps the actor's id, whether its machine was taken back, and this text.
"""


def killed(error: BaseException) -> bool:
    """True if a worker's process ended without a word: the kernel killed it for lack of memory, or it crashed."""
    if isinstance(error, ray_exceptions.WorkerCrashedError):
        return True
    return isinstance(error, ray_exceptions.ActorDiedError) and PROCESS_DIED in str(error)


CONSEQUENCES = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, DistError)
"""Types of what the other workers raise when one is gone; DistError: NCCL and PyTorch's own connections."""

CONSEQUENCE = re.compile(r"gloo|connection (was )?(reset|closed)|broken pipe|process ?group", re.IGNORECASE)
"""Words of those that Gloo raises, or DDP over it, which are bare RuntimeErrors."""


def consequence(error: BaseException) -> bool:
    """True for what a worker raises because it lost another one, which has the reason."""
    return isinstance(error, CONSEQUENCES) or (type(error) is RuntimeError and bool(CONSEQUENCE.search(str(error))))


NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
"""Beginning of a traceback's line that names an error."""


def describe(error: BaseException) -> str:
    """The innermost reason in one line: what a worker raised, not that a worker failed, nor that others missed it."""
    leaves = _leaves(error)
    innermost = next((leaf for leaf in leaves if not consequence(leaf)), leaves[0])
    if killed(innermost):
        return "a worker's process died: killed, perhaps by the kernel for lack of memory, or crashed; see Ray's logs"
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    if type(innermost).__module__.startswith("ray."):  # its first line says it, the others advise
        return f"{type(innermost).__name__}: {' '.join(lines[:1])}"
    named = [line for line in lines if NAMED.match(line)]  # the last lines of tracebacks that came as text
    text = (named or lines or [""])[-1]
    return text if NAMED.match(text) else f"{type(innermost).__name__}: {text}"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and the ones that it began with."""
    return [error, *_leaves(error)]


def _leaves(error: BaseException, seen: frozenset[int] = frozenset()) -> list[BaseException]:
    """The errors that an error began with: on each worker that failed, else its own cause, else itself."""
    seen |= {id(error)}
    began = [cause for cause in causes(error) if isinstance(cause, Exception)]  # no SystemExit
    inner = [cause for cause in began if id(cause) not in seen]
    return [leaf for cause in inner for leaf in _leaves(cause, seen)] or [error]
