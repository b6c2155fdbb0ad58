"""The record of an evaluation: its report and its MLflow run; made once for each key when it is scheduled.

The key is (model version, hash of the data, options of the evaluation). A finished MLflow run with this key is the
evaluation; whoever asks again gets its figures, without a model being loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from panoptic.evaluation.tally import Tally
from panoptic.metrics.bootstrap import LEAST, Counts, beyond_noise, differences
from panoptic.metrics.report import class_rows, class_table, details, metrics, table
from panoptic.segmentation import Categories
from pipelines.cluster import lease, storage
from pipelines.cluster.actor_pool import Pool
from pipelines.cluster.exits import Worse
from pipelines.cluster.masking import masked
from pipelines.config import flatten
from pipelines.evaluation import oracle
from pipelines.evaluation.evaluate import VIEW, EvaluatedTask, Task, evaluate, resolved, stored_of
from pipelines.evaluation.report.examples import choose, pictures
from pipelines.evaluation.report.page import Model, page
from pipelines.tracking import registry, runs
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.client import sqlite_file

REPORT, COUNTS = "report.html", "counts.npz"


@dataclass(frozen=True)
class Places:
    """The MLflow store and the folder in which evaluations are recorded."""

    tracking_uri: str
    experiment: str = "evaluation"
    """The MLflow experiment."""
    folder: str = "runs/evaluations"
    """Local or s3://: a copy of each report, and the leases of scheduled evaluations."""


@dataclass(frozen=True)
class Record:
    """A recorded evaluation, as it is read from its MLflow run."""

    run: runs.Run
    pq: float
    counts: Counts
    """The PQ counts of each image."""


