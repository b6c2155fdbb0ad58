"""One trial of a sweep: the function that Ray Tune runs, which trains through Ray Train and reports its validations.

The function itself reserves almost nothing (`DRIVER_CPUS`), so that trials cannot take the CPUs from each other's
workers. Its checkpoints are pointers to those of Ray Train: a trial that was paused or interrupted goes on under its
own name; one that takes over another's training (population based training), or another number of frozen stages,
begins a new run folder from that checkpoint and stays one MLflow run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from pipelines.cluster import storage
from pipelines.config import Experiment
from pipelines.tracking import runs, tracker
from pipelines.training.driver import Child, train
from pipelines.training.worker import METRICS
from pipelines.tuning import concurrency
from pipelines.tuning.failures import (
    OutOfMemory,
    describe,
    forget_failure,
    out_of_memory,
    perhaps_out_of_memory,
    record_failure,
)
from pipelines.tuning.plan import Plan, run_id, trial_name
from pipelines.tuning.trial_config import Resolved, more_accumulation, resolve, row_of

POINTER = "pointer.json"


TALKATIVE = ("ray.train._internal.storage", "ray.tune.trainable.trainable")
"""Loggers of Ray that write a line a validation, of each trial, between the tables."""


WORST = 1e9
"""Objective of a trial whose metric is not a number."""


@dataclass
class Course:
    """Where a trial began, and how far Tune knows it."""

    origin: dict[str, Any]
    """As `beginning` returns it."""
    pointer: dict[str, Any] | None
    """To the last checkpoint that Tune was told of; None before the first."""


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """Train one trial and report its validations to Tune.

    Raises:
        RuntimeError: the trial failed; the message is the reason, which its MLflow run has too.
    """
    from ray import tune

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    row, identity = row_of(config, plan), tune.get_context().get_trial_id()
    pointer = _pointer(tune.get_checkpoint())
    forget_failure(plan, identity)
    concurrency.wait(plan.parent.run_id, identity)
    try:
        resolved = resolve(config, plan)
        course = Course(beginning(identity, pointer, resolved), pointer)
        tell_exchange(course, resolved, identity, plan)
        try:
            _segments(resolved, identity, course, plan)
        except Exception as error:  # whatever the worker's process died of
            whole = fitted(resolved.experiment, course.origin)
            smaller = more_accumulation(whole) if perhaps_out_of_memory(error) else None
            if smaller is None:
                raise
            print(f"{row.label}: {describe(error)}; once more with {smaller.train.micro_batch} images at once")
            course.origin = accumulating(course, smaller.train.micro_batch)
            _segments(resolved, identity, course, plan)
    except Exception as error:
        reason = describe(error)
        record_failure(plan, row, identity, reason)
        raise RuntimeError(reason) from None


def _segments(resolved: Resolved, identity: str, course: Course, plan: Plan) -> None:
    """Each part of the schedule of freezing, one run folder each."""
    origin, schedule = course.origin, resolved.schedule
    whole = fitted(resolved.experiment, origin)
    begin, total = origin["begin"], whole.train.steps
    for index, (start, stages) in enumerate(schedule):
        end = schedule[index + 1][0] if index + 1 < len(schedule) else total
        if origin["step"] >= end:
            continue  # the training that was taken over is past this part
        experiment = replace(
            whole,
            model=replace(whole.model, backbone=replace(whole.model.backbone, freeze=stages)),
            name=f"{origin['name']}-from-{start}" if start else origin["name"],
            storage=plan.folder,
            train=replace(whole.train, stop_after=end if end < total else 0),
        )
        child = Child(
            parent=plan.parent.run_id,
            label=resolved.row.label,
            params=resolved.row.params,
            tags={"trial": identity},
            run_id=run_id(plan.folder, identity),
            begin=begin,
        )
        begin = _fit(experiment, resolved, child, course, plan)


def beginning(identity: str, pointer: Mapping[str, Any] | None, resolved: Resolved) -> dict[str, Any]:
    """Name of a trial's run folder, the checkpoint whose training it takes over ("" = none), that one's step, and how
    many images go through a worker at once where memory asks for fewer than the options say (0 = as they say)."""
    changes = _plain(resolved.row.changes)
    if pointer is None:
        return {"name": trial_name(identity), "begin": "", "step": 0, "micro_batch": 0}
    before = {"micro_batch": 0, **pointer["origin"]}
    if before["name"].startswith(trial_name(identity)) and pointer["changes"] == changes:
        return before
    digest = hashlib.sha256(json.dumps([pointer["checkpoint"], changes], sort_keys=True).encode()).hexdigest()[:8]
    taken = {"begin": pointer["checkpoint"], "step": pointer["step"], "micro_batch": before["micro_batch"]}
    return {"name": f"{trial_name(identity)}-{digest}", **taken}


ACCUMULATING = "-accumulating-"


def accumulating(course: Course, micro_batch: int) -> dict[str, Any]:
    """Where a trial that ran out of memory goes on: in another folder, from the last checkpoint that Tune knows."""
    origin, pointer = course.origin, course.pointer
    name = f"{origin['name'].split(ACCUMULATING)[0]}{ACCUMULATING}{micro_batch}"
    begin, step = (pointer["checkpoint"], pointer["step"]) if pointer else (origin["begin"], origin["step"])
    return {"name": name, "begin": begin, "step": step, "micro_batch": micro_batch}


def fitted(experiment: Experiment, origin: Mapping[str, Any]) -> Experiment:
    """An experiment with as few images at once as its trial's memory turned out to hold."""
    micro_batch = origin["micro_batch"] or experiment.train.micro_batch
    return replace(experiment, train=replace(experiment.train, micro_batch=micro_batch))


