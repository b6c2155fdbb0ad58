"""Evaluation of stored models on prepared splits, with the figures that their training printed.

A `Task` is a model, a split and what is measured. Tasks run in actors, or in this process: `evaluate_all` is the one
way for evaluations, oracle tables and comparisons. The images run through `validation.evaluate_share` exactly as in a
validation while training: the same view, the same batches (a window of rows is always the same, whoever evaluates
it), counts added in the order of the rows. So the figures are the same to the last bit for one actor and for many.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from panoptic.convert import hub
from panoptic.evaluation.tally import Measures, Tally, summarise
from panoptic.metrics.report import Evaluation
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import build_model, check_categories
from panoptic.training.device import prepare
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Killed, Pool, each
from pipelines.cluster.progress import progress
from pipelines.config import Experiment, override
from pipelines.data.class_map import ClassMap
from pipelines.data.class_mapping import ClassMapping
from pipelines.data.classes import with_recorded_map
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import evaluation_window
from pipelines.data.shard_index import list_images
from pipelines.evaluation.mapped_model import MappedModel, mapping_of
from pipelines.training.checkpoints import checkpoint_file, load_checkpoint
from pipelines.training.validation import evaluate_share

logger = logging.getLogger(__name__)

REGISTRY = ("models:/", "runs:/")
"""Prefixes of the URIs of models in MLflow."""

VIEW = ("resize.", "engine.", "train.validation_batch")
"""Options that decide what an evaluation computes."""

HERE = Pool(actors=0)
"""This process, without Ray."""


@dataclass(frozen=True)
class Stored:
    """A model and the options that it was evaluated with while it was trained."""

    model: PanopticModel
    options: dict[str, Any]
    """Flat, of the experiment that trained it."""
    class_map: Mapping[str, Any] | None = None
    """The record of the class map or join that changed the classes of its data sets; None where nothing did."""


def load(uri: str, tracking_uri: str = "") -> Stored:
    """A model from a checkpoint (folder or file, local or s3://) or from MLflow (models:/name@alias, runs:/id/model).

    Raises:
        ValueError: nothing is there, or it is no model of this project.
    """
    if uri.startswith(REGISTRY):
        from pipelines.tracking import model as mlflow_model

        packaged = mlflow_model.load_packaged(uri, tracking_uri)
        return Stored(packaged.model, dict(packaged.experiment), packaged.class_map)
    record = load_checkpoint(uri)
    return Stored(build_model(record, name=uri), dict(record["experiment"]), record.get("class_map"))


def options_of(stored: Stored, base: Experiment) -> Experiment:
    """`base` with the evaluation view, precision and batch that the stored model was evaluated with."""
    view = {path: value for path, value in stored.options.items() if path.startswith(VIEW)}
    try:
        return override(base, view, ranges=False)
    except ValueError as error:
        raise ValueError(f"options that are stored with the model: {error}; its file was changed") from error


@dataclass(frozen=True)
class Task:
    """A model, the images and the measures of one evaluation; every actor receives it."""

    uri: str
    """URI of one fixed version of the model, so that every actor loads the same; "" where `stored` is given."""
    tracking_uri: str
    identity: str
    """A string that tells this model from every other: see `identify`."""
    manifest: Manifest
    experiment: Experiment
    """Experiment whose evaluation view, precision and batch hold."""
    measures: Measures
    """The measures to count, and the outputs of the network that the truth takes the place of."""
    stored: Stored | None = None
    """The model itself where it lies in no file (two that were merged, say): actors receive it in place of loading."""
    class_map: ClassMap | None = None
    """Applied to the model's predictions before anything is counted or written."""
    mapping: ClassMapping | None = None
    """`class_map` in the indices of the model's classes; None until the model is loaded."""
    cache: str = ""
    """Folder for copies of the images in the classes of the model's own class map; "" = never map them."""


def ask(
    uri: str,
    manifest: Manifest,
    base: Experiment,
    tracking_uri: str = "",
    measures: Measures | None = None,
    class_map: ClassMap | None = None,
    cache: str = "",
) -> Task:
    """A task whose model is not loaded yet: with the options of `base` in place of the model's own, see `resolved`.

    Args:
        class_map: makes the data's classes of the model's.
        cache: where the images go in the classes of the class map that the model was trained under, where they have
            others; "" = they are refused.

    Raises:
        ValueError: nothing is there.
    """
    fixed, identity = identify(uri, tracking_uri)
    measures = measures or Measures(boundary=True, instances=True, losses=False)
    return Task(fixed, tracking_uri, identity, manifest, base, measures, class_map=class_map, cache=cache)


def resolved(asked: Task) -> Task:
    """The task with the options that its model was evaluated with while it was trained.

    Raises:
        ValueError: it is no model of this project, or the classes of model and data differ.
    """
    stored = stored_of(asked)
    manifest = asked.manifest
    if asked.class_map is None:
        manifest = in_classes_of(stored, manifest, asked.cache)
    data, mapping = manifest.categories, None
    if asked.class_map is not None:
        mapping = mapping_of(asked.class_map, stored.model.categories, data)
    try:
        check_categories(stored.model.categories if mapping is None else data, data)
    except ValueError as error:
        raise ValueError(
            f"{error}. To evaluate it all the same, bring both to one list of classes: --map-prediction FILE for the "
            "model's, --data.class-map FILE for the data's"
        ) from error
    return replace(asked, manifest=manifest, experiment=options_of(stored, asked.experiment), mapping=mapping)


def in_classes_of(stored: Stored, manifest: Manifest, cache: storage.Uri) -> Manifest:
    """Images in the classes of the model's own class map, where they have others.

    Args:
        stored: the model.
        manifest: the images.
        cache: where a copy of them goes; "" = they stay as they are.

    Raises:
        ValueError: the map does not tell what becomes of their classes.
    """
    own, data = stored.model.categories, manifest.categories
    if (own.names, own.is_thing) == (data.names, data.is_thing) or not cache or not stored.class_map:
        return manifest
    mapped = with_recorded_map(manifest.whole, stored.class_map, cache).part(manifest.chosen)
    logger.info("%s in the classes of the class map that the model was trained under: %s", manifest.uri, mapped.uri)
    return mapped


def assign(
    uri: str, manifest: Manifest, base: Experiment, tracking_uri: str = "", measures: Measures | None = None
) -> Task:
    """The task of evaluating a stored model as its training did.

    Raises:
        ValueError: nothing is there, or the classes of model and data differ.
    """
    return resolved(ask(uri, manifest, base, tracking_uri, measures))


def assign_stored(
    stored: Stored, manifest: Manifest, experiment: Experiment, measures: Measures, name: str = "checkpoint"
) -> Task:
    """The task of evaluating a model that is in memory, under the options given.

    Args:
        name: of the model, for the error.

    Raises:
        ValueError: the classes of model and data differ.
    """
    check_categories(stored.model.categories, manifest.categories, name)
    return Task("", "", "", manifest, experiment, measures, stored)


def assign_images(
    uri: str,
    manifest: Manifest | None,
    base: Experiment,
    tracking_uri: str = "",
    class_map: ClassMap | None = None,
) -> Task:
    """The task of predicting images, of a split (whose categories may be others) or of none.

    Args:
        class_map: on the model's classes; its result's classes are those of the files.

    Raises:
        ValueError: nothing is there, or the map does not fit the model's classes.
    """
    fixed, identity = identify(uri, tracking_uri)
    stored = _load_once(fixed, tracking_uri, identity)
    images = manifest or _empty_manifest(stored)
    mapping = None if class_map is None else mapping_of(class_map, stored.model.categories, None)
    options = options_of(stored, base)
    return Task(fixed, tracking_uri, identity, images, options, Measures(), class_map=class_map, mapping=mapping)


def _empty_manifest(stored: Stored) -> Manifest:
    """A split without images, of the model's classes."""
    categories = stored.model.categories
    empty = (0,) * len(categories)
    return Manifest(0, "", 0, "", categories, (), "", 0, 0, empty, 0, 0, 0, (), 0, {})


def identify(uri: str, tracking_uri: str = "") -> tuple[str, str]:
    """The URI of one fixed version, and its identity: name and version in the registry, or the content of the file.

    Raises:
        ValueError: nothing is there.
    """
    if uri.startswith(REGISTRY):
        from pipelines.tracking import registry

        fixed = registry.pin(uri, tracking_uri)
        return fixed, fixed
    file = storage.absolute(checkpoint_file(uri))
    # each machine has a published model in a cache of its own
    fixed = uri if uri.startswith(hub.PREFIX) else file
    return fixed, "sha256:" + hashlib.sha256(storage.read_bytes(file)).hexdigest()


@dataclass(frozen=True)
class EvaluatedTask:
    """A task with its figures."""

    task: Task
    evaluation: Evaluation
    tally: Tally
    """The counts, image by image."""
    device: str = ""
    """Device on which the network ran."""


@dataclass(frozen=True)
class Chunk:
    """A part of a task: an item of work for an actor."""

    task: int
    """Index of the task."""
    rows: range

    def __str__(self) -> str:
        return f"row {self.rows[0]}" if len(self.rows) == 1 else f"rows {self.rows[0]} to {self.rows[-1]}"


@dataclass(frozen=True)
class _Part:
    """The counts of one chunk, by one actor."""

    task: int
    tally: Tally
    device: str
    begin: float
    """Seconds of the clock that all machines share."""
    end: float


class _Counted:
    """The parts of a task that are there, added up: a part's own table of pixels is larger than its images' counts."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.devices: set[str] = set()
        self.begin, self.end = float("inf"), float("-inf")

    def add(self, part: _Part) -> None:
        self.tally.add(part.tally)
        self.devices.add(part.device)
        self.begin, self.end = min(self.begin, part.begin), max(self.end, part.end)


def evaluate(task: Task, pool: Pool) -> EvaluatedTask:
    """Every image of the split exactly once.

    Raises:
        ValueError: the split is empty, or images kill every actor.
    """
    (evaluated,) = evaluate_all([task], pool)
    return evaluated


def evaluate_all(tasks: Sequence[Task], pool: Pool) -> Iterator[EvaluatedTask]:
    """Every image of each task exactly once, by one pool of actors; the tasks in their order, each when it is done.

    Raises:
        ValueError: a split is empty, or images kill every actor.
    """
    chunks = [chunk for number, task in enumerate(tasks) for chunk in _chunks(number, task)]
    counted = [_Counted() for _ in tasks]
    done = 0
    for part in _log_progress(_name_images(each(counter, (tuple(tasks),), chunks, pool), tasks), tasks):
        counted[part.task].add(part)
        while done < len(tasks) and len(counted[done].tally.images) == tasks[done].manifest.rows:
            yield _summarised(tasks[done], counted[done])
            counted[done] = _Counted()  # whoever took the figures decides how long the counts are kept
            done += 1
    for number in range(done, len(tasks)):  # without images, or with images that got lost
        yield _summarised(tasks[number], counted[number])


def _chunks(number: int, task: Task) -> Iterator[Chunk]:
    """The windows of a task's rows (the last one may be smaller), of which batches are always the same."""
    rows = task.manifest.rows
    window = evaluation_window(rows, task.experiment.train.validation_batch)
    for first in range(0, rows, window):
        yield Chunk(number, range(first, min(first + window, rows)))


def _summarised(task: Task, counted: _Counted) -> EvaluatedTask:
    """The figures of all parts of a task.

    Raises:
        ValueError: the split is empty.
        RuntimeError: an image is in no part.
    """
    tally, rows = counted.tally, task.manifest.rows
    missing = sorted(set(range(rows)) - tally.images.keys())
    if missing:
        raise RuntimeError(f"{len(missing)} images were not evaluated, the rows {missing[:10]} among them")
    evaluation = summarise([tally], task.manifest.categories)
    timings = {**evaluation.timings, "images_per_second": rows / max(counted.end - counted.begin, 1e-9)}
    return EvaluatedTask(task, replace(evaluation, timings=timings), tally, "; ".join(sorted(counted.devices)))


def counter(tasks: Sequence[Task]) -> Callable[[Chunk], _Part]:
    """The function of an actor: it counts chunks. The first task's model is loaded at once, others when they come."""
    placed(tasks[0])

    def count(chunk: Chunk) -> _Part:
        task = tasks[chunk.task]
        model, begin = placed(task), time.time()
        tally = evaluate_share(model, task.manifest, task.experiment, task.measures, rows=chunk.rows)
        return _Part(chunk.task, tally, device_of(model), begin, time.time())

    return count


def device_of(model: PanopticModel) -> str:
    """The device that a model runs on, for people."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"


def stored_of(task: Task) -> Stored:
    """The task's model, loaded once a process, where it was loaded or where `placed` put it."""
    return task.stored or _load_once(task.uri, task.tracking_uri, task.identity)


def classes_of(task: Task) -> Categories:
    """The classes of the task's predictions."""
    return stored_of(task).model.categories if task.mapping is None else task.mapping.categories


def placed(task: Task) -> PanopticModel:
    """The task's model in evaluation mode, on the GPU where there is one; its predictions are mapped where they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = prepare(stored_of(task).model, device, task.experiment.engine).eval()
    return model if task.mapping is None else MappedModel(model, task.mapping)


@lru_cache(maxsize=2)
def _load_once(uri: str, tracking_uri: str, identity: str) -> Stored:
    """A model, loaded once a process; `identity` makes another content under the same name load anew."""
    return load(uri, tracking_uri)


def _name_images(parts: Iterator[_Part], tasks: Sequence[Task]) -> Iterator[_Part]:
    """The parts as they come; an error about rows gets the names of their images."""
    try:
        yield from parts
    except Killed as error:
        if error.item is None:
            raise
        manifest = tasks[error.item.task].manifest
        listed = list_images(manifest.shard_set)
        names = [listed[row][0] for row in manifest.stored_rows(error.item.rows)]
        raise ValueError(f"one of {len(names)} images, {', '.join(names)}: {error}") from error


def _log_progress(parts: Iterator[_Part], tasks: Sequence[Task]) -> Iterator[_Part]:
    """The parts as they come; a bar, or a line every ten seconds, shows the progress and the time that is left."""
    with progress("evaluated", sum(task.manifest.rows for task in tasks)) as state:
        for part in parts:
            state.advance(len(part.tally.images))
            yield part
