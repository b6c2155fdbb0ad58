"""The driver of a training: it prepares shards, opens the MLflow run, runs Ray Train and logs the best model.

A run has a name. Started again under that name it continues from its last checkpoint, wherever it was
stopped; `run.json` in its folder says which MLflow run it belongs to and with which options it began.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from panoptic.backbones import imagenet
from panoptic.convert import hub
from panoptic.png import encode_image
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import build_model
from pipelines.cluster import lease, session, storage
from pipelines.cluster.masking import masked, masked_values
from pipelines.cluster.shared import check_shared
from pipelines.config import UNVALIDATED, Experiment, Train, check_run_name, flatten, least_workers
from pipelines.data.balance import class_presence, repeat_factors
from pipelines.data.class_map import ClassesOf, load, resolve
from pipelines.data.classes import with_equal_classes
from pipelines.data.copies import KEY, Copies, check_copies
from pipelines.data.duplicates import warn_of_shared
from pipelines.data.join import Roots
from pipelines.data.manifest import SCHEMA_VERSION, Manifest, former_manifest, is_shards
from pipelines.data.prepare import ensure_shards
from pipelines.data.sampler import Repeats, chosen_rows, limited
from pipelines.tracking import client as client_module
from pipelines.tracking import runs
from pipelines.tracking.client import sqlite_file
from pipelines.tracking.tracker import deliver, enumerate_briefly
from pipelines.training.attempts import repeat
from pipelines.training.cached_features import cached_features
from pipelines.training.checkpoints import REPORT, SNAPSHOT, drop_torn, load_checkpoint, mend_snapshot, read_metrics
from pipelines.training.early_end import stop_at_once, told_in_a_line
from pipelines.training.notice import catch_sigterm
from pipelines.training.pages import data_set, fill_pages, version_tags
from pipelines.training.pixels import follow_weights
from pipelines.training.preflight import (
    STAND_IN,
    check_cluster,
    check_continuation,
    check_disk,
    check_machine,
    check_model,
    check_options,
    local_cpus,
    meta_model,
    worker_cpus,
)
from pipelines.training.record import RECORD, read_record
from pipelines.training.state import Job, last_step
from pipelines.training.validation import pictures
from pipelines.training.worker import loop

logger = logging.getLogger(__name__)

MODEL_TAG = "panoptic.model"
"""Tag of a run that holds the URI of its logged model."""

CHECKPOINT_TAG = "panoptic.model_checkpoint"
"""Tag of a run that holds the URI of the checkpoint in its logged model."""


@dataclass(frozen=True)
class Outcome:
    """The results of a training, in its storage and in MLflow."""

    name: str
    run: runs.Run
    folder: str
    """The run's folder, with its checkpoints."""
    checkpoint: str
    """URI of the best checkpoint's folder."""
    metrics: dict[str, float]
    """The best checkpoint's validation."""
    report: str
    """The best checkpoint's validation as a text table."""
    overlays: str
    """Folder of pictures: image, truth and prediction of a few validation images."""
    model: str
    """MLflow URI of the logged model, "" if there is none."""
    train: Manifest
    val: Manifest
    no_model: str = ""
    """Why there is no model."""
    undelivered: tuple[str, ...] = ()
    """Records that MLflow lacks; the same command again sends them."""
    registered: str = ""
    """URI of the model's version in the registry, or why it has none though it was asked for."""


@dataclass(frozen=True)
class Child:
    """A run that is one trial of a sweep: what it has beside its experiment."""

    parent: str
    """MLflow run id of the sweep."""
    label: str
    """Name of its MLflow run: the options in which it differs from the others."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Options logged as its parameters; the others stand in its config.json alone, so that a comparison shows only
    what differs."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of its MLflow run."""
    run_id: str = ""
    """MLflow run that it continues, where an earlier part of the trial has opened one."""
    begin: str = ""
    """URI of a checkpoint whose training it continues: weights, optimiser, step, position in the data."""
    callbacks: tuple[Any, ...] = ()
    """Callbacks of Ray Train, which run in its controller."""


