"""The reason why a training ended, in one line, and the kinds of failures: memory, killed processes, taken machines.

Errors are told apart by their types. Two kinds have none and are known by their messages, each in one function: the
bare RuntimeError of PyTorch's CPU allocator (`allocation_failed`), and Ray's one type for a process that was killed,
for a lost machine and for an actor that was ended on purpose (`killed`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray import exceptions as ray_exceptions

from panoptic.training.memory import allocation_failed
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


def killed(error: BaseException) -> bool:
    """True if a worker's process ended without a word: the kernel killed it for lack of memory, or it crashed.

    Of an actor that died only Ray's message tells that its process did, not its machine, nor that it was ended on
    purpose: what Ray knew of the cause does not outlive the construction of the error.
    """
    if isinstance(error, ray_exceptions.WorkerCrashedError):
        return True
    return isinstance(error, ray_exceptions.ActorDiedError) and "worker process has died" in str(error)


CONSEQUENCE = re.compile(r"gloo|nccl|connection (was )?(reset|closed)|broken pipe|process ?group", re.IGNORECASE)
"""Messages of what the other workers raise when one is gone; Gloo's are bare RuntimeErrors."""

NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
"""Beginning of a traceback's line that names an error."""


def describe(error: BaseException) -> str:
    """The innermost reason in one line: what a worker raised, not that a worker failed, nor that others missed it."""
    leaves = _leaves(error)
    innermost = next((leaf for leaf in leaves if not CONSEQUENCE.search(str(leaf))), leaves[0])
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
    failures = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    causes = [
        *(failures.values() if isinstance(failures, Mapping) else ()),
        getattr(error, "health_check_failure", None),  # Ray Train's, of a worker that does not answer
        getattr(error, "controller_failure", None),  # ray.train.ControllerError
        getattr(error, "cause", None),  # ray.exceptions.RayTaskError: raised in another process
        error.__cause__,
    ]
    seen |= {id(error)}
    inner = [cause for cause in causes if isinstance(cause, Exception) and id(cause) not in seen]  # no SystemExit
    return [leaf for cause in inner for leaf in _leaves(cause, seen)] or [error]
