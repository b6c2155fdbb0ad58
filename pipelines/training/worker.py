"""The worker of a training: build its state, resume it, train.

A step is `panoptic.training.step.train_step` on this worker's part of the global batch. Between steps every worker
takes part in validations (`validation.validate`: each evaluates its share, rank 0 records the figures of all) and in
checkpoints (`writer.Writer`: rank 0 writes, Ray Train commits), which `watch.Watch` calls for between validations.
Nothing else is reported to Ray Train, which throttles reports.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from panoptic.backbones import imagenet
from panoptic.backbones.weights import load_weights
from panoptic.convert import read_checkpoint
from panoptic.layers.norm import synchronise_norms
from panoptic.models.base import PanopticModel
from panoptic.training.compiling import CompiledGraphs, compile_network
from panoptic.training.device import precision_note, prepare, seed_torch
from panoptic.training.freezing import freeze_parameters, refuse_frozen, training_mode
from panoptic.training.frozen_backbone import backbone_digest
from panoptic.training.optim import build_ema, build_optimiser, scaled_learning_rate
from panoptic.training.recomputing import recompute_blocks
from panoptic.training.step import BrokenSteps, Meter, SkipCounter, train_step
from panoptic.training.transfer import load_for_finetune
from pipelines.cluster import gauges, session, storage
from pipelines.cluster.masking import mask_output
from pipelines.config import Experiment, Train
from pipelines.data.feature_maps import BACKBONE, FEATURES
from pipelines.data.loader import Feed
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import Stream
from pipelines.tracking.tracker import Tracker
from pipelines.training import machine
from pipelines.training.broken import Recent, kept
from pipelines.training.checkpoints import CHECKPOINT, load_checkpoint, resume, transfer
from pipelines.training.fitting import fitting_step, try_largest
from pipelines.training.peak_memory import peak_line, peak_mib, reset_peak
from pipelines.training.sharing import accumulation
from pipelines.training.state import Job, State, last_step
from pipelines.training.status import note_start
from pipelines.training.validation import show_beginning, validate
from pipelines.training.watch import Watch
from pipelines.training.writer import Writer

logger = logging.getLogger(__name__)


def loop(job: Job) -> str:
    """The function that Ray Train runs on each worker; returns the reason of a stop before the last step, else ""."""
    import ray.train

    session.data_context()
    mask_output()
    _silence()
    with session.printing_to(job.local_folder if job.quiet else ""):
        context = ray.train.get_context()
        state = build_state(job, context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
        last = ray.train.get_checkpoint()
        if last is not None:
            with _files_of(last) as folder:
                resume(state, folder / CHECKPOINT)
        elif job.begin:
            transfer(state, job.begin)
        if job.features is not None:
            check_features(state.model, job.features)
        if state.rank == 0:
            _note_start(state)
        return train(state)


@contextmanager
def _files_of(checkpoint: Any) -> Iterator[Path]:
    """The folder of a checkpoint of Ray Train; of one on S3 a copy of this worker's own.

    Ray's `as_directory` shares a copy between the workers of a machine, and was seen to remove it while one still read.
    """
    if checkpoint.filesystem.type_name == "local":
        yield Path(checkpoint.path)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.to_directory(folder)
        yield Path(folder)


def _note_start(state: State) -> None:
    """Write down that the workers begin here, for `jobs/status.py`; a store that errs does not keep them from it."""
    try:
        note_start(state.job.folder, state.step)
    except OSError as error:
        logger.warning("%s: this start is not written down (%s)", state.job.folder, error)


def build_state(job: Job, rank: int = 0, world: int = 1, on_machine: int = 1) -> State:
    """Model, optimiser and average of one worker, at step 0.

    Args:
        rank, world: this worker's number, and how many there are.
        on_machine: workers on this machine, which share its cores.

    Raises:
        ValueError: weights do not fit, a pattern of `train.freeze` matches nothing, or what it froze has no weights.
    """
    experiment, options = job.experiment, job.experiment.train
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // on_machine))
    torch.use_deterministic_algorithms(options.deterministic)
    seed_torch(options.seed, 0, 0, 0)
    device = _device(job.gpu)
    model: PanopticModel = prepare(experiment.model.build(job.train.categories), device, experiment.engine)
    fresh = load_initial_weights(model, experiment, rank)
    if experiment.engine.activation_checkpointing:
        recompute_blocks(model)
    frozen = freeze_parameters(model, options.freeze)
    refuse_frozen(model, fresh)
    if frozen and rank == 0:
        _say(f"train.freeze: {len(frozen)} tensors are frozen, {frozen[0]} to {frozen[-1]}")
    if options.sync_bn and job.gpu:
        model = synchronise_norms(model)
    elif options.sync_bn:
        logger.warning("train.sync_bn: batch norm is not shared over workers on CPU; each normalises its own images")
    return State(
        job=job,
        rank=rank,
        world=world,
        device=device,
        model=model,
        optimiser=build_optimiser(model, experiment.optim),
        ema=build_ema(model, experiment.optim.ema),
        accumulation=accumulation(options, world),
        tracker=Tracker(job.run, job.folder) if rank == 0 else None,
    )


def load_initial_weights(model: PanopticModel, experiment: Experiment, rank: int) -> list[str]:
    """Load the weights that a new run starts from; the names of the tensors that they leave fresh."""
    fresh: list[str] = []
    backbone, start = experiment.model.backbone.weights, experiment.train.weights
    if backbone not in ("none", *imagenet.NAMES):
        weights = read_checkpoint(io.BytesIO(storage.read_bytes(backbone)))
        lacking = load_weights(model.get_submodule("backbone"), weights)
        fresh = [f"backbone.{name}" for name in lacking]
        if lacking and rank == 0:
            _say(f"backbone.weights: {backbone} has nothing for these, so fresh: {', '.join(lacking)}")
    if start:
        loaded = load_for_finetune(model, load_checkpoint(start))
        fresh = list(loaded.fresh)
        if rank == 0 and (line := loaded.tell(start, len(model.categories))):
            _say(line)
    return fresh


def check_features(model: PanopticModel, features: Manifest) -> None:
    """Refuse features that another backbone made than the model's, which is about to train on them.

    Raises:
        ValueError: names their folder and the remedy.
    """
    made, own = features.source[FEATURES][BACKBONE], backbone_digest(model)
    if made != own:
        raise ValueError(
            f"{features.uri}: these features come of another backbone ({made[:16]}, not {own[:16]}); begin a new run, "
            "or train from images with --data.cache-features no"
        )


def train(state: State) -> str:
    """Every step that is left, with validations and checkpoints between them.

    Returns:
        the reason of a stop before the last step, after a checkpoint; "" at the last step.
    """
    experiment, options = state.experiment, state.experiment.train
    first, last = state.step, last_step(options)
    if first >= last:
        return ""
    begin = time.monotonic()
    if state.tracker is not None and (table := machine.describe(state)):
        _say(table)
        state.tracker.text("summary.txt", table)
    show_beginning(state)
    set_training_mode(state.model, options)
    parts, told = try_largest(state)
    if told:
        reset_peak(state.device)
        if state.tracker is not None:
            _say(told)
    if state.tracker is not None and (note := state.model.training_note(options.steps)):
        _say(note)
    if state.tracker is not None and (note := precision_note(state.device, experiment.engine)):
        _say(note)
    model = wrapped(state)
    rate = scaled_learning_rate(experiment.optim, options.batch)
    meter, health, graphs = Meter(), SkipCounter(), CompiledGraphs()
    writer = Writer(state)
    stream, pin = stream_of(state), state.device.type == "cuda"
    features, machinery = state.job.features, experiment.feed
    if features is not None:  # there is nothing to decode
        machinery = replace(machinery, decode="collate")
    feed = Feed(features or state.job.train, stream, experiment.augment, machinery, state.model.divisor, pin=pin)
    with feed, Watch(state, writer) as watch:
        batches = Recent(iter(feed), state.accumulation, parts)
        try:
            while state.step < last:
                step = partial(
                    train_step,
                    model,
                    state.optimiser,
                    batches,
                    step=state.step,
                    total=options.steps,
                    optim=experiment.optim,
                    engine=experiment.engine,
                    health=health,
                    ema=state.ema,
                    seed=options.seed,
                    rank=state.rank,
                    lr=rate,
                )
                result = fitting_step(step, batches, state)
                state.step, state.position = state.step + 1, feed.position
                meter.add(result)
                if state.step == first + 1:  # it waits for workers and data to start, so it says nothing about speed
                    meter.forget_times()
                    if state.tracker is not None:
                        _say(f"memory of this worker after its first step: at most {peak_line(state.device)}")
                if state.step % options.log_every == 0 or state.step == last:
                    usage = machine.usage(state.device, meter.split())
                    values = meter.read() | ({"compiled_graphs": graphs.new()} if options.compile else {})
                    log(state, values, health, usage)
                if state.step % options.validate_every == 0 or state.step == last:
                    # the last validation is not left: the training would be at its end and have no figures
                    evaluation = validate(state, watch.interrupts if state.step < last else None)
                    writer.save(evaluation)
                    if evaluation is None:
                        break
                    if state.tracker is not None:
                        gauges.publish({"panoptic_pq": evaluation.quality.all.pq}, run=experiment.name)
                    set_training_mode(model, options)
                asked = watch.asks(state.step)
                if asked and state.step != writer.saved:
                    writer.save()
                if asked == "stop":
                    break
            health.settle(experiment.engine.max_skipped)
        except BrokenSteps as error:
            raise kept(error, state, batches, first) from error
    if state.tracker is not None:
        _say(f"training waited {writer.waited:.1f} s of {time.monotonic() - begin:.0f} s for checkpoints")
        state.tracker.close()
    return "" if state.step >= last else watch.reason


def wrapped(state: State) -> nn.Module:
    """The model as it trains: compiled where the options say so, and in DDP where there are several workers."""
    if state.experiment.train.compile:
        compile_network(state.model)
    if state.world == 1:
        return state.model
    devices = [state.device] if state.device.type == "cuda" else None
    return DistributedDataParallel(state.model, device_ids=devices, gradient_as_bucket_view=True)


def set_training_mode(model: nn.Module, options: Train) -> None:
    """Training mode but for the parts that are frozen as a whole, by `train.freeze` or the backbone's own option."""
    training_mode(model, options.frozen_dropout)