def train(experiment: Experiment, preset: str, child: Child | None = None) -> Outcome:
    """Prepare, train, evaluate and track one experiment.

    Args:
        experiment: parsed options.
        preset: its name, which begins the run's where the experiment has none.
        child: given where the run is a trial of a sweep; its model is not logged, since the sweep logs the best one.

    Raises:
        ValueError: options, data or cluster cannot work; nothing has been started then.
        DiskFull: the disk of the storage is full, or too small for what is kept.
        storage.Unavailable: S3 was away for longer than it is waited for; the same command goes on.
        lease.Busy: another process trains under this name.
        FailedRun: workers, controller or machines failed more than `train.max_failures` times. The run is marked
            FAILED and can be continued under its name.
    """
    experiment, _ = checked(named(experiment, preset), trial=child is not None, told=child is None)
    check_machine(experiment)
    folder = storage.join(storage.absolute(experiment.storage), experiment.name)
    # the trials of a sweep are Tune's to start and to end
    with (
        nullcontext()
        if child is not None
        else occupied(storage.join(folder, "lease"), f"the run {experiment.name}") as occupy
    ):
        session.connect(local_cpus(experiment))
        if occupy is not None:
            occupy()
        gpu = check_cluster(experiment)
        if child is None:
            check_places(experiment)
        train_set, val_set = prepare_data(experiment)
        features = cached_features(experiment, train_set, "" if child is None else child.begin)
        with session.sigterm_raises():
            logger.info("opening the run in MLflow")
            run = _open_run(experiment, preset, child, folder, train_set, val_set)
            with runs.ending(run):
                begin, quiet = ("", False) if child is None else (child.begin, True)
                key = f"{run.run_id}-{uuid.uuid4().hex[:8]}"
                repeats = repeats_of(experiment, train_set)
                own = with_absolute_weights(experiment)
                job = Job(own, train_set, val_set, run, folder, gpu, begin, quiet, repeats, key, features)
                for name in drop_torn(folder):
                    logger.warning("%s: removed, since its writing did not finish", storage.join(folder, name))
                if mend_snapshot(folder, experiment.train):
                    logger.warning("%s: the list of checkpoints is written anew", storage.join(folder, SNAPSHOT))
                result = _fit_or_tell(job, () if child is None else child.callbacks)
                return _conclude(job, result, log_model=child is None)


def checked(experiment: Experiment, trial: bool = False, told: bool = False) -> tuple[Experiment, Categories]:
    """Check all that can be checked before Ray is there.

    Args:
        experiment: with a name.
        trial: of a sweep, which has a store that answers, and records of its own.
        told: print a line that says what begins.

    Returns:
        the experiment as it trains (its pixels follow its weights), and the classes of its data: two that stand in for
        those of scenes that are not drawn yet.

    Raises:
        ValueError: options or data cannot work, or a run of this name began with other ones.
        DiskFull: the disk of the storage is full, or too small for what is kept.
        ConnectionError: the tracking store does not answer.
    """
    check_options(experiment)
    if told:
        print(first_line(experiment), flush=True)
    experiment, pixels = follow_weights(experiment)
    if pixels:
        print(pixels, flush=True)
    storage.check_lasting(experiment.storage, "--storage")
    if experiment.data.root != "scenes":
        logger.info("reading the classes of %s", masked(str(experiment.data.root)))
    categories = data_categories(experiment) or STAND_IN
    check_model(experiment, categories)
    check_disk(experiment, categories)
    runs.check_store(experiment.tracking, local_root(experiment), experiment.storage)
    if trial:
        return experiment, categories
    runs.check_answers(experiment.tracking, local_root(experiment))
    if before := read_record(storage.join(storage.absolute(experiment.storage), experiment.name)):
        check_continuation(before, _stored_options(experiment), {}, experiment.name)
    return experiment, categories


def first_line(experiment: Experiment) -> str:
    """A line on the training that begins: name, data, model and its size, device, places."""
    options, data = experiment.train, experiment.data.root
    model = type(experiment.model).__name__.removesuffix("Config")
    size = sum(parameter.numel() for parameter in meta_model(experiment).parameters()) / 1e6
    where = "the Ray cluster" if os.environ.get("RAY_ADDRESS") else _device(options)
    plural = "s" * (options.workers > 1)
    return (
        f"run {experiment.name}: {model} of {size:.1f} M parameters, {last_step(options):,} steps of {options.batch} "
        f"images of {masked(data if isinstance(data, str) else ' + '.join(data))}, {options.workers} worker{plural} on "
        f"{where}; folder {masked(storage.join(storage.absolute(experiment.storage), experiment.name))}; "
        f"MLflow {masked(runs.resolve_uri(experiment.tracking, local_root(experiment)))}"
    )


