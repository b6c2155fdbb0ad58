"""One trial of a sweep: the function that Ray Tune runs, which trains through Ray Train and reports its validations.

The function itself reserves almost nothing (`DRIVER_CPUS`), so that trials cannot take the CPUs from each other's
workers. Its checkpoints are pointers to those of Ray Train: a trial that was paused or interrupted goes on under its
own name; one that takes over another's training (population based training), or another number of frozen stages,
begins a new run folder from that checkpoint and stays one MLflow run.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

from pipelines import storage, tracking
from pipelines.config import Experiment, override
from pipelines.sweeps.freezing import parse_schedule
from pipelines.sweeps.search import PRESET, Space, label
from pipelines.train import Child, train
from pipelines.worker import METRICS

DRIVER_CPUS = 0.01
"""Of a trial's function; 0 is refused by Ray."""

FREEZE = "model.backbone.freeze"
"""The one option whose value may be a schedule."""

POINTER = "pointer.json"

WORST = 1e9
"""Objective of a trial whose metric is not a number."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|can't allocate memory|not enough memory|Unable to allocate|memory pressure",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """A trial that is given instead of drawn."""

    label: str
    preset: str
    changes: Mapping[str, Any]
    params: Mapping[str, Any]
    """What MLflow compares."""


@dataclass(frozen=True)
class Plan:
    """What every trial of a sweep shares."""

    bases: Mapping[str, Experiment]
    """By preset."""
    preset: str
    """Where the space chooses none."""
    folder: str
    """Of the sweep: trials and Tune's state."""
    parent: tracking.Run
    space: Space = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Short names of the space's paths."""
    rows: tuple[Row, ...] = ()
    metric: str = "val/pq"
    mode: str = "max"


@dataclass(frozen=True)
class Resolved:
    """A trial's options."""

    row: Row
    experiment: Experiment
    """With the first number of frozen stages."""
    schedule: tuple[tuple[int, int], ...]
    """(step, frozen stages), the first at step 0."""


def row_of(config: Mapping[str, Any], plan: Plan) -> Row:
    """What Tune drew: one of the given trials, or values of the space."""
    if "row" in config:
        return plan.rows[config["row"]]
    values = {path: domain.cleaned(config[path]) for path, domain in plan.space.items()}
    told = {path: value for path, value in values.items() if not plan.space[path].constant}
    params = {plan.names.get(path, path): value for path, value in told.items()}
    changes = {path: value for path, value in values.items() if path != PRESET}
    return Row(label(told, plan.names) or "as given", values.get(PRESET, plan.preset), changes, params)


def resolve(config: Mapping[str, Any], plan: Plan) -> Resolved:
    """What Tune drew, as an experiment.

    Raises:
        ValueError: the values do not make one.
    """
    row = row_of(config, plan)
    return Resolved(row, *apply(plan.bases[row.preset], row.changes))


def apply(base: Experiment, changes: Mapping[str, Any]) -> tuple[Experiment, tuple[tuple[int, int], ...]]:
    """A trial's experiment and its schedule of freezing.

    Raises:
        ValueError: an option that does not exist, or a value that it does not take.
    """
    changes = dict(changes)
    schedule = ((0, base.model.backbone.freeze),)
    if FREEZE in changes:
        schedule = tuple(parse_schedule(changes[FREEZE]))
        changes[FREEZE] = schedule[0][1]
    experiment = override(base, changes) if changes else base
    if schedule[-1][0] >= experiment.train.steps:
        raise ValueError(f"{FREEZE}: the schedule changes at step {schedule[-1][0]}, training ends before")
    return fit_workers(experiment), schedule


def fit_workers(experiment: Experiment) -> Experiment:
    """As many of the asked workers as share the batch equally: their number changes neither samples nor updates."""
    options = experiment.train
    workers = next(n for n in range(options.workers, 0, -1) if options.batch % n == 0)
    return replace(experiment, train=replace(options, workers=workers))


