"""Checkpoint folders `step_*` of a run: writing, reading, and what a worker takes from them."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from torch import nn

from panoptic.metrics.report import Evaluation, metrics, table
from panoptic.training.checkpoint import load, restore, save
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.transfer import transfer_training
from pipelines.cluster import disk, storage
from pipelines.cluster.json_file import read_json
from pipelines.cluster.masking import masked_values
from pipelines.config import Train, flatten
from pipelines.training.state import State

CHECKPOINT = "checkpoint.pt"
"""Weights, optimiser, average, step and position: see `panoptic.training.checkpoint`."""
REPORT = "report.txt"
"""The table of the validation at this step."""
METRICS = "metrics.json"
"""All its metrics."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints in a run's folder."""


def checkpoint(state: State, evaluation: Evaluation) -> None:
    """Hand the state to Ray Train with the metrics by which checkpoints are ranked; every worker calls it.

    Rank 0 writes the files. Returns when Ray Train's controller has committed the checkpoint: a crash before that
    would restart from the one before.

    Raises:
        DiskFull: of the temporary folder or of the run's storage.
        storage.Unavailable: S3 did not take the checkpoint, for as long as it is waited for.
    """
    import ray.train
    from ray.train import CheckpointConsistencyMode

    values = metrics(evaluation)
    with tempfile.TemporaryDirectory() as folder:
        written = None
        if state.rank == 0:
            with _telling_full(folder, state):
                write(Path(folder), state, evaluation)
            written = ray.train.Checkpoint.from_directory(folder)
        with _telling_full(state.job.folder, state):
            ray.train.report(
                {"score": state.experiment.train.rank(values), "step": state.step, **values},
                checkpoint=written,
                checkpoint_dir_name=f"step_{state.step:06d}",
                checkpoint_upload_fn=_upload if "://" in state.job.folder else None,
            )
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def _upload(checkpoint: Any, name: str) -> Any:
    """Copy a checkpoint to S3 as Ray Train does it, with an error that names the place.

    Raises:
        storage.Unavailable: S3 did not take it.
    """
    import ray.train

    place: Any = ray.train.get_context().get_storage()
    path = f"{place.experiment_fs_path}/{name}"
    with storage.naming(f"s3://{path}", "written"):
        # threads of an upload may wait for each other: github.com/apache/arrow/issues/32372
        fs.copy_files(checkpoint.path, path, destination_filesystem=place.storage_filesystem, use_threads=False)
    return ray.train.Checkpoint(path, place.storage_filesystem)