def stream_of(state: State) -> Stream:
    """This worker's part of the training stream, from the state's position to the last step."""
    experiment, options = state.experiment, state.experiment.train
    return Stream(
        seed=options.seed,
        rows=state.job.train.rows,
        batch=options.batch,
        steps=last_step(options) - state.step,
        start=state.position,
        world=state.world,
        rank=state.rank,
        accumulation=state.accumulation,
        limit=experiment.data.limit,
        limit_seed=experiment.data.limit_seed,
        copies=1 + experiment.augment.doubled,
        window=experiment.data.window,
        repeats=state.job.repeats,
    )


def log(state: State, values: dict[str, float], health: SkipCounter, usage: Mapping[str, float]) -> None:
    """Means since the last call: into the MLflow run, and as a line on the console. Rank 0 alone does it."""
    if state.tracker is None:
        return
    values = {**values, "memory_mib": peak_mib(state.device), "skipped_steps": health.skipped}
    state.tracker.metrics(state.step, {f"train/{name}": value for name, value in values.items()} | dict(usage))
    gauges.publish(progress_gauges(state.step, last_step(state.experiment.train), values), run=state.experiment.name)
    _say(console_line(state.step, last_step(state.experiment.train), values))


def progress_gauges(step: int, last: int, values: Mapping[str, float]) -> dict[str, float]:
    """The values of a log line, under the names of `gauges.TRAINING`."""
    names = {
        "panoptic_images_per_second": "images_per_second",
        "panoptic_step_seconds": "step_seconds",
        "panoptic_data_wait_ratio": "data_wait",
        "panoptic_loss": "loss/total",
        "panoptic_skipped_steps": "skipped_steps",
    }
    told = {name: values[key] for name, key in names.items() if key in values}
    steps = {"panoptic_step": step, "panoptic_steps": last, "panoptic_memory_bytes": values["memory_mib"] * 2**20}
    return {**steps, **told, "panoptic_progress_timestamp_seconds": time.time()}


