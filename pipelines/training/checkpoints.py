"""Checkpoint folders `step_*` of a run: their files, which of them count, and what a worker takes from them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from panoptic.convert import hub
from panoptic.metrics.report import Evaluation, metrics, table
from panoptic.training.checkpoint import CHECKPOINT, LISTING, best_listed, load, make_record, restore
from panoptic.training.config import Optim
from panoptic.training.optim import build_optimiser
from panoptic.training.transfer import transfer_training
from pipelines.cluster import storage
from pipelines.cluster.json_file import read_json
from pipelines.cluster.masking import masked_values
from pipelines.config import UNVALIDATED, Train, flatten
from pipelines.training.state import State

REPORT = "report.txt"
"""File of the table of the validation at this step."""
METRICS = "metrics.json"
"""File of all metrics of the validation at this step; absent where the step was not validated."""
PARTIAL = ".step_"
"""Beginning of the name of a folder in which a checkpoint is being written; it is renamed when it is whole."""
SNAPSHOT = LISTING
"""Ray Train's list of the checkpoints in a run's folder."""


def checkpoint_bytes(model: nn.Module, optim: Optim) -> int:
    """Bytes of the tensors in a checkpoint: weights, their average, and the optimiser's state of what is trained.

    Args:
        model: with all that is frozen; on the meta device does too.
        optim: how it is trained.
    """
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in model.parameters()) - trained
    average = weights - frozen if optim.ema else 0  # the average shares the model's frozen parameters
    return weights + average + optimiser_slots(optim) * trained


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
    if options.checkpoint_every or options.checkpoint_minutes:
        return options.keep + 2
    return min(options.keep + 2, -(-options.steps // options.validate_every))


def read_metrics(folder: str) -> dict[str, float]:
    """The metrics of the validation that a checkpoint's folder holds, {} where none was made at its step.

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
    names = sorted({name.split("/")[0] for name in storage.list_files(folder) if "/" in name})
    torn = [name for name in names if name.startswith(PARTIAL)]
    steps = [name for name in names if name.startswith("step_") and f'"{name}"' not in known]
    torn += [name for name in steps if not _is_whole(storage.join(folder, name))]
    for name in torn:
        storage.delete(storage.join(folder, name))
    return torn


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint that Ray Train has committed in a run's folder, -1 where there is none."""
    snapshot = _read_snapshot(folder)
    latest = (snapshot or {}).get("latest_checkpoint_result")
    return -1 if latest is None else _step_of(latest["checkpoint_dir_name"])


def mend_snapshot(folder: str, options: Train) -> bool:
    """Write Ray Train's list of checkpoints anew, from those that are whole, where it does not stand for them.

    A disk that was full or a machine that was lost may leave the list empty or cut short, with which Ray Train would
    not start; a checkpoint that was removed by hand would end it, too; and one that is whole may not be listed yet.

    Args:
        folder: of the run, which nobody writes to.
        options: by which checkpoints are ranked.

    Returns:
        True if it was written.
    """
    if not storage.exists(folder):
        return False
    names = {name.split("/")[0] for name in storage.list_files(folder) if name.startswith("step_") and "/" in name}
    whole = sorted(name for name in names if _is_whole(storage.join(folder, name)))
    snapshot = _read_snapshot(folder)
    if snapshot is not None:
        listed = {entry["checkpoint_dir_name"] for entry in snapshot["checkpoint_results"]}
        if listed <= set(whole) and max(map(_step_of, whole), default=-1) <= newest_step(folder):
            return False
    elif not whole and not storage.exists(storage.join(folder, SNAPSHOT)):
        return False
    storage.write_bytes(storage.join(folder, SNAPSHOT), json.dumps(_snapshot_of(folder, whole, options)).encode())
    return True


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _read_snapshot(folder: str) -> dict[str, Any] | None:
    """Ray Train's list of the checkpoints in a run's folder; None where there is none, or none that can be read."""
    file = storage.join(folder, SNAPSHOT)
    try:
        found = json.loads(storage.read_bytes(file)) if storage.exists(file) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and "checkpoint_results" in found else None


def _snapshot_of(folder: str, names: Sequence[str], options: Train) -> dict[str, Any]:
    """Ray Train's list of these checkpoints, the worst first, in its form of version 2.60."""
    import ray

    entries = []
    for name in names:
        values = read_metrics(storage.join(folder, name))
        score = options.rank(values) if values else UNVALIDATED
        entry = {"score": score, "step": _step_of(name), **values}
        entries.append({"version": 0, "checkpoint_dir_name": name, "metrics": entry})
    ranked = sorted(entries, key=lambda entry: (entry["metrics"]["score"], entry["metrics"]["step"]))
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": ranked,
        "checkpoint_report_indices": [names.index(entry["checkpoint_dir_name"]) for entry in ranked],
        "latest_checkpoint_result": entries[-1] if entries else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


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


def content(state: State) -> dict[str, Any]:
    """The content of a checkpoint of a state, with the state's own tensors."""
    return make_record(
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


def write(folder: Path, record: Mapping[str, Any], evaluation: Evaluation | None) -> None:
    """The files of a checkpoint folder.

    Args:
        folder: which is there.
        record: of `content`, with tensors that nobody changes meanwhile.
        evaluation: of the validation at its step; None where there was none.
    """
    torch.save(dict(record), folder / CHECKPOINT)
    told = "not validated" if evaluation is None else table(evaluation)
    (folder / REPORT).write_text(f"step {record['step']}\n{told}\n")
    (folder / METRICS).write_text(json.dumps({} if evaluation is None else metrics(evaluation), indent=1))


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
    """The checkpoint in a .pt file, or in a folder that a run wrote, local or s3://, or that of published weights.

    Raises:
        ValueError: there is none, or the file is no checkpoint.
    """
    file = checkpoint_file(uri)
    return load(io.BytesIO(storage.read_bytes(file)), file)


def checkpoint_file(uri: str) -> str:
    """URI of the .pt file that a checkpoint's URI (file or folder) names; of a run's folder, its best checkpoint's.

    A published model (hub:NAME) lies in this machine's cache; it is downloaded where it is not there yet.

    Raises:
        ValueError: it does not exist.
    """
    if uri.startswith(hub.PREFIX):
        return str(hub.find(uri))
    file = uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT)
    if storage.exists(file):
        return file
    if not uri.endswith(".pt") and (best := best_checkpoint(uri)):
        return storage.join(best, CHECKPOINT)
    raise ValueError(f"{file}: no checkpoint there; name a run's folder, a folder step_* in it, or a .pt file")


def best_checkpoint(folder: str) -> str:
    """URI of the best checkpoint in a run's folder, as Ray Train lists them; "" where it lists none."""
    file = storage.join(folder, SNAPSHOT)
    best = best_listed(storage.read_bytes(file)) if storage.exists(file) else ""
    return storage.join(folder, best) if best else ""