def key_of(task: Task) -> str:
    """The key of an evaluation: a hash of model version, content of the data and options that decide the figures."""
    parts = [task.identity, task.manifest.hash, _options(task)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def title_of(task: Task) -> str:
    """A short name of the model: "street 3" of models:/street/3, "run/step_000100" of a checkpoint."""
    path = PurePosixPath(task.uri.split(":", 1)[-1] if "://" in task.uri or task.uri.startswith("models") else task.uri)
    parts = [part for part in path.parts if part not in ("/", "models:", "checkpoint.pt")]
    return (" " if task.uri.startswith("models:/") else "/").join(parts[-2:]) or task.uri


def model_of(evaluated: EvaluatedTask) -> Model:
    """An evaluated model in the form that a report takes."""
    return Model(title_of(evaluated.task), evaluated.evaluation, counts_of(evaluated.tally))


def counts_of(tally: Tally) -> Counts:
    """The PQ counts of each image, in the order of the rows."""
    names, counts = [], []
    for row in sorted(tally.images):
        image = tally.images[row]
        names.append(image.name)
        counts.append(image.quality)
    return Counts.of(names, counts)


def html(
    evaluated: EvaluatedTask,
    others: Sequence[EvaluatedTask] = (),
    examples: int = 12,
    places: Places | None = None,
) -> str:
    """The report, compared with `others`; it shows `examples` of the worst images and as many typical ones.

    Args:
        places: where the model's oracle table is looked for; None = nowhere.
    """
    task, tally = evaluated.task, evaluated.tally
    worst, typical = choose(tally, len(task.manifest.categories), examples)
    drawn = pictures(task, tally, [*worst, *typical])
    compared = [model_of(other) for other in others]
    cells: Sequence[Sequence[str]] = ()
    if places is not None:
        tracking = runs.Tracking(uri=places.tracking_uri, experiment=places.experiment)
        cells = oracle.recorded(task.identity, task.manifest, tracking)
    return page(model_of(evaluated), compared, drawn[: len(worst)], drawn[len(worst) :], facts(evaluated), cells)


def facts(evaluated: EvaluatedTask) -> dict[str, str]:
    """Identity of model, data and evaluation, for people."""
    task, manifest = evaluated.task, evaluated.task.manifest
    return {
        "model": task.uri,
        "model content": task.identity if task.identity != task.uri else "",
        "data": f"{manifest.rows} images of {manifest.split}, {masked(manifest.uri)}",
        "date": time.strftime("%d %B %Y, %H:%M"),
        "data content": manifest.hash,
        "evaluation": key_of(task),
        **_mapped(task),
        **{name: str(value) for name, value in _options(task).items()},
        "device": evaluated.device,
        "code": ", ".join(f"{k.rsplit('.', 1)[-1]} {v}" for k, v in runs.code_version().items()),
    }


def _mapped(task: Task) -> dict[str, str]:
    """The fate of the model's classes under a class map, for people."""
    if task.mapping is None:
        return {}
    own = stored_of(task).model.categories
    return {"predictions": task.mapping.describe(own), "removed before anything is counted": task.mapping.removed(own)}


def text(evaluated: EvaluatedTask) -> str:
    """The tables that a job prints."""
    evaluation = evaluated.evaluation
    return f"{class_table(evaluation)}\n\n{table(evaluation)}\n{details(evaluation)}"


def record(evaluated: EvaluatedTask, places: Places, report: str, asked: Task) -> Record:
    """Write one MLflow run with the figures, the tables, the report and the counts of each image.

    Args:
        asked: the task before its model was loaded, by which it is found again.

    Raises:
        ConnectionError: the store does not take it.
    """
    task, evaluation, key = evaluated.task, evaluated.evaluation, key_of(evaluated.task)
    tags = {registry.KEY: key, registry.ASKED: key_of(asked)}
    tags |= {"model": task.uri, "model_identity": task.identity, "data_hash": task.manifest.hash}
    data = [runs.DataSet(task.manifest.split, task.manifest.hash, task.manifest.uri, "eval")]
    options = runs.Tracking(uri=places.tracking_uri, experiment=places.experiment, name=title_of(task))
    local = sqlite_file(places.tracking_uri)
    root = Path(local).parent if local else "runs"  # artifacts beside the database
    run = runs.start(options, root, params={"model": task.uri, **_options(task)}, tags=tags, data=data)
    counts = counts_of(evaluated.tally)
    with runs.ending(run):
        tracker = tracker_module.Tracker(run)
        tracker.metrics(0, metrics(evaluation))
        tracker.table("classes", class_rows(evaluation), text(evaluated))
        if not tracker.close():
            store = masked(places.tracking_uri)
            raise ConnectionError(f"{store}: the metrics of run {run.run_id} were not written; try again")
        registry.log_artifact(run, REPORT, report.encode())
        registry.log_artifact(run, COUNTS, _pack(counts))
        runs.describe(run, f"```\n{table(evaluation)}\n{details(evaluation)}\n```")
    storage.write_bytes(storage.join(places.folder, f"{key}.html"), report.encode())
    return Record(run, evaluation.quality.all.pq, counts)


def find(task: Task, places: Places, tag: str = registry.KEY) -> Record | None:
    """The recorded evaluation with the key of this task, None if there is none.

    Args:
        tag: the tag of MLflow runs that holds the key; `registry.ASKED` for a task of `ask`.
    """
    run = registry.find_evaluation(tag, key_of(task), places.experiment, places.tracking_uri)
    if run is None:
        return None
    return Record(run, registry.metrics_of(run)["val/pq"], _unpack(registry.read_artifact(run, COUNTS)))


def once(asked: Task, pool: Pool, places: Places, seconds: float = lease.EXPIRY) -> tuple[Record | None, bool]:
    """The evaluation of a task (of `ask`), made unless it is there; two processes at once make it once.

    Args:
        seconds: after which another process takes over where this one gives no sign of life.

    Returns:
        the record, None while another process is at it, and whether it was made now.
    """
    before = find(asked, places, registry.ASKED)
    if before is not None:
        return before, False
    task = resolved(asked)
    folder = storage.join(places.folder, "leases", key_of(task))
    held = lease.acquire(folder, seconds)
    if held is None:
        print(f"{title_of(task)}: being evaluated by {lease.holder(folder)}")
        return None, False
    with held.kept():
        before = find(task, places)  # somebody may have finished before the lease, or asked in another way
        if before is not None:
            return before, False
        evaluated = evaluate(task, pool)
        report = html(evaluated, places=places)
        if not held.held():
            print(f"{title_of(task)}: taken over by {lease.holder(folder)}; nothing was recorded")
            return None, False
        print(text(evaluated))
        made = record(evaluated, places, report, asked)
    return made, True


def check(model: Record, reference: Record, categories: Categories, margin: float) -> tuple[bool, str]:
    """True if a model is better than the reference by more than the bootstrap noise, and a sentence that says why.

    Raises:
        Worse: its PQ is lower by more than `margin` points.
    """
    if model.pq < reference.pq - margin:
        raise Worse(
            f"PQ {model.pq:.2f} is {reference.pq - model.pq:.2f} below the reference's {reference.pq:.2f}, "
            f"more than the margin of {margin:g}"
        )
    compared = differences(reference.counts, model.counts, categories)
    gain, better = compared["all"], beyond_noise(compared)
    noise = f"{gain.value:+.2f} PQ, 95 % of the draws within {gain.low:+.2f} to {gain.high:+.2f}"
    if gain.images < LEAST:
        noise = f"{gain.value:+.2f} PQ, but {gain.images} images are too few to tell from chance, which takes {LEAST}"
    return better, f"{'better' if better else 'not better'} by more than the noise: {noise}"


def _options(task: Task) -> dict[str, Any]:
    """The options that decide the figures, as plain values."""
    flat = {name: value for name, value in flatten(task.experiment).items() if name.startswith(VIEW)}
    if task.class_map is not None:
        flat["map_prediction"] = task.class_map.digest
    return json.loads(json.dumps({**flat, **{f"measures.{k}": v for k, v in vars(task.measures).items()}}))


def _pack(counts: Counts) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=np.array(counts.names), places=counts.places, values=counts.values)
    return buffer.getvalue()


def _unpack(data: bytes) -> Counts:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return Counts(tuple(file["names"].tolist()), file["places"], file["values"])