def more_accumulation(experiment: Experiment) -> Experiment | None:
    """The same experiment with half the images at once on a worker; None where that is one already."""
    options = experiment.train
    share = options.batch // options.workers
    at_once = min(options.micro_batch or share, share)
    if at_once == 1:
        return None
    return replace(experiment, train=replace(options, micro_batch=at_once // 2))


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """Train one trial and report its validations to Tune.

    Raises:
        RuntimeError: the trial failed; the message is the reason, which its MLflow run has too.
    """
    from ray import tune

    resolved, identity = resolve(config, plan), tune.get_context().get_trial_id()
    pointer = _pointer(tune.get_checkpoint())
    try:
        try:
            _segments(resolved, identity, pointer, plan)
        except Exception as error:  # whatever the worker's process died of
            smaller = more_accumulation(resolved.experiment) if out_of_memory(error) else None
            if smaller is None:
                raise
            print(f"{resolved.row.label}: out of memory, once more with {smaller.train.micro_batch} images at once")
            _segments(replace(resolved, experiment=smaller), f"{identity}-accumulating", None, plan, identity)
    except Exception as error:
        reason = describe(error)
        record_failure(plan, resolved.row, identity, reason)
        raise RuntimeError(reason) from None


def _segments(
    resolved: Resolved, identity: str, pointer: dict[str, Any] | None, plan: Plan, first: str | None = None
) -> None:
    """Each part of the schedule of freezing, one run folder each."""
    owner, origin = first or identity, beginning(identity, pointer, resolved)
    begin, total, schedule = origin["begin"], resolved.experiment.train.steps, resolved.schedule
    for index, (start, stages) in enumerate(schedule):
        end = schedule[index + 1][0] if index + 1 < len(schedule) else total
        if origin["step"] >= end:
            continue  # the training that was taken over is past this part
        name = f"{origin['name']}-from-{start}" if start else origin["name"]
        backbone = replace(resolved.experiment.model.backbone, freeze=stages)
        experiment = replace(
            resolved.experiment,
            model=replace(resolved.experiment.model, backbone=backbone),
            name=name,
            storage=plan.folder,
            train=replace(resolved.experiment.train, stop_after=end if end < total else 0),
        )
        child = Child(
            parent=plan.parent.run_id,
            label=resolved.row.label,
            params=resolved.row.params,
            tags={"trial": owner},
            run_id=run_id(plan.folder, owner) or run_id(plan.folder, identity),
            begin=begin,
        )
        begin = _fit(experiment, resolved, child, origin, plan)


def beginning(identity: str, pointer: Mapping[str, Any] | None, resolved: Resolved) -> dict[str, Any]:
    """Name of a trial's run folder, the checkpoint whose training it takes over ("" = none) and that one's step."""
    changes = _plain(resolved.row.changes)
    if pointer is None:
        return {"name": trial_name(identity), "begin": "", "step": 0}
    if pointer["origin"]["name"].startswith(trial_name(identity)) and pointer["changes"] == changes:
        return pointer["origin"]
    digest = hashlib.sha256(json.dumps([pointer["checkpoint"], changes], sort_keys=True).encode()).hexdigest()[:8]
    name = f"{trial_name(identity)}-{digest}"
    return {"name": name, "begin": pointer["checkpoint"], "step": pointer["step"]}


def _fit(experiment: Experiment, resolved: Resolved, child: Child, origin: Mapping[str, Any], plan: Plan) -> str:
    """Train in a thread, while this one hands its validations on to Tune; the last checkpoint."""
    from ray import tune
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
        values = report(reported, experiment, plan)
        with tempfile.TemporaryDirectory() as folder:
            content = {"checkpoint": values["checkpoint"], "step": values["step"], "origin": dict(origin)}
            content["changes"] = _plain(resolved.row.changes)
            (Path(folder) / POINTER).write_text(json.dumps(content))
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))
    queue.shutdown()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return last_checkpoint(outcome[0].folder)[0]


def report(values: Mapping[str, Any], experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """What Tune is told of one validation: every metric, the objective, the number of the validation."""
    value = float(values.get(plan.metric, float("nan")))
    worst = -WORST if plan.mode == "max" else WORST
    return {
        **values,
        "objective": value if value == value else worst,
        "round": -(-int(values["step"]) // experiment.train.validate_every),
        "total": experiment.train.steps,
        "name": experiment.name,
    }


def forward(queue: Any) -> Any:
    """A callback of Ray Train that puts what rank 0 reports, and where its checkpoint went, into a queue."""
    from ray.train import UserCallback

    class Forward(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            queue.put({**metrics[0], "checkpoint": _uri(checkpoint)})

    return Forward()


def _uri(checkpoint: Any) -> str:
    """Ray names S3 objects without their scheme."""
    local = checkpoint.filesystem is None or checkpoint.filesystem.type_name == "local"
    return checkpoint.path if local else f"s3://{checkpoint.path}"


def trial_name(identity: str) -> str:
    """Of a trial's run folder."""
    return f"trial-{identity}"


def run_id(folder: str, identity: str) -> str:
    """MLflow run of a trial, "" before it has one."""
    record = storage.join(folder, trial_name(identity), "run.json")
    return json.loads(storage.read_bytes(record))["run_id"] if storage.exists(record) else ""


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it on a worker, says that memory ran out."""
    return bool(OUT_OF_MEMORY.search(" ".join(str(part) + type(part).__name__ for part in _causes(error))))


def describe(error: BaseException) -> str:
    """The innermost reason in one line: what a worker raised, not that a worker failed."""
    innermost = _causes(error)[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    text = (named or lines or [""])[-1]
    return text if re.match(r"[\w.]*(Error|Exception)\b", text) else f"{type(innermost).__name__}: {text}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error, and those of workers in it."""
    found, seen = [error], {id(error)}
    for part in found:
        failures = getattr(part, "worker_failures", None)
        inner = [*(failures.values() if isinstance(failures, Mapping) else ()), part.__cause__]
        for one in inner:
            if isinstance(one, BaseException) and id(one) not in seen:
                seen.add(id(one))
                found.append(one)
    return found


def record_failure(plan: Plan, row: Row, identity: str, reason: str) -> None:
    """The reason, beside the trial and in its MLflow run (which is opened where it failed before that)."""
    storage.write_bytes(storage.join(plan.folder, "failures", f"{identity}.txt"), reason.encode())
    known = run_id(plan.folder, identity)
    parent = plan.parent
    if known:
        run = replace(parent, run_id=known)
    else:
        options = tracking.Tracking(uri=parent.tracking_uri, experiment=plan.bases[row.preset].tracking.experiment)
        options = replace(options, name=row.label)
        run = tracking.start(options, plan.folder, params=row.params, tags={"trial": identity}, parent=parent.run_id)
    tracking.Tracker(run).tags({"state": "failed", "reason": reason})
    tracking.finish(run, "FAILED")


def _pointer(checkpoint: Any) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / POINTER).read_text())


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(dict(values)))