def _device(options: Train) -> str:
    import torch

    gpus = torch.cuda.device_count() if options.gpu != "no" else 0
    if gpus < least_workers(options.workers):
        return f"{os.cpu_count()} CPU cores"
    return f"{gpus} x {torch.cuda.get_device_name()}"


def _fit_or_tell(job: Job, callbacks: Any) -> Any:
    """The result of Ray Train; a full disk and a store that is away, which it wraps, are told in one line.

    Raises:
        DiskFull: the disk of the storage is full.
        storage.Unavailable: S3 was away for longer than it is waited for.
    """
    try:
        return repeat(lambda attempt: _fit(attempt, callbacks), job)
    except Exception as error:  # of Ray Train, whose classes are imported with it
        told = told_in_a_line(error, job.folder)
        if told is None:
            raise
        if isinstance(told, storage.Unavailable):
            told = storage.Unavailable(f"{told}. When the store is back, the same command goes on")
        raise told from error


@contextmanager
def occupied(place: str, what: str) -> Iterator[Callable[[], None]]:
    """Hold the folder of a run or a sweep, since two drivers would delete each other's checkpoints.

    What an earlier driver that was killed on this machine has left of its local Ray session is ended first. Yields
    what is to be called once this driver's own session has started, so that the next one finds it.

    Args:
        place: folder of its lease.
        what: the run or sweep, for messages.

    Raises:
        lease.Busy: another process works in it; the message says which.
    """
    before = lease.last(place)
    with lease.hold(place, what) as held:
        if lease.is_gone(before) and (ended := session.end_leftovers(before.get("session", ""))):
            logger.info("ended %d processes that an earlier start of %s had left", ended, what)

        def note() -> None:
            held.about["session"] = session.own_folder()
            held.renew()

        yield note


def with_absolute_weights(experiment: Experiment) -> Experiment:
    """The experiment with paths of weights that mean the same in every process, whatever its working directory."""
    backbone, train = experiment.model.backbone, experiment.train
    if backbone.weights not in ("none", *imagenet.NAMES):
        backbone = replace(backbone, weights=storage.absolute(backbone.weights))
    if train.weights and not train.weights.startswith(hub.PREFIX):
        train = replace(train, weights=storage.absolute(train.weights))
    return replace(experiment, model=replace(experiment.model, backbone=backbone), train=train)


def check_places(experiment: Experiment) -> None:
    """Refuse local paths that not every machine of the cluster sees.

    Raises:
        ValueError: names the option, the path and the machine.
    """
    options, backbone = experiment.train, experiment.model.backbone.weights
    read = {
        "--model.backbone.weights": "" if backbone in ("none", *imagenet.NAMES) else backbone,
        "--train.weights": "" if options.weights.startswith(hub.PREFIX) else options.weights,
    }
    data = experiment.data
    if isinstance(data.root, str) and data.root != "scenes":  # several are looked for where they are prepared
        read["--data.root"] = data.root
    written = {"--storage": experiment.storage, "--data.shards": data.shards}
    if store := sqlite_file(runs.resolve_uri(experiment.tracking, local_root(experiment))):
        written["--tracking.uri"] = str(Path(store).parent)
    check_shared(read, written)


