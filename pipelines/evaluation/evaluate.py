"""Evaluation a stored model on a prepared split: the figures that its training run printed.

The images run through `evaluate_batches` exactly as in a validation while training: the same view, the same batches
(a window of rows is always the same, whoever evaluates it), counts added in the order of the rows. So the figures
are the same to the last bit for one actor and for many.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from panoptic.evaluation.tally import Batch, Measures, Tally, evaluate_batches, summarise
from panoptic.metrics.report import Evaluation
from panoptic.models.base import PanopticModel
from panoptic.training import checkpoint as checkpoints
from panoptic.training.checkpoint import check_categories
from panoptic.training.device import prepare
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Killed, Pool, each
from pipelines.config import Experiment, override
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import evaluation_window
from pipelines.data.shard_reader import Rows
from pipelines.training.checkpoints import CHECKPOINT, load_checkpoint

logger = logging.getLogger(__name__)

REGISTRY = ("models:/", "runs:/")
"""How the URIs of models in MLflow begin."""

VIEW = ("resize.", "engine.", "train.validation_batch")
"""Options that decide what an evaluation computes."""


@dataclass(frozen=True)
class Stored:
    """A model and the options that it was evaluated with while it was trained."""

    model: PanopticModel
    options: dict[str, Any]
    """Flat: of the experiment that trained it."""


def load(uri: str, tracking_uri: str = "") -> Stored:
    """A model from a checkpoint (folder or file, local or s3://) or from MLflow (models:/name@alias, runs:/id/model).

    Raises:
        ValueError: nothing is there, or it is no model of this project.
    """
    if uri.startswith(REGISTRY):
        from pipelines.tracking import model as mlflow_model

        packaged = mlflow_model.load_packaged(uri, tracking_uri)
        return Stored(packaged.model, dict(packaged.experiment))
    record = load_checkpoint(uri)
    return Stored(checkpoints.build_model(record), dict(record["experiment"]))


def options_of(stored: Stored, base: Experiment) -> Experiment:
    """`base` with the evaluation view, precision and batch that the stored model was evaluated with."""
    return override(base, {path: value for path, value in stored.options.items() if path.startswith(VIEW)})


@dataclass(frozen=True)
class Task:
    """Which model, on which images, how; what every actor is told."""

    uri: str
    """Of the model; of one version of it, so that every actor loads the same."""
    tracking_uri: str
    identity: str
    """What tells this model from every other: see `identify`."""
    manifest: Manifest
    experiment: Experiment
    """Its evaluation view, precision and batch."""
    measures: Measures


def ask(
    uri: str, manifest: Manifest, base: Experiment, tracking_uri: str = "", measures: Measures | None = None
) -> Task:
    """A task for which no model was loaded: with the options of `base` in place of the model's own, see `resolved`.

    Raises:
        ValueError: nothing is there.
    """
    fixed, identity = identify(uri, tracking_uri)
    measures = measures or Measures(boundary=True, instances=True, losses=False)
    return Task(fixed, tracking_uri, identity, manifest, base, measures)


def resolved(asked: Task) -> Task:
    """The task with the options that its model was evaluated with while it was trained.

    Raises:
        ValueError: it is no model of this project, or the classes of model and data differ.
    """
    stored = stored_of(asked)
    check_categories(stored.model.categories, asked.manifest.categories)
    return replace(asked, experiment=options_of(stored, asked.experiment))


def assign(
    uri: str, manifest: Manifest, base: Experiment, tracking_uri: str = "", measures: Measures | None = None
) -> Task:
    """The task of evaluation a stored model as its training did.

    Raises:
        ValueError: nothing is there, or the classes of model and data differ.
    """
    return resolved(ask(uri, manifest, base, tracking_uri, measures))


def assign_images(uri: str, manifest: Manifest | None, base: Experiment, tracking_uri: str = "") -> Task:
    """The task of predicting images, of a split (whose categories may be others) or of none.

    Raises:
        ValueError: nothing is there.
    """
    fixed, identity = identify(uri, tracking_uri)
    stored = _load_once(fixed, tracking_uri, identity)
    return Task(fixed, tracking_uri, identity, manifest or _nothing(stored), options_of(stored, base), Measures())


def _nothing(stored: Stored) -> Manifest:
    """Of no images."""
    categories = stored.model.categories
    empty = (0,) * len(categories)
    return Manifest(0, "", 0, "", categories, (), 0, 0, empty, 0, 0, 0, (), 0, {})


def identify(uri: str, tracking_uri: str = "") -> tuple[str, str]:
    """The URI of one fixed version, and its identity: name and version in the registry, or the content of the file.

    Raises:
        ValueError: nothing is there.
    """
    if uri.startswith(REGISTRY):
        from pipelines.tracking import registry

        fixed = registry.pin(uri, tracking_uri)
        return fixed, fixed
    file = storage.absolute(uri if uri.endswith(".pt") else storage.join(uri, CHECKPOINT))
    if not storage.exists(file):
        raise ValueError(f"{file}: no checkpoint there; name a folder step_* that a run wrote, or a .pt file")
    return file, "sha256:" + hashlib.sha256(storage.read_bytes(file)).hexdigest()


@dataclass(frozen=True)
class EvaluationOutcome:
    """What came of a task."""

    task: Task
    evaluation: Evaluation
    tally: Tally
    """Image by image."""
    device: str = ""
    """On which the network ran."""


@dataclass(frozen=True)
class _Part:
    """Of one chunk, by one actor."""

    tally: Tally
    device: str
    begin: float
    """Seconds of the clock that all machines share."""
    end: float


def evaluate(task: Task, pool: Pool) -> EvaluationOutcome:
    """Every image of the split exactly once.

    Raises:
        ValueError: the split is empty, or images kill every actor.
    """
    manifest, tally, devices = task.manifest, Tally(), set()
    size = evaluation_window(manifest.rows, task.experiment.train.validation_batch)
    chunks = [range(first, min(first + size, manifest.rows)) for first in range(0, manifest.rows, size)]
    begin, end = float("inf"), 0.0
    for part in _narrated(_naming(each(counter, (task,), chunks, pool), manifest), manifest.rows):
        tally.add(part.tally)
        devices.add(part.device)
        begin, end = min(begin, part.begin), max(end, part.end)
    missing = sorted(set(range(manifest.rows)) - tally.images.keys())
    if missing:
        raise RuntimeError(f"{len(missing)} images were not evaluated, the rows {missing[:10]} among them")
    evaluation = summarise([tally], manifest.categories)
    timings = {**evaluation.timings, "images_per_second": manifest.rows / max(end - begin, 1e-9)}
    return EvaluationOutcome(task, replace(evaluation, timings=timings), tally, "; ".join(sorted(devices)))


def counter(task: Task) -> Callable[[Sequence[int]], _Part]:
    """The function of an actor: rows to their counts."""
    model = placed(task)

    def work(rows: Sequence[int]) -> _Part:
        begin = time.time()
        tally = evaluate_batches(model, batches(task, model.divisor, rows), task.experiment.engine, task.measures)
        return _Part(tally, device_of(model), begin, time.time())

    return work


def device_of(model: PanopticModel) -> str:
    """What a model runs on, for people."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"


def stored_of(task: Task) -> Stored:
    """The task's model where it was loaded, on the CPU or wherever `placed` put it."""
    return _load_once(task.uri, task.tracking_uri, task.identity)


def placed(task: Task) -> PanopticModel:
    """The task's model, ready to evaluate: on the GPU when there is one."""
    return prepare(stored_of(task).model, "cuda" if torch.cuda.is_available() else "cpu", task.experiment.engine).eval()


def batches(task: Task, divisor: int, rows: Sequence[int]) -> Iterator[Batch]:
    """Some rows of the split, as `evaluate_batches` takes them."""
    experiment = task.experiment
    for images, targets, samples in evaluation_batches(
        task.manifest,
        experiment.resize,
        experiment.train.validation_batch,
        divisor=divisor,
        threads=experiment.feed.threads,
        rows=rows,
    ):
        truths = [sample.original for sample in samples if sample.original is not None]
        yield Batch(images, targets, truths, [sample.position for sample in samples])


@lru_cache(maxsize=2)
def _load_once(uri: str, tracking_uri: str, identity: str) -> Stored:
    """One load a process; `identity` is there so that another content under the same name is loaded anew."""
    return load(uri, tracking_uri)


def _naming(parts: Iterator[_Part], manifest: Manifest) -> Iterator[_Part]:
    """Errors about rows with the names of their images."""
    try:
        yield from parts
    except Killed as error:
        if error.item is None:
            raise
        rows = Rows(manifest.files, [shard.rows for shard in manifest.shards], cache=0).table(error.item)
        names = rows["name"].to_pylist()
        raise ValueError(f"one of {len(names)} images, {', '.join(names)}: {error}") from error


def _narrated(parts: Iterator[_Part], total: int) -> Iterator[_Part]:
    """Say every ten seconds how far it has come."""
    done, last = 0, time.monotonic()
    for part in parts:
        done += len(part.tally.images)
        if time.monotonic() - last > 10:
            last = time.monotonic()
            logger.info("evaluated %d of %d images", done, total)
        yield part
