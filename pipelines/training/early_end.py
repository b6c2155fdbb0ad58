"""Ends of a run: at once, with one line, where a disk is full or a store is away, else after `train.max_failures`.

Ray Train's controller imports this module for its callback: what is imported here, that process pays for.
"""

from __future__ import annotations

from typing import Any

from pipelines.cluster import disk, storage


class EndsRun(Exception):
    """Marks errors that another attempt at a training would meet again."""


def told_in_a_line(error: BaseException, folder: str) -> OSError | None:
    """The full disk or the absent store that a worker or Ray Train met, in one line; None where it was neither.

    Ray Train's controller writes to S3 by itself: an OSError of its own, of a run on S3, is the store's.
    """
    full = disk.find_full(error)
    if isinstance(full, disk.DiskFull):
        return disk.DiskFull(str(full))
    if full is not None:
        lines = [line.strip() for line in str(full).splitlines() if disk.names_full(line)]
        return disk.DiskFull(f"{folder}: {lines[0] if lines else full}. {disk.REMEDY}")
    parts = disk.parts(error)
    away = next((part for part in parts if isinstance(part, storage.Unavailable)), None)
    if away is None and "://" in folder:
        raw = next((part for part in parts if type(part) is OSError), None)
        away = raw and storage.Unavailable(f"{folder}: could not be read or written: {' '.join(str(raw).split())}")
    return away and storage.Unavailable(str(away))


def stop_at_once() -> Any:
    """A callback of Ray Train that ends a run when a worker finds a disk full or a store away, in place of a restart.

    A restart would not empty the disk, and the store was waited for already.
    """
    from ray.train import UserCallback

    class StopAtOnce(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                told = told_in_a_line(error, run_context.run_config.name)
                if told is not None:
                    raise told

    return StopAtOnce()