def prepare_data(experiment: Experiment) -> tuple[Manifest, Manifest]:
    """The shards of both splits, drawn and prepared where they are not there yet.

    Raises:
        ValueError: there is no such data, the splits' categories differ, or `data.limit` exceeds the training split or
            `data.limit_val` the validation split.
    """
    data = experiment.data
    _require_root(experiment)
    base = storage.absolute(experiment.storage)
    drawn = data.root == "scenes"
    root, reader = (_draw_scenes(experiment, base), "coco") if drawn else (data.root, data.reader)
    options = None if drawn else data
    cache = data.shards or storage.join(base, "shards")
    copies = Copies(experiment.augment, 0) if experiment.augment.copies else None
    train_set, val_set = (
        ensure_shards(root, s, cache, reader, 0, data.on_invalid, data.class_map, options, copies=c)
        for s, c in ((data.train, copies), (data.val, None))
    )
    check_copies(experiment.augment, train_set.source, train_set.uri)
    warn_of_shared(val_set, train_set)
    train_set, val_set = with_equal_classes(train_set, val_set, data.classes_of, cache)
    if data.limit:
        if KEY in train_set.source:
            raise ValueError("data.limit: would choose among copies, not images; prepare fewer images, or no copies")
        limited(train_set.rows, data.limit, data.limit_seed)
    chosen = chosen_rows(val_set.rows, data.limit_val, 0, data.limit_seed, "data.limit_val")
    return train_set, val_set.part(chosen)


def repeats_of(experiment: Experiment, train_set: Manifest) -> Repeats | None:
    """The number of times that an epoch reads each training image; None where `data.balance` is off."""
    data, rows = experiment.data, train_set.rows
    if not data.balance:
        return None
    cache = data.shards or storage.join(storage.absolute(experiment.storage), "shards")
    chosen = limited(rows, data.limit, data.limit_seed) if data.limit else np.arange(rows)
    repeats = Repeats(repeat_factors(class_presence(train_set, chosen.tolist(), cache), data.balance))
    logger.info("data.balance %g: an epoch reads %d images of %d", data.balance, repeats.size, len(chosen))
    return repeats


def data_categories(experiment: Experiment) -> Categories | None:
    """The classes of the validation split, from its shards' manifest or its annotations; None of drawn scenes.

    Raises:
        ValueError: there is no such data, or no such reader.
    """
    data = experiment.data
    _require_root(experiment)
    if data.root == "scenes":
        return None
    roots = Roots.of(data.root, data.reader, data.class_map, data)
    split = data.val if isinstance(data.val, str) else data.val[0]
    for folder in (storage.join(roots.places[0], split), roots.places[0]) if len(roots.roots) == 1 else ():
        if is_shards(folder):
            former = former_manifest(folder)
            categories = former["categories"] if former else Manifest.load(folder).categories
            if not data.class_map:
                return categories
            return resolve(load(data.class_map), [ClassesOf("", categories)]).mappings[0].categories
    return roots.open(data.val).categories


def _require_root(experiment: Experiment) -> None:
    if not experiment.data.root:
        raise ValueError("data.root: this preset needs data; give a COCO-panoptic folder or shards: --data.root FOLDER")


def named(experiment: Experiment, preset: str) -> Experiment:
    """The experiment under its name; where it has none, under that of its preset and the time."""
    name = experiment.name or f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(experiment, name=check_run_name(name))


def _draw_scenes(experiment: Experiment, base: str) -> str:
    from pipelines.data.scenes import write_scenes

    if "://" in base:
        raise ValueError(
            f"data.root scenes: the scenes are drawn into a local folder, but storage is {base}; set --storage to one"
        )
    scenes = experiment.data.scenes
    root = Path(scenes_folder(experiment))
    if not root.exists():
        logger.info("drawing %d training and %d validation scenes into %s", scenes.train, scenes.val, root)
    return str(write_scenes(root, scenes.train, scenes.val, scenes.seed, workers=os.cpu_count() or 1))


def scenes_folder(experiment: Experiment) -> str:
    """The folder into which the scenes of an experiment are drawn."""
    scenes = experiment.data.scenes
    base = storage.absolute(experiment.storage)
    return storage.join(base, f"scenes-{scenes.train}-{scenes.val}-{scenes.seed}")


def local_root(experiment: Experiment) -> str:
    """The local folder of the run's MLflow store, where it has no other one."""
    return experiment.storage if "://" not in experiment.storage else "runs"


