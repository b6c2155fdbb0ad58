"""Checkpoints that training does not wait for.

At a step every worker calls `Writer.save`. Rank 0 copies weights, average and optimiser into memory of the host, hands
the copy to the thread in which Ray Train uploads (`CheckpointUploadMode.ASYNC`), and trains on. The thread writes the
files, in a folder of another name that is renamed when it is whole, or in a temporary one that is copied to S3. Ray
Train's controller then commits the checkpoint, and with it decides which older ones go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs

from panoptic.metrics.report import Evaluation, metrics
from panoptic.training.checkpoint import Snapshot
from pipelines.cluster import disk, gauges, storage
from pipelines.config import UNVALIDATED
from pipelines.training.checkpoints import CHECKPOINT, PARTIAL, checkpoint_bytes, content, write
from pipelines.training.state import State

KEEPING = 60.0
"""Seconds for which a checkpoint waits for the metrics before it to be in MLflow or in the run's folder."""


class Writer:
    """The checkpoints of one worker's training, one at a time."""

    def __init__(self, state: State) -> None:
        self.saved = state.step
        """Step of the last checkpoint."""
        self.saved_at = time.monotonic()
        """Time of the last checkpoint, or of the beginning."""
        self.waited = 0.0
        """Seconds that training has waited in `save`."""
        self._state = state
        self._snapshot = Snapshot()
        self._idle = threading.Event()
        self._idle.set()

    @property
    def busy(self) -> bool:
        """True on rank 0 while a checkpoint is written."""
        return not self._idle.is_set()

    def save(self, evaluation: Evaluation | None = None) -> None:
        """Begin to write a checkpoint; every worker calls it at the same step.

        Waits for the copy, and for the checkpoint before if that is still being written. An error of the writing ends
        the training: Ray Train takes it from the thread.

        Args:
            evaluation: of the validation at this step, by which checkpoints are ranked; None where there was none.
        """
        import ray.train

        begin = time.perf_counter()
        state, step, written = self._state, self._state.step, None
        name, values = f"step_{state.step:06d}", {} if evaluation is None else metrics(evaluation)
        score = UNVALIDATED if evaluation is None else state.experiment.train.rank(values)
        if state.rank == 0:
            self._idle.wait()
            self._idle.clear()
            record = self._snapshot.take(content(state))
            kept = None if state.tracker is None else state.tracker.keep()
            written = ray.train.Checkpoint(state.job.folder)  # stands for the one that `upload` writes

        def upload(_: Any, name: str) -> Any:
            try:
                if kept is not None:  # or a machine that is lost takes metrics along that are not repeated
                    kept.wait(KEEPING)
                whole = upload_checkpoint(state, record, evaluation, name)
            finally:
                self._idle.set()
            gauges.publish(checkpoint_gauges(step), run=state.experiment.name)
            return whole

        ray.train.report(
            {"score": score, "step": state.step, **values},
            checkpoint=written,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,
        )
        self.saved, self.saved_at = state.step, time.monotonic()
        self.waited += time.perf_counter() - begin


def checkpoint_gauges(step: int) -> dict[str, float]:
    """The step and the time of a checkpoint that has been written, under the names of `gauges.TRAINING`."""
    return {"panoptic_checkpoint_step": step, "panoptic_checkpoint_timestamp_seconds": time.time()}


def upload_checkpoint(state: State, record: Mapping[str, Any], evaluation: Evaluation | None, name: str) -> Any:
    """Write the files of a checkpoint into the run's folder, and return it as Ray Train's.

    Args:
        state: of the training.
        record: a copy of its content.
        evaluation: of its step, None where there was none.
        name: of the checkpoint's folder.

    Raises:
        DiskFull: of the temporary folder or of the run's storage.
        storage.Unavailable: S3 did not take the checkpoint, for as long as it is waited for.
    """
    import ray.train

    place: Any = ray.train.get_context().get_storage()
    path = f"{place.experiment_fs_path}/{name}"
    if "://" not in state.job.folder:
        with _telling_full(state.job.folder, state, partial_folder(Path(path))):
            write_whole(Path(path), record, evaluation)
    else:
        with tempfile.TemporaryDirectory() as folder:
            with _telling_full(folder, state, Path(folder)):
                write(Path(folder), record, evaluation)
            with storage.naming(f"s3://{path}", "written"):
                # threads of an upload may wait for each other: github.com/apache/arrow/issues/32372
                fs.copy_files(folder, path, destination_filesystem=place.storage_filesystem, use_threads=False)
    return ray.train.Checkpoint(path, place.storage_filesystem)


def write_whole(folder: Path, record: Mapping[str, Any], evaluation: Evaluation | None) -> None:
    """A checkpoint's folder that is there with all its files on the disk, or not at all.

    One of its name, which nobody has committed, is replaced.
    """
    partial = partial_folder(folder)
    partial.mkdir(parents=True, exist_ok=True)
    write(partial, record, evaluation)
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def partial_folder(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it has its name."""
    return folder.with_name(f"{PARTIAL}{folder.name.removeprefix('step_')}")


@contextmanager
def _telling_full(uri: str, state: State, folder: Path) -> Iterator[None]:
    """An error of a disk that is full as one that says which, and how much a checkpoint needs.

    What `torch.save` raises there is a RuntimeError of no code ("unexpected pos 576 vs 534"), as of every fault of its
    archive; that the disk is full is told by another write to the same file.

    Args:
        uri: names the place in the message.
        state: of the training.
        folder: in which the checkpoint is written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        torn = isinstance(error, RuntimeError) and _takes_no_more(folder / CHECKPOINT)
        if torn or disk.find_full(error):
            needed = checkpoint_bytes(state.model, state.experiment.optim)
            raise disk.full(uri, needed, "a checkpoint's files") from error
        raise


def _takes_no_more(file: Path) -> bool:
    """True if there is no room for another MiB in a file."""
    try:
        with file.open("ab") as opened:
            opened.write(bytes(1 << 20))
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        return disk.find_full(error) is not None
    return False
