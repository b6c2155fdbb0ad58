"""The state of a training worker.

`Job` is what the driver hands to every worker; `State` is what one worker holds from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.optim.swa_utils import AveragedModel

from panoptic.models.base import PanopticModel
from pipelines.config import Experiment, Train
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import Repeats
from pipelines.tracking.runs import Run
from pipelines.tracking.tracker import Tracker


@dataclass(frozen=True)
class Job:
    """One training, as the driver hands it to each worker."""

    experiment: Experiment
    train: Manifest
    val: Manifest
    run: Run
    folder: str
    """The run's folder, local or s3://."""
    gpu: bool
    begin: str = ""
    """URI of another run's checkpoint whose training this one continues under its own options; "" = none."""
    quiet: bool = False
    """Lines go to log.txt in `folder` instead of the console, where many runs would mix."""
    repeats: Repeats | None = None
    """The number of times that an epoch reads each training image; None = once."""
    key: str = ""
    """Name under which the driver asks the workers to stop, see `notice`."""
    features: Manifest | None = None
    """The features of the rows of `train`, read in their place: those of a frozen backbone; None = images are read."""

    @property
    def local_folder(self) -> str | None:
        """The run's folder for a worker's log; None when it is on S3."""
        return None if "://" in self.folder else self.folder


@dataclass
class State:
    """One worker between two steps. A checkpoint keeps model, optimiser, average, step and position."""

    job: Job
    rank: int
    world: int
    """Number of workers."""
    device: torch.device
    model: PanopticModel
    """Unwrapped; DDP holds the same tensors."""
    optimiser: torch.optim.Optimizer
    ema: AveragedModel | None
    """Averaged weights; None where the experiment averages none."""
    accumulation: int
    """Micro-batches of this worker in one step."""
    tracker: Tracker | None
    """The MLflow run, which rank 0 alone writes."""
    step: int = 0
    """Updates done."""
    position: int = 0
    """Place of the next sample in the training stream: step x batch unless the global batch changed on the way."""

    @property
    def experiment(self) -> Experiment:
        """The options of the training."""
        return self.job.experiment


def last_step(options: Train) -> int:
    """The step at which a run ends: that of the schedule, or `stop_after` before it."""
    return min(options.steps, options.stop_after or options.steps)


def more_accumulation(experiment: Experiment) -> Experiment | None:
    """An experiment with half the images at once on a worker; None where that is one already."""
    options = experiment.train
    share = options.batch // options.workers
    micro_batch = min(options.micro_batch or share, share)
    if micro_batch == 1:
        return None
    return replace(experiment, train=replace(options, micro_batch=micro_batch // 2))