def _open_run(
    experiment: Experiment, preset: str, child: Child | None, folder: str, train_set: Manifest, val_set: Manifest
) -> runs.Run:
    """A new MLflow run, or the one that this name had."""
    flat = _stored_options(experiment)
    hashes = {"train_hash": train_set.hash, "val_hash": val_set.hash}
    record = storage.join(folder, RECORD)
    root = local_root(experiment)
    options = replace(experiment.tracking, name=experiment.name)
    if before := read_record(folder):
        check_continuation(before, flat, hashes, experiment.name)
        return runs.start(options, root, run_id=before["run_id"])
    tags = {"preset": preset, "seed": str(experiment.train.seed), **hashes}
    params, parent, run_id = {**flat, **hashes}, "", ""
    if child is not None:
        options, params, tags = replace(options, name=child.label), dict(child.params), {**tags, **child.tags}
        parent, run_id = child.parent, child.run_id
    data = [data_set(train_set, "train"), data_set(val_set, "val")]
    run = runs.start(options, root, params=params, config=flat, tags=tags, data=data, parent=parent, run_id=run_id)
    content = {"run_id": run.run_id, "preset": preset, "options": flat, "schema_version": SCHEMA_VERSION, **hashes}
    try:
        storage.write_bytes(record, json.dumps(content, indent=1).encode())
    except BaseException:
        runs.finish(run, "FAILED")
        raise
    return run


def _stored_options(experiment: Experiment) -> dict[str, Any]:
    """The options as a run's records keep them: flat, as JSON has them, without passwords."""
    return masked_values(json.loads(json.dumps(flatten(experiment))))


