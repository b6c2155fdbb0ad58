"""The causes of an error, which Ray's errors name in attributes of their own."""

from __future__ import annotations

from collections.abc import Mapping


def causes(error: BaseException) -> list[BaseException]:
    """The errors that an error names as those it began with: one step, in the order in which they are named."""
    failures = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    named = [
        *(failures.values() if isinstance(failures, Mapping) else ()),
        getattr(error, "health_check_failure", None),  # Ray Train's, of a worker that does not answer
        getattr(error, "controller_failure", None),  # ray.train.ControllerError
        getattr(error, "cause", None),  # ray.exceptions.RayTaskError: raised in another process
        error.__cause__,
    ]
    return [cause for cause in named if isinstance(cause, BaseException)]