def tell_exchange(course: Course, resolved: Resolved, identity: str, plan: Plan) -> None:
    """In MLflow, that a trial takes over another one's training here, and with which options."""
    origin, pointer, known = course.origin, course.pointer, run_id(plan.folder, identity)
    if known and pointer is not None and origin["begin"] == pointer["checkpoint"]:
        label = resolved.row.label
        tags = {f"exchange_{origin['step']:06d}": f"from {origin['begin']}: {label}", runs.NAME_TAG: label}
        tracker.Tracker(replace(plan.parent, run_id=known)).tags(tags)


def _fit(experiment: Experiment, resolved: Resolved, child: Child, course: Course, plan: Plan) -> str:
    """Train in a thread, while this one hands its validations on to Tune; the last checkpoint."""
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(train(experiment, resolved.row.preset, replace(child, callbacks=(forward(queue),))))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)  # ends with the process, when Tune stops the trial
    thread.start()
    while thread.is_alive() or not queue.empty():
        try:
            reported = queue.get(timeout=0.5)
        except Empty:
            continue
        _tell(reported, experiment, resolved, course, plan)
    queue.shutdown()
    folder = storage.join(plan.folder, experiment.name)
    for reported in missing(folder, course.pointer["step"] if course.pointer else 0):
        _tell(reported, experiment, resolved, course, plan)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return last_checkpoint(folder)[0]


def _tell(reported: Mapping[str, Any], experiment: Experiment, resolved: Resolved, course: Course, plan: Plan) -> None:
    """Tune, of one validation; its checkpoint is a pointer to that of Ray Train."""
    from ray import tune

    values = report(reported, experiment, plan)
    content = {"checkpoint": values["checkpoint"], "step": values["step"], "origin": dict(course.origin)}
    content["changes"] = _plain(resolved.row.changes)
    course.pointer = content
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER).write_text(json.dumps(content))
        tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


def missing(folder: str, told: int) -> list[dict[str, Any]]:
    """The validations after step `told` that a run kept, as `forward` puts them.

    Train commits a checkpoint before Tune hears of it, and Tune saves what it heard seconds later: a trial that is
    started again may find its training further on than Tune knows, or at its end.
    """
    kept = checkpoints(folder) if storage.exists(folder) else {}
    found = [{**values, "step": int(uri.rsplit("_", 1)[1]), "checkpoint": uri} for uri, values in kept.items()]
    return sorted((entry for entry in found if entry["step"] > told), key=lambda entry: entry["step"])


def report(values: Mapping[str, Any], experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """What Tune is told of one validation: every metric, the objective, the number of the validation."""
    value = float(values.get(plan.metric, float("nan")))
    worst = -WORST if plan.mode == "max" else WORST
    step, total, every = int(values["step"]), experiment.train.steps, experiment.train.validate_every
    return {
        **values,
        "objective": value if value == value else worst,
        # Before the end, the end of a part of a schedule of freezing is one validation more and no round.
        "round": step // every if step < total else -(-step // every),
        "total": total,
        "name": experiment.name,
    }


def forward(queue: Any) -> Any:
    """A callback of Ray Train that puts what rank 0 reports, and where its checkpoint went, into a queue.

    It ends a run whose workers ran out of memory, which Ray Train would start again as it was. One that was killed
    without a word is started again: the kernel's killer and a lost machine look alike.
    """
    from ray.train import UserCallback

    class Forward(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            queue.put({**metrics[0], "checkpoint": _uri(checkpoint)})

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if out_of_memory(error):
                    raise OutOfMemory(describe(error))

    return Forward()


def _uri(checkpoint: Any) -> str:
    """Ray names S3 objects without their scheme."""
    local = checkpoint.filesystem is None or checkpoint.filesystem.type_name == "local"
    return checkpoint.path if local else f"s3://{checkpoint.path}"


def last_checkpoint(folder: str) -> tuple[str, dict[str, float]]:
    """URI and metrics of a run's last checkpoint."""
    return max(checkpoints(folder).items(), key=lambda entry: entry[0])


def checkpoints(folder: str) -> dict[str, dict[str, float]]:
    """URI and metrics of every checkpoint that a run kept."""
    found = [name for name in storage.list_files(folder) if name.startswith("step_") and name.endswith("/" + METRICS)]
    return {
        storage.join(folder, name.split("/")[0]): json.loads(storage.read_bytes(storage.join(folder, name)))
        for name in found
    }


def best_of(kept: Mapping[str, Mapping[str, float]], metric: str, mode: str) -> str:
    """URI of the checkpoint with the best figure, "" where none has one."""
    sign = 1 if mode == "max" else -1
    scored = [
        (sign * metrics[metric], uri)
        for uri, metrics in kept.items()
        if metrics.get(metric, nan) == metrics.get(metric)
    ]
    return max(scored)[1] if scored else ""


def all_checkpoints(folder: str, identity: str) -> dict[str, dict[str, float]]:
    """Of every run folder of a trial of the sweep in `folder`."""
    prefix = trial_name(identity)
    parts = {name.split("/")[0] for name in storage.list_files(folder) if name.startswith(prefix)}
    return {uri: values for part in sorted(parts) for uri, values in checkpoints(storage.join(folder, part)).items()}


def _pointer(checkpoint: Any) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / POINTER).read_text())


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(values)))
