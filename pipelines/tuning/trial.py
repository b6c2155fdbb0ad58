"""One trial of a sweep: the function that Ray Tune runs, which trains through Ray Train and reports its validations.

The function itself reserves almost nothing (`TRIAL_CPUS`), so that trials cannot take the CPUs from each other's
workers. Its checkpoints are pointers to those of Ray Train: a trial that was paused or interrupted goes on under its
own name; one that takes over another's training (population based training), or another number of frozen stages,
begins a new run folder from that checkpoint and stays one MLflow run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.cluster import storage
from pipelines.config import UNVALIDATED, Experiment
from pipelines.tracking import runs
from pipelines.training.checkpoints import METRICS, read_metrics
from pipelines.training.driver import Child, train
from pipelines.training.failures import OutOfMemory, describe, out_of_memory, perhaps_out_of_memory
from pipelines.training.state import more_accumulation
from pipelines.tuning import concurrency
from pipelines.tuning.failures import forget_failure, record_failure
from pipelines.tuning.plan import Plan, run_id, trial_name
from pipelines.tuning.trial_config import ResolvedTrial, config_of, resolve, with_micro_batch

POINTER = "pointer.json"
"""File of a checkpoint of Tune: where the checkpoint of Ray Train lies that it stands for, and how the trial began."""

VERBOSE_LOGGERS = ("ray.train._internal.storage", "ray.tune.trainable.trainable")
"""Loggers of Ray that write a line a validation, of each trial, between the tables."""

WORST = 1e9
"""Objective of a trial whose metric is not a number."""


@dataclass
class TrialState:
    """The beginning of a trial, and the last checkpoint that was reported to Tune."""

    origin: dict[str, Any]
    """The beginning, as `origin_of` returns it."""
    pointer: dict[str, Any] | None
    """Pointer to the last checkpoint that was reported to Tune; None before the first."""


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """Train one trial and report its validations to Tune.

    Args:
        config: of Ray Tune: values of the search space by path, or the index of a given trial.
        plan: of the sweep.

    Raises:
        RuntimeError: the trial failed; the message is the reason, which its MLflow run has too.
    """
    from ray import tune

    for name in VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    trial_config, trial_id = config_of(config, plan), tune.get_context().get_trial_id()
    pointer = _read_pointer(tune.get_checkpoint())
    forget_failure(plan, trial_id)
    concurrency.wait_for_turn(plan.parent.run_id, trial_id)
    try:
        trial = resolve(config, plan)
        state = TrialState(origin_of(trial_id, pointer, trial), pointer)
        log_exchange(state, trial, trial_id, plan)
        try:
            _train_parts(trial, trial_id, state, plan)
        except Exception as error:  # whatever the worker's process died of
            whole = with_micro_batch(trial.experiment, state.origin["micro_batch"])
            smaller = more_accumulation(whole) if perhaps_out_of_memory(error) else None
            if smaller is None:
                raise
            print(f"{trial_config.label}: {describe(error)}; once more with {smaller.train.micro_batch} images at once")
            state.origin = origin_with_accumulation(state, smaller.train.micro_batch)
            _train_parts(trial, trial_id, state, plan)
    except Exception as error:
        reason = describe(error)
        record_failure(plan, trial_config, trial_id, reason)
        raise RuntimeError(reason) from None


def _train_parts(trial: ResolvedTrial, trial_id: str, state: TrialState, plan: Plan) -> None:
    """Train each part of the schedule of freezing, one run folder each."""
    origin, schedule = state.origin, trial.schedule
    whole = with_micro_batch(trial.experiment, origin["micro_batch"])
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
            label=trial.config.label,
            params=trial.config.params,
            tags={"trial": trial_id},
            run_id=run_id(plan.folder, trial_id),
            begin=begin,
        )
        begin = _fit(experiment, trial, child, state, plan)


def origin_of(trial_id: str, pointer: Mapping[str, Any] | None, trial: ResolvedTrial) -> dict[str, Any]:
    """The beginning of a trial.

    Args:
        trial_id: of Tune.
        pointer: of the checkpoint from which Tune starts the trial: its own, or another's; None for a new one.
        trial: its experiment.

    Returns:
        `name` of its run folder; `begin`, URI of the checkpoint whose training it takes over ("" = none); `step` of
        that checkpoint; `micro_batch`, images at once on a worker where memory asks for fewer than the options say
        (0 = as they say).
    """
    changes = _to_json(trial.config.changes)
    if pointer is None:
        return {"name": trial_name(trial_id), "begin": "", "step": 0, "micro_batch": 0}
    before = {"micro_batch": 0, **pointer["origin"]}  # earlier versions wrote none
    if before["name"].startswith(trial_name(trial_id)) and pointer["changes"] == changes:
        return before
    digest = hashlib.sha256(json.dumps([pointer["checkpoint"], changes], sort_keys=True).encode()).hexdigest()[:8]
    taken = {"begin": pointer["checkpoint"], "step": pointer["step"], "micro_batch": before["micro_batch"]}
    return {"name": f"{trial_name(trial_id)}-{digest}", **taken}


ACCUMULATING = "-accumulating-"
"""Stands in the names of run folders before the number of images at once of a trial that ran out of memory."""


def origin_with_accumulation(state: TrialState, micro_batch: int) -> dict[str, Any]:
    """The beginning of a trial that ran out of memory: in another folder, from the last checkpoint that Tune knows.

    Args:
        state: of the trial.
        micro_batch: images at once on a worker from now on.

    Returns:
        as `origin_of`.
    """
    origin, pointer = state.origin, state.pointer
    name = f"{origin['name'].split(ACCUMULATING)[0]}{ACCUMULATING}{micro_batch}"
    begin, step = (pointer["checkpoint"], pointer["step"]) if pointer else (origin["begin"], origin["step"])
    return {"name": name, "begin": begin, "step": step, "micro_batch": micro_batch}


def log_exchange(state: TrialState, trial: ResolvedTrial, trial_id: str, plan: Plan) -> None:
    """Write into a trial's MLflow run that it takes over another one's training here, and with which options."""
    origin, pointer, known = state.origin, state.pointer, run_id(plan.folder, trial_id)
    if known and pointer is not None and origin["begin"] == pointer["checkpoint"]:
        label = trial.config.label
        tags = {f"exchange_{origin['step']:06d}": f"from {origin['begin']}: {label}", runs.NAME_TAG: label}
        runs.tag(replace(plan.parent, run_id=known), tags)


def _fit(experiment: Experiment, trial: ResolvedTrial, child: Child, state: TrialState, plan: Plan) -> str:
    """Train in a thread, while this one reports the validations to Tune; returns the URI of the last checkpoint."""
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    outcome: list[Any] = []

    def work() -> None:
        try:
            callbacks = (forward_reports(queue),)
            outcome.append(train(experiment, trial.config.preset, replace(child, callbacks=callbacks)))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)  # ends with the process, when Tune stops the trial
    thread.start()
    while thread.is_alive() or not queue.empty():
        try:
            validation = queue.get(timeout=0.5)
        except Empty:
            continue
        _report(validation, experiment, trial, state, plan)
    queue.shutdown()
    folder = storage.join(plan.folder, experiment.name)
    for validation in unreported(folder, state.pointer["step"] if state.pointer else 0):
        _report(validation, experiment, trial, state, plan)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return last_checkpoint(folder)


def _report(
    validation: Mapping[str, Any], experiment: Experiment, trial: ResolvedTrial, state: TrialState, plan: Plan
) -> None:
    """Report one validation to Tune, with a checkpoint that is a pointer to that of Ray Train."""
    from ray import tune

    result = tune_result(validation, experiment, plan)
    state.pointer = {
        "checkpoint": result["checkpoint"],
        "step": result["step"],
        "origin": dict(state.origin),
        "changes": _to_json(trial.config.changes),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER).write_text(json.dumps(state.pointer))
        tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))


def unreported(folder: str, step: int) -> list[dict[str, Any]]:
    """The validations after a step that a run kept, in order, as `forward_reports` gives them.

    Train commits a checkpoint before Tune hears of it, and Tune saves what it heard seconds later: a trial that is
    started again may find its training further on than Tune knows, or at its end.
    """
    kept = checkpoints(folder) if storage.exists(folder) else {}
    validations = [{**values, "step": int(uri.rsplit("_", 1)[1]), "checkpoint": uri} for uri, values in kept.items()]
    return sorted((entry for entry in validations if entry["step"] > step), key=lambda entry: entry["step"])


def tune_result(validation: Mapping[str, Any], experiment: Experiment, plan: Plan) -> dict[str, Any]:
    """The result that is reported to Tune: a validation's metrics, the objective, the number of the validation."""
    value = float(validation.get(plan.metric, math.nan))
    worst = -WORST if plan.mode == "max" else WORST
    step, total, every = int(validation["step"]), experiment.train.steps, experiment.train.validate_every
    return {
        **validation,
        "objective": worst if math.isnan(value) else value,
        # Before the end, the end of a part of a schedule of freezing is one validation more and no round.
        "round": step // every if step < total else -(-step // every),
        "total": total,
        "name": experiment.name,
    }