def _fit(job: Job, callbacks: tuple[Any, ...] = ()) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    experiment = job.experiment
    filesystem, path = storage.resolve(experiment.storage)

    def work() -> str:
        return loop(job)

    trainer = TorchTrainer(
        work,  # which holds the job: a configuration is read by the controller too, with every import that takes
        scaling_config=ScalingConfig(
            num_workers=experiment.train.workers,
            use_gpu=job.gpu,
            resources_per_worker={"CPU": worker_cpus(experiment), **({"GPU": 1} if job.gpu else {})},
        ),
        run_config=RunConfig(
            name=experiment.name,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[*callbacks, stop_at_once(), catch_sigterm()],
            logging_config=LoggingConfig(log_level="WARNING"),
            # `repeat` counts them all
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(
                num_to_keep=experiment.train.keep, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    count = experiment.train.workers
    what = f"{count} worker{'s' * (count > 1)} on the {'GPU' if job.gpu else 'CPU'}"
    logger.info("starting %s: each loads the model and its first images", what)
    return trainer.fit()


def _conclude(job: Job, result: Any, log_model: bool) -> Outcome:
    """Pick the best checkpoint, draw its overlays, log its model."""
    experiment = job.experiment
    best = max(result.best_checkpoints, key=lambda entry: (entry[1]["score"], entry[1]["step"]))[0]
    uri = best.path if "://" not in experiment.storage else f"s3://{best.path}"
    metrics = read_metrics(uri)
    finished = _last_step(result) >= experiment.train.steps
    overlays = storage.join(job.folder, "overlays")
    if log_model:
        logger.info("the best checkpoint is %s; drawing its overlays, logging its model", masked(uri))
    record = load_checkpoint(uri)
    shown = experiment.train.overlays if log_model else 0
    try:
        for name, picture in pictures(build_model(record), job.val, experiment, shown):
            storage.write_bytes(storage.join(overlays, f"{name}.png"), encode_image(picture))
    except Exception as error:  # of OpenCV or of the storage; the training is done and goes on to its end
        logger.warning("%s: not all pictures were written (%s)", overlays, masked(error))
    undelivered = deliver(job.run, job.folder)
    model, no_model, registered = "", "the run has not come to its last step", ""
    report = storage.read_bytes(storage.join(uri, REPORT)).decode().rstrip()
    description = f"Best checkpoint, on {job.val.rows} images of {job.val.split}:\n\n```\n{report}\n```"
    if finished and log_model:
        model, no_model = _log_model(job, record, uri, description)
        undelivered += [] if model else ["the model"]
        if model and experiment.tracking.register:
            registered, done = _register(job, model, metrics, uri, description)
            undelivered += [] if done else ["the registered version"]
    if log_model:
        paths = [kept.path for kept, values in result.best_checkpoints if values["score"] > UNVALIDATED]
        kept = paths if "://" not in experiment.storage else [f"s3://{path}" for path in paths]
        undelivered += [] if fill_pages(job, kept, model, record["step"], metrics) else ["models or plots of its pages"]
    if not runs.describe(job.run, description):
        undelivered.append("the run's description and status")
    return Outcome(
        name=experiment.name,
        run=job.run,
        folder=job.folder,
        checkpoint=uri,
        metrics=metrics,
        report=report,
        overlays=overlays,
        model=model,
        train=job.train,
        val=job.val,
        no_model=no_model,
        registered=registered,
        undelivered=tuple(undelivered),
    )


def _last_step(result: Any) -> int:
    """The step of the last checkpoint that Ray Train committed, be it among the best ones or not.

    Ray Train keeps it in the run's folder, so that it is known as well where a finished run is started again.
    """
    return (result.metrics or {}).get("step", 0)


def _log_model(job: Job, record: Mapping[str, Any], checkpoint: str, description: str = "") -> tuple[str, str]:
    """The MLflow URI of the best checkpoint's model; or "" and why there is none (the checkpoint is safe).

    It is logged once: a run that was prolonged and has another best checkpoint since then logs that one's model.
    """
    from pipelines.tracking.model import log_model

    source = masked(checkpoint)
    try:
        client = client_module.reach(job.run.tracking_uri)
        tags = client.get_run(job.run.run_id).data.tags
        if tags.get(MODEL_TAG) and tags.get(CHECKPOINT_TAG) == source:
            return tags[MODEL_TAG], ""
        uri = log_model(job.run, record, job.experiment.resize, description=description)
        client.set_tag(job.run.run_id, MODEL_TAG, uri)
        client.set_tag(job.run.run_id, CHECKPOINT_TAG, source)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise
        return "", client_module.first_line(error)
    return uri, ""


def _register(job: Job, model: str, metrics: Mapping[str, float], checkpoint: str, text: str) -> tuple[str, bool]:
    """The URI of the registered version of a logged model and True; or why there is none, and False."""
    from pipelines.tracking.model import register_model

    names = job.experiment.tracking
    data = data_set(job.val, "val")
    about = {"data": data.name, "data_hash": data.digest, "data_uri": masked(data.source)}
    tags = version_tags(metrics, about, checkpoint)
    try:
        return register_model(
            job.run.tracking_uri, model, names.register, alias=names.alias, description=text, tags=tags
        ), True
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: the model is logged
        return f"not as {names.register}: {client_module.first_line(error)}", False


def closing_lines(outcome: Outcome) -> str:
    """The last lines on the console: the best table, where things lie, what to type next, what MLflow lacks."""
    uri, val, python = outcome.run.tracking_uri, outcome.val, Path(os.path.relpath(sys.executable))
    data = f"--data.root {shlex.quote(val.uri)} --data.split {shlex.quote(val.split)}"
    store = shlex.quote(masked(uri))
    server = store if uri.startswith("http") else f"{python.parent / 'mlflow'} ui --backend-store-uri {store}"
    return "\n".join(
        [
            "",
            f"{outcome.name}: best checkpoint, on {val.rows} images of {val.split}",
            outcome.report,
            "",
            f"shards      {outcome.train.uri} and {val.uri}",
            f"checkpoint  {outcome.checkpoint}",
            f"overlays    {outcome.overlays}",
            f"model       {outcome.model or f'not logged: {outcome.no_model}'}",
            *([f"registered  {outcome.registered}"] if outcome.registered else []),
            f"evaluate    {python} jobs/evaluate.py {shlex.quote(outcome.checkpoint)} {data}",
            f"MLflow      {server}",
            *_warning(outcome),
        ]
    )


def _warning(outcome: Outcome) -> list[str]:
    """A line that names the records that MLflow lacks, and the command that delivers them."""
    if not outcome.undelivered:
        return []
    name = [] if any(a.split("=")[0] == "--name" for a in sys.argv) else ["--name", outcome.name]
    command = shlex.join([os.path.relpath(sys.executable), *sys.argv, *name])
    lacking = enumerate_briefly(outcome.undelivered)
    return [f"WARNING     not in MLflow: {lacking}; the same command again sends it: {command}"]