def console_line(step: int, last: int, values: dict[str, float]) -> str:
    """One line of progress: step, losses, learning rate, speed, wait for data, memory, time left."""
    losses = " ".join(f"{n.removeprefix('loss/')} {v:.3f}" for n, v in values.items() if n.startswith("loss/"))
    parts = [f"step {step}/{last}", losses or "every step skipped", f"lr {values['lr']:.2e}"]
    if "images_per_second" in values:
        left = int((last - step) * values["step_seconds"])
        parts += [
            f"{values['images_per_second']:.1f} images/s",
            f"data wait {100 * values['data_wait']:.0f} %",
            f"{values['memory_mib']:.0f} MiB",
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
        ]
    if values.get("compiled_graphs"):
        parts.append(f"{values['compiled_graphs']:.0f} graphs compiled")
    if values["skipped_steps"]:
        parts.append(f"{values['skipped_steps']:.0f} steps skipped")
    return " | ".join(parts)


def _silence() -> None:
    """Leave out what Ray Train prints at every report, and lines that mean nothing here."""
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where each client has its credentials from
    for name in list(logging.root.manager.loggerDict):  # the one that prints every report is named by its file
        if name.startswith("ray.train") or f"{os.sep}ray{os.sep}train{os.sep}" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
    # Gradients of 1x1 convolutions in channels-last lie in memory as the buckets do, whatever their strides say.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")


def _device(gpu: bool) -> torch.device:
    if not gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    return device[0] if isinstance(device, list) else device


def _say(text: str) -> None:
    print(text, flush=True)
