"""Checkpoint folders `step_*` of a run: writing, reading, and what a worker takes from them."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from panoptic.metrics.report import Evaluation, metrics, table
from panoptic.training.checkpoint import load, restore, save
from panoptic.training.transfer import transfer_training
from pipelines.cluster import storage
from pipelines.config import flatten
from pipelines.training.state import State

CHECKPOINT = "checkpoint.pt"
"""Weights, optimiser, average, step and position: see `panoptic.training.checkpoint`."""
REPORT = "report.txt"
"""The table of the validation at this step."""
METRICS = "metrics.json"
"""All its metrics."""


def checkpoint(state: State, evaluation: Evaluation) -> None:
    """Hand the state to Ray Train with the metrics by which checkpoints are ranked; every worker calls it.

    Rank 0 writes the files. Returns when Ray Train's controller has committed the checkpoint: a crash before that
    would restart from the one before.
    """
    import ray.train
    from ray.train import CheckpointConsistencyMode

    values = metrics(evaluation)
    with tempfile.TemporaryDirectory() as folder:
        written = None
        if state.rank == 0:
            write(Path(folder), state, evaluation)
            written = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            {"score": state.experiment.train.rank(values), "step": state.step, **values},
            checkpoint=written,
            checkpoint_dir_name=f"step_{state.step:06d}",
        )
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


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
        experiment=flatten(state.experiment),
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
