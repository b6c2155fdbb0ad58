"""Ray Train's functions of a worker, for tests without Ray: reports are uploaded by a thread as Ray does it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from pyarrow import fs


class Report(NamedTuple):
    """One report of a worker."""

    metrics: dict[str, Any]
    uploaded: Future[Any]
    """The checkpoint that was written; None where this worker had none."""


def in_ray(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Report]:
    """The reports that are made from now on, in one thread, with the storage of the run in `folder`."""
    import ray.train

    reports: list[Report] = []
    pool = ThreadPoolExecutor(1)
    storage = SimpleNamespace(experiment_fs_path=str(folder), storage_filesystem=fs.LocalFileSystem())

    def report(
        metrics: dict[str, Any], checkpoint: Any, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **how: Any
    ) -> None:
        assert how["checkpoint_upload_mode"] == ray.train.CheckpointUploadMode.ASYNC
        work = checkpoint_upload_fn if checkpoint is not None else lambda *_: None
        reports.append(Report(metrics, pool.submit(work, checkpoint, checkpoint_dir_name)))

    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    monkeypatch.setattr(ray.train, "report", report)
    return reports
