"""The global batch shared by workers: how many of them can share it, and in how many parts each takes its share."""

from __future__ import annotations

from pipelines.config import Experiment, Train, check_run_name, least_workers
from pipelines.data.config import check_readers


def workers_for(options: Train, room: int) -> int:
    """The most workers of `train.workers` for which there is room and by which the batch can be shared equally.

    Raises:
        ValueError: the batch cannot be shared by any of these numbers.
    """
    least, most = least_workers(options.workers), min(room, options.workers)
    counts = [count for count in range(least, most + 1) if options.batch % count == 0]
    if not counts:
        accumulation(options, least)  # names one number
        raise ValueError(f"train.workers {options.workers}: there is room for {room}")
    return counts[-1]


def accumulation(options: Train, workers: int) -> int:
    """Micro-batches of a worker in one step: the fewest equal ones of at most `micro_batch` images.

    Raises:
        ValueError: the global batch cannot be shared out equally.
    """
    batch, most = options.batch, options.micro_batch
    if batch % workers:
        raise ValueError(f"train.batch {batch} cannot be shared by {workers} workers; choose a multiple of {workers}")
    share = batch // workers
    return next(n for n in range(1, share + 1) if share % n == 0 and (not most or share // n <= most))


def check_alone(experiment: Experiment) -> None:
    """Refuse what the options alone tell, before the libraries are imported that build a model and read data.

    Raises:
        ValueError: the name can be none of a run, the batch cannot be shared by the workers, a format is none that is
            read, or options exclude each other.
    """
    if experiment.name:
        check_run_name(experiment.name)
    workers_for(experiment.train, experiment.train.workers)
    data = experiment.data
    check_readers(data.reader)
    if data.balance and (data.window > 1 or experiment.augment.doubled):
        raise ValueError(
            f"data.balance {data.balance:g}: cannot be combined with data.window or augment.doubled; turn off one"
        )
    if experiment.engine.activation_checkpointing and experiment.train.compile:
        raise ValueError(
            "engine.activation_checkpointing: cannot be combined with train.compile, whose graphs decide by themselves "
            "what is computed again; turn off one"
        )