def forward_reports(queue: Any) -> Any:
    """A callback of Ray Train that puts the validations that rank 0 reports, and their checkpoints' URIs, into a queue.

    It ends a run whose workers ran out of memory, which Ray Train would start again as it was. One that was killed
    without a word is started again: the kernel's killer and a lost machine look alike.
    """
    from ray.train import UserCallback

    class ForwardReports(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["score"] > UNVALIDATED:
                queue.put({**metrics[0], "checkpoint": _uri(checkpoint)})

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if out_of_memory(error):
                    raise OutOfMemory(describe(error))

    return ForwardReports()


def _uri(checkpoint: Any) -> str:
    """URI of a checkpoint of Ray Train, which names S3 objects without their scheme."""
    local = checkpoint.filesystem is None or checkpoint.filesystem.type_name == "local"
    return checkpoint.path if local else f"s3://{checkpoint.path}"


def last_checkpoint(folder: str) -> str:
    """URI of a run's last validated checkpoint."""
    return max(checkpoints(folder))


def checkpoints(folder: str) -> dict[str, dict[str, float]]:
    """URI and metrics of every validated checkpoint that a run kept."""
    files = [name for name in storage.list_files(folder) if name.startswith("step_") and name.endswith("/" + METRICS)]
    uris = [storage.join(folder, name.split("/")[0]) for name in files]
    return {uri: values for uri in uris if (values := read_metrics(uri))}


def best_of(kept: Mapping[str, Mapping[str, float]], metric: str, mode: str) -> str:
    """URI of the checkpoint with the best value of a metric, "" where none has one."""
    sign = 1 if mode == "max" else -1
    scores = [(sign * metrics.get(metric, math.nan), uri) for uri, metrics in kept.items()]
    return max(((score, uri) for score, uri in scores if not math.isnan(score)), default=(0.0, ""))[1]


def all_checkpoints(folder: str, trial_id: str) -> dict[str, dict[str, float]]:
    """URI and metrics of every checkpoint in the run folders of a trial of the sweep in `folder`."""
    prefix = trial_name(trial_id)
    parts = {name.split("/")[0] for name in storage.list_files(folder) if name.startswith(prefix)}
    return {uri: values for part in sorted(parts) for uri, values in checkpoints(storage.join(folder, part)).items()}


def _read_pointer(checkpoint: Any) -> dict[str, Any] | None:
    """The pointer in a checkpoint of Tune; None without one."""
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / POINTER).read_text())


def _to_json(values: Mapping[str, Any]) -> Any:
    """Values as they come back from JSON, in which a pointer keeps them."""
    return json.loads(json.dumps(dict(values)))