@contextmanager
def _telling_full(folder: str, state: State) -> Iterator[None]:
    """An error of a disk that is full as one that says which, and how much a checkpoint needs.

    What `torch.save` raises there is a RuntimeError of no code ("unexpected pos 576 vs 534"); that the disk is full is
    told by what is free.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        needed = checkpoint_bytes(state.model, state.experiment.optim)
        free = disk.free_bytes(folder)
        torn = free is not None and free < needed and "inline_container" in str(error)
        if torn or disk.find_full(error):
            raise disk.full(folder, needed, "a checkpoint's files") from error
        raise


def checkpoint_bytes(model: nn.Module, optim: Optim) -> int:
    """Bytes of the tensors in a checkpoint: weights, their average, and the optimiser's state of what is trained.

    Args:
        model: with all that is frozen; on the meta device does too.
        optim: how it is trained.
    """
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return weights * (2 if optim.ema else 1) + optimiser_slots(optim) * trained


def optimiser_slots(optim: Optim) -> int:
    """Count of the numbers that the optimiser keeps of each parameter, after a step of a layer of its own."""
    layer = nn.Linear(2, 2, bias=False)
    optimiser = build_optimiser(layer, optim)
    layer.weight.grad = torch.ones(2, 2)
    optimiser.step()
    kept = [value for state in optimiser.state.values() for value in state.values()]
    return sum(isinstance(value, torch.Tensor) and value.shape == layer.weight.shape for value in kept)


def most_at_once(options: Train) -> int:
    """The most checkpoints that lie in a run's folder: the best, the last, and the next while it is written."""
    return min(options.keep + 2, -(-options.steps // options.validate_every))


def read_metrics(folder: str) -> dict[str, float]:
    """The metrics of the validation that a checkpoint's folder holds.

    Raises:
        ValueError: the file is empty, cut short or edited.
    """
    remedy = f"remove {folder}, which is damaged, and the run goes on from the checkpoint before"
    return read_json(storage.join(folder, METRICS), dict[str, float], remedy)


def written_bytes(folder: str) -> int:
    """Bytes of the checkpoints that a run has in its folder already."""
    if not storage.exists(folder):
        return 0
    stamps = storage.list_stamps(folder)
    return sum(count for name, (count, _) in stamps.items() if name.startswith("step_"))


def drop_torn(folder: str) -> list[str]:
    """Remove the checkpoints of a run that are not whole, and that Ray Train does not know.

    A disk that was full, or a machine that was lost, leaves them when it stops the copy. A checkpoint that is whole, or
    that Ray Train lists, is never touched.

    Returns:
        the names of the folders that were removed.
    """
    if not storage.exists(folder):
        return []
    snapshot = storage.join(folder, SNAPSHOT)
    known = storage.read_bytes(snapshot).decode() if storage.exists(snapshot) else ""
    files = storage.list_files(folder)
    names = sorted({name.split("/")[0] for name in files if name.startswith("step_") and "/" in name})
    torn = [name for name in names if f'"{name}"' not in known and not _is_whole(storage.join(folder, name))]
    for name in torn:
        storage.delete(storage.join(folder, name))
    return torn


def _is_whole(folder: str) -> bool:
    """True if all files of a checkpoint are there and none is cut short."""
    if not all(storage.exists(storage.join(folder, name)) for name in (CHECKPOINT, METRICS, REPORT)):
        return False
    try:
        read_metrics(folder)
    except ValueError:
        return False
    # a zip archive whose directory stands at its end; an object on S3 is there as a whole or not at all
    return "://" in folder or zipfile.is_zipfile(storage.join(folder, CHECKPOINT))


def write(folder: Path, state: State, evaluation: Evaluation) -> None:
    """The files of a checkpoint folder."""
    save(
        str(folder / CHECKPOINT),
        config=state.experiment.model,
        model=state.model,
        ema=state.ema,
        optimiser=state.optimiser,
        step=state.step,
        position=state.position,
        run_id=state.job.run.run_id,
        experiment=masked_values(flatten(state.experiment)),
        class_map=state.job.train.source.get("class_map"),
    )
    (folder / REPORT).write_text(f"step {state.step}\n{table(evaluation)}\n")
    (folder / METRICS).write_text(json.dumps(metrics(evaluation), indent=1))


def resume(state: State, file: Path) -> None:
    """Continue from a checkpoint of this run.

    Raises:
        ValueError: the file is no checkpoint, or does not fit the model or the optimiser.
    """
    record = load(str(file), str(file))
    restore(record, state.model, state.optimiser, state.ema)
    state.step, state.position = record["step"], record["position"]
    if state.rank == 0:
        print(f"continuing at step {state.step}, position {state.position}", flush=True)


def transfer(state: State, uri: str) -> None:
    """Continue the training of a run with other options, with what of its optimiser's state still applies.

    Raises:
        ValueError: there is no checkpoint, or its weights do not fit the model.
    """
    record = load_checkpoint(uri)
    carried = transfer_training(record, state.model, state.optimiser, state.ema)
    state.step, state.position = record["step"], record["position"]
    if state.tracker is not None:
        state.tracker.rewind(state.step)
    if state.rank == 0:
        told = f"taking over {uri} at step {state.step}, with the optimiser's state of {carried} tensors"
        print(told, flush=True)


def load_checkpoint(uri: str) -> dict[str, Any]:
    """The checkpoint in a .pt file, or in a folder that a run wrote, local or s3://.

    Raises:
        ValueError: there is none, or the file is no checkpoint.
    """
    file = checkpoint_file(uri)
    return load(io.BytesIO(storage.read_bytes(file)), file)


def checkpoint_file(uri: str) -> str:
    """URI of the .pt file that a checkpoint's URI (file or folder) names.

    Raises:
        ValueError: it does not exist.
    """
    file = uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT)
    if not storage.exists(file):
        raise ValueError(f"{file}: no checkpoint there; name a folder step_* that a run wrote, or a .pt file")
    return file
