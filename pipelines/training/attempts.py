"""A training that goes on: Ray Train is started again after a failure, and after a notice that stopped the workers.

Ray Train itself would restart workers, but ends with an error where its own controller meets one or is killed. So it
makes one attempt each time, and all kinds of failures count together, here.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from panoptic.training.step import BrokenSteps
from pipelines.cluster import disk, session, storage
from pipelines.cluster.exits import FailedRun
from pipelines.cluster.masking import masked
from pipelines.training import elastic, notice
from pipelines.training.checkpoints import mend_snapshot, newest_step
from pipelines.training.early_end import EndsRun, told_in_a_line
from pipelines.training.failures import describe, machine_out_of_memory, out_of_memory
from pipelines.training.state import Job, last_step, more_accumulation

logger = logging.getLogger(__name__)

GRACE = 25.0
"""Seconds that workers have for a checkpoint after SIGTERM or Ctrl-C: spot machines and Kubernetes give 30."""

PAUSE = 20.0
"""Seconds, times the failures so far, after which a training begins again on a machine that was short of memory.

Without it three attempts were seen to meet the same shortage, of other programs, in the 98 seconds of a run."""

FAILURE = "failure.txt"
"""File in a run's folder: the error with which its last start ended, whole."""


def repeat(fit: Callable[[Job], Any], job: Job) -> Any:
    """The result of Ray Train at the last step, after as many attempts as it takes.

    A failure is one of a worker, of the controller or of a machine. A stop on notice is none, where the training came
    further than the attempt before, nor is one for lack of memory under `train.fit_memory`, as long as fewer images
    at once are possible.

    Args:
        fit: one attempt, which goes on from the last checkpoint.
        job: of the training.

    Raises:
        FailedRun: more failures than `train.max_failures`, or too many steps in a row that were not finite; caused by
            the last error.
        Exception: what no further attempt would mend (`EndsRun`, a full disk, a store that is away), as it came.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM, after the workers had time for a checkpoint.
    """
    most, last = job.experiment.train.max_failures, last_step(job.experiment.train)
    failures = 0
    while True:
        before = newest_step(job.folder)
        error: BaseException | None = None
        try:
            result = _attend(lambda whole: _sized(fit, whole), job)
            step = (result.metrics or {}).get("step", 0)
            if step >= last:
                return result
            reason = f"workers stopped on notice ({result.return_value})"
            counts = step <= before
        except Exception as raised:
            if (told := _broken(raised)) is not None:
                raise FailedRun(f"{job.experiment.name}: {told}") from raised
            if not _may_pass(raised, job):
                raise
            error, reason = raised, describe(raised)
            smaller = _in_less_memory(job, raised)
            if smaller is not None:
                halved = smaller.experiment.train.micro_batch != job.experiment.train.micro_batch
                job, images = smaller, f"{smaller.experiment.train.micro_batch} images at once"
                reason = f"{reason}; from here on {images if halved else 'activations are computed again'}"
            mended = smaller is not None or _not_started(raised)
            counts = not mended and (not _preempted(raised) or newest_step(job.folder) <= before)
        failures += counts
        mend_snapshot(job.folder, job.experiment.train)
        reached = max(0, newest_step(job.folder))
        if failures > most:
            raise _failed(job, reason, error, failures, reached) from error
        told = f" (failure {failures}, of {most} at the most)" if counts else ""
        pause = PAUSE * failures if counts and error is not None and machine_out_of_memory(error) else 0.0
        told += f"; waiting {pause:.0f} s for memory" if pause else ""
        logger.warning("%s: %s%s; going on from step %d", job.experiment.name, masked(reason), told, reached)
        time.sleep(pause)


def _in_less_memory(job: Job, error: Exception) -> Job | None:
    """The training in less memory, where that ran out and it may choose; else None.

    Activations that are computed again come first, since they change no number, then half the images at once.
    """
    experiment = job.experiment
    if not (experiment.train.fit_memory and out_of_memory(error)):
        return None
    if not (experiment.engine.activation_checkpointing or experiment.train.compile):
        return replace(
            job, experiment=replace(experiment, engine=replace(experiment.engine, activation_checkpointing=True))
        )
    smaller = more_accumulation(experiment)
    return None if smaller is None else replace(job, experiment=smaller)


def _broken(error: Exception) -> BrokenSteps | None:
    """The error of a training whose numbers are not finite, which another attempt would meet again."""
    return next((part for part in disk.parts(error) if isinstance(part, BrokenSteps)), None)


def _may_pass(error: Exception, job: Job) -> bool:
    """True for errors of Ray that another attempt may not meet."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    if not isinstance(error, RayError | TrainingFailedError) or told_in_a_line(error, job.folder) is not None:
        return False
    return not any(isinstance(part, EndsRun) for part in disk.parts(error))


def _not_started(error: Exception) -> bool:
    """True if workers could not be placed, which waits for machines and is no failure."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return any(isinstance(part, WorkerGroupStartupTimeoutError) for part in disk.parts(error))


def _preempted(error: Exception) -> bool:
    """True if a machine was taken back, which is no failure."""
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import PreemptionError

    return any(
        isinstance(part, PreemptionError) or (isinstance(part, RayActorError) and part.preempted)
        for part in disk.parts(error)
    )


def _failed(job: Job, reason: str, error: BaseException | None, failures: int, reached: int) -> FailedRun:
    """The last error of a run in one line; the whole of it lies in the run's folder."""
    file = storage.join(job.folder, FAILURE)
    if error is not None:
        whole = "".join(traceback.format_exception(error))
        storage.write_bytes(file, masked(whole).encode())
    where = f" (the whole error is in {file})" if error is not None else ""
    return FailedRun(
        f"{job.experiment.name}: {masked(reason)}{where}. That was failure {failures}, and train.max_failures is "
        f"{job.experiment.train.max_failures}; the same command goes on from step {reached}"
    )


def _sized(fit: Callable[[Job], Any], job: Job) -> Any:
    """One attempt with as many workers as there is room for."""
    attempt = elastic.sized(job)
    with elastic.asking_for_more(job, attempt):
        return fit(attempt)


def _attend(fit: Callable[[Job], Any], job: Job) -> Any:
    """Fit in a thread, while this one hears of Ctrl-C and SIGTERM and then gives the workers time for a checkpoint.

    In another than the main thread, as in a trial of a sweep, signals are somebody else's.

    Raises:
        FailedRun: the local session is lost, of which the other thread hears when it is too late for a message.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit(job)
    ended: list[Any] = []
    over = threading.Event()  # a join that a signal interrupts takes the thread for ended (Python 3.11)

    def work() -> None:
        try:
            ended.append((fit(job), None))
        except BaseException as error:
            ended.append((None, error))
        over.set()

    try:
        threading.Thread(target=work, name="fit", daemon=True).start()
        while not over.wait(0.2):
            if session.is_lost():
                reached = max(0, newest_step(job.folder))
                raise FailedRun(
                    f"{job.experiment.name}: Ray's own process (raylet) on this machine has ended: killed, perhaps by "
                    f"the kernel for want of memory; the same command goes on from step {reached}"
                )
    except (KeyboardInterrupt, SystemExit) as stop:
        what = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
        logger.warning("%s: %s; saving a checkpoint, for %.0f s at the most", job.experiment.name, what, GRACE)
        notice.ask(job.key, f"{what} of the driver")
        over.wait(GRACE)
        raise
    result, error = ended[0]
    if error is not None:
        raise error
    return result
