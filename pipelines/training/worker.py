"""What one training worker does, from the first step to the last checkpoint.

Order of a validation, on every worker: rank 0's running statistics (or the averaged weights) -> each
worker counts its share -> tallies are gathered -> rank 0 writes checkpoint, report, pictures and
metrics -> Ray Train commits the checkpoint. Ray Train is told nothing in between: it throttles reports.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from panoptic.backbones.weights import load_weights
from panoptic.convert import read_checkpoint
from panoptic.distributed import share_buffers
from panoptic.evaluation.tally import evaluate_batches, summarise
from panoptic.metrics.report import Evaluation, class_rows, class_table, metrics, table
from panoptic.models.base import PanopticModel
from panoptic.training import checkpoint as checkpoints
from panoptic.training import transfer
from panoptic.training.device import prepare, seed_torch
from panoptic.training.freezing import freeze_parameters, refuse_frozen, training_mode
from panoptic.training.optim import build_ema, build_optimiser, scaled_learning_rate
from panoptic.training.step import Meter, SkipCounter, train_step
from panoptic.training.transfer import transfer_training
from pipelines.cluster import session, storage
from pipelines.config import flatten
from pipelines.data.loader import Feed
from pipelines.data.sampler import Stream
from pipelines.tracking.tracker import Tracker
from pipelines.training.checkpoints import CHECKPOINT, METRICS, REPORT, load_checkpoint
from pipelines.training.state import Job, accumulation
from pipelines.training.validation import _gathered, pictures, validation_batches

logger = logging.getLogger(__name__)


def loop(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker; `config["job"]` is a `Job`."""
    import ray.train

    session.data_context()
    for name in list(logging.root.manager.loggerDict):  # the one that prints every report is named by its file
        if name.startswith("ray.train") or f"{os.sep}ray{os.sep}train{os.sep}" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
    # Of 1x1 convolutions, whose channels-last gradients lie in memory as the buckets do, whatever their strides say.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    job = config["job"]
    with session.printing_to(_local(job.folder) if job.quiet else ""):
        context = ray.train.get_context()
        worker = Worker(job, context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
        given = ray.train.get_checkpoint()
        if given is not None:
            with given.as_directory() as folder:
                worker.restore(Path(folder) / CHECKPOINT)
        elif job.begin:
            worker.take_over(job.begin)
        worker.train()


class Worker:
    """The state of one rank."""

    def __init__(self, job: Job, rank: int = 0, world: int = 1, on_machine: int = 1) -> None:
        """Build model, optimiser and average; start from weights where the experiment names some."""
        self.job, self.rank, self.world = job, rank, world
        self.experiment = experiment = job.experiment
        options = experiment.train
        self.device = _device(job.gpu)
        torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // on_machine))
        torch.use_deterministic_algorithms(options.deterministic)
        seed_torch(options.seed, 0, 0, 0)
        self.model: PanopticModel = prepare(
            experiment.model.build(job.train.categories), self.device, experiment.engine
        )
        fresh = self._initial_weights()
        frozen = freeze_parameters(self.model, options.freeze)
        refuse_frozen(self.model, fresh)
        if frozen and rank == 0:
            _say(f"train.freeze: {len(frozen)} tensors are frozen, {frozen[0]} to {frozen[-1]}")
        if options.sync_bn and job.gpu:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[assignment]
        elif options.sync_bn:
            logger.warning(
                "train.sync_bn: batch norm is not shared over workers on CPU; each normalises its own images"
            )
        self.optimiser = build_optimiser(self.model, experiment.optim)
        self.ema = build_ema(self.model, experiment.optim.ema)
        self.step = 0
        self.accumulation = accumulation(options.batch, world, options.micro_batch)
        self.tracker = Tracker(job.run, _local(job.folder)) if rank == 0 else None

    def _initial_weights(self) -> list[str]:
        """Load the weights that the experiment names; what they left fresh."""
        experiment, fresh = self.experiment, []
        backbone = experiment.model.backbone.weights
        if backbone not in ("none", "timm"):
            state = read_checkpoint(io.BytesIO(storage.read_bytes(backbone)))
            lacking = load_weights(self.model.get_submodule("backbone"), state)
            fresh = [f"backbone.{name}" for name in lacking]
            if lacking and self.rank == 0:
                _say(f"backbone.weights: {backbone} has nothing for these, so fresh: {', '.join(lacking)}")
        if experiment.train.weights:
            record = load_checkpoint(experiment.train.weights)
            fresh = transfer.load_for_finetune(self.model, record)
            if fresh and self.rank == 0:
                names = ", ".join(fresh)
                _say(f"starting from {experiment.train.weights}; of other classes or not in it, so fresh: {names}")
        return fresh

    def restore(self, file: Path) -> None:
        """Go on from a checkpoint of this run."""
        record = checkpoints.load(str(file), str(file))
        checkpoints.restore(record, self.model, self.optimiser, self.ema)
        self.step = record["step"]
        if self.rank == 0:
            _say(f"continuing at step {self.step}, position {record['position']}")

    def take_over(self, uri: str) -> None:
        """Go on from a checkpoint of a run with other options: of the optimiser's state what still applies."""
        record = load_checkpoint(uri)
        carried = transfer_training(record, self.model, self.optimiser, self.ema)
        self.step = record["step"]
        if self.tracker is not None:
            self.tracker.rewind(self.step)
        if self.rank == 0:
            _say(f"taking over {uri} at step {self.step}, with the optimiser's state of {carried} tensors")

    def train(self) -> None:
        """Every step that is left, with validations and checkpoints between them."""
        experiment, options = self.experiment, self.experiment.train
        last = min(options.steps, options.stop_after or options.steps)
        if self.step >= last:
            return
        model = self._wrapped()
        rate = scaled_learning_rate(experiment.optim, options.batch)
        meter, health = Meter(), SkipCounter()
        self._training_mode(model)
        with Feed(self.job.train, self._stream(last), experiment.augment, experiment.feed, self.model.divisor) as feed:
            batches = iter(feed)
            for step in range(self.step, last):
                result = train_step(
                    model,
                    self.optimiser,
                    batches,
                    step=step,
                    total=options.steps,
                    optim=experiment.optim,
                    engine=experiment.engine,
                    health=health,
                    accumulation=self.accumulation,
                    ema=self.ema,
                    seed=options.seed,
                    rank=self.rank,
                    lr=rate,
                )
                meter.add(result)
                if step == self.step:  # it waits for workers and data to start, so it says nothing about speed
                    meter.steps = meter.images = 0
                    meter.wait = meter.seconds = 0.0
                if (step + 1) % options.log_every == 0 or step + 1 == last:
                    self._log(step + 1, meter.read(), health, last)
                if (step + 1) % options.validate_every == 0 or step + 1 == last:
                    self._validate(step + 1)
                    self._training_mode(model)
        if self.tracker is not None:
            self.tracker.close()

    def _wrapped(self) -> nn.Module:
        if self.experiment.train.compile:
            self.model.network = torch.compile(self.model.network)  # type: ignore[method-assign]
        if self.world == 1:
            return self.model
        device = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=device, gradient_as_bucket_view=True)

    def _training_mode(self, model: nn.Module) -> None:
        """What the configuration of the model froze trains as the model says."""
        options = self.experiment.train
        training_mode(model, options.frozen_dropout or not options.freeze)

    def _stream(self, last: int) -> Stream:
        options, data = self.experiment.train, self.experiment.data
        return Stream(
            seed=options.seed,
            rows=self.job.train.rows,
            batch=options.batch,
            steps=last - self.step,
            start=self.step * options.batch,
            world=self.world,
            rank=self.rank,
            accumulation=self.accumulation,
            limit=data.limit,
            limit_seed=data.limit_seed,
            copies=1 + self.experiment.augment.doubled,
        )

    def _log(self, step: int, values: dict[str, float], health: SkipCounter, last: int) -> None:
        values["memory_mib"] = _memory(self.device)
        values["skipped_steps"] = health.skipped
        if self.tracker is None:
            return
        self.tracker.metrics(step, {f"train/{name}": value for name, value in values.items()})
        _say(console_line(step, last, values))

    def _validate(self, step: int) -> None:
        import ray.train
        from ray.train import CheckpointConsistencyMode

        begin = time.perf_counter()
        evaluated = self._evaluated()
        categories, experiment = self.job.val.categories, self.experiment
        batches = validation_batches(self.job.val, experiment, evaluated.divisor, self.rank, self.world)
        evaluation = summarise(_gathered(evaluate_batches(evaluated, batches, experiment.engine)), categories)
        values = metrics(evaluation)
        with tempfile.TemporaryDirectory() as folder:
            given = None
            if self.tracker is not None:
                report = f"step {step}\n{table(evaluation)}"
                self._write(Path(folder), step, report, values)
                self._record(step, evaluation, values, evaluated)
                seconds = time.perf_counter() - begin
                _say(f"validation at {report}\nworst classes\n{class_table(evaluation, 5)}\n({seconds:.0f} s)")
                given = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {"score": experiment.train.rank(values), "step": step, **values},
                checkpoint=given,
                checkpoint_dir_name=f"step_{step:06d}",
            )
        # Until the controller has committed it, a crash would restart from the checkpoint before.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def _evaluated(self) -> PanopticModel:
        """The averaged weights where there are any, else the model itself; the same on every worker."""
        model = self.model if self.ema is None else self.ema.module
        share_buffers(model)
        return model.eval()  # type: ignore[return-value]

    def _write(self, folder: Path, step: int, report: str, values: dict[str, float]) -> None:
        checkpoints.save(
            str(folder / CHECKPOINT),
            config=self.experiment.model,
            model=self.model,
            ema=self.ema,
            optimiser=self.optimiser,
            step=step,
            position=step * self.experiment.train.batch,
            run_id=self.job.run.run_id,
            experiment=flatten(self.experiment),
        )
        (folder / REPORT).write_text(report + "\n")
        (folder / METRICS).write_text(json.dumps(values, indent=1))

    def _record(self, step: int, evaluation: Evaluation, values: dict[str, float], evaluated: PanopticModel) -> None:
        tracker = self.tracker
        assert tracker is not None
        tracker.metrics(step, values)
        tracker.flush()
        tracker.table(
            f"classes/step_{step:06d}", class_rows(evaluation), f"{table(evaluation)}\n\n{class_table(evaluation)}"
        )
        for name, picture in pictures(evaluated, self.job.val, self.experiment, self.experiment.train.overlays):
            tracker.image(step, name, picture)


def console_line(step: int, last: int, values: dict[str, float]) -> str:
    """One line of progress: step, losses, rate, speed, wait for data, memory, time left."""
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
    if values["skipped_steps"]:
        parts.append(f"{values['skipped_steps']:.0f} steps skipped")
    return " | ".join(parts)


def _device(gpu: bool) -> torch.device:
    if not gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    return device[0] if isinstance(device, list) else device


def _memory(device: torch.device) -> float:
    """Peak MiB of this worker: on the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _local(folder: str) -> str | None:
    return None if "://" in folder else folder


def _say(text: str) -> None:
    print(text, flush=True)
