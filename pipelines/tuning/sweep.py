"""A sweep: Ray Tune over trials that train through Ray Train.

Everything is checked before anything starts: expressions, options, models (built without memory), frozen parts, the
size of the cluster. A sweep has a name and a folder `<storage>/<name>`: Tune's state in `tune/`, a run folder
`trial-<id>` a trial, `sweep.json`, `trials.json`. `--resume` under that name goes on: finished trials stay, interrupted
ones continue from their last checkpoint, failed ones are tried again.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any

from pipelines.cluster import storage
from pipelines.cluster.masking import masked, masked_values
from pipelines.config import Experiment
from pipelines.data.class_map import absolute as absolute_map
from pipelines.data.join import absolute
from pipelines.tracking import runs
from pipelines.training.driver import occupied, prepare_data, with_absolute_weights
from pipelines.training.pages import data_set
from pipelines.training.state import last_step
from pipelines.tuning import concurrency, progress, search_space, trial, trial_config
from pipelines.tuning.checks import TrialCheck, check_population, check_storage
from pipelines.tuning.concurrency import cores, join_cluster, start_limiter
from pipelines.tuning.config import SweepOptions, preset_values, read_command
from pipelines.tuning.failures import close_children
from pipelines.tuning.plan import Plan, Trials, count_trials
from pipelines.tuning.results import SweepResult, conclude
from pipelines.tuning.resume import RECORD, STATE, read_record, restorable
from pipelines.tuning.schedulers import rounds_of, scheduler, searcher

ROOT = "data.root"
"""Option whose values a sweep may draw, each of which is prepared before anything starts."""

ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "60"}
"""Settings of Ray Tune: MLflow and our table take the place of its loggers."""


def sweep(options: SweepOptions, rest: Sequence[str], presets: Mapping[str, Callable[[], Experiment]]) -> SweepResult:
    """Run a sweep to its end.

    Args:
        options: of the sweep.
        rest: `[PRESET] --path value …` for every trial.
        presets: by name.

    Raises:
        ValueError: nothing was started; the message says what to change.
    """
    trials, name = checked(options, rest, presets)
    return execute(options, trials, name, {"arguments": list(rest)})


def checked(
    options: SweepOptions, rest: Sequence[str], presets: Mapping[str, Callable[[], Experiment]]
) -> tuple[Trials, str]:
    """The trials of a sweep and its name, after all checks that need no Ray; arguments and errors as of `sweep`."""
    space, bases, name = read_command(options, rest, presets)
    trial_check = TrialCheck(Trials(bases, next(iter(bases)), space))
    search_space.dry_run(space, trial_check)
    if options.scheduler == "pbt":
        trial_check.check_exchange()
    trials = replace(trial_check.trials, experiments=tuple(trial_check.experiments))
    return trials, name


def outline(options: SweepOptions, rest: Sequence[str], presets: Mapping[str, Callable[[], Experiment]]) -> str:
    """The trials that a sweep would have, and where it would write; arguments and errors as of `sweep`."""
    trials, name = checked(options, rest, presets)
    check_storage(trials.bases.values())
    count = count_trials(options, trials)
    steps = sorted({last_step(experiment.train) for experiment in trials.experiments})
    first = next(iter(trials.bases.values()))
    local = first.storage if "://" not in first.storage else "runs"
    length = " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1])))
    return "\n".join(
        [
            f"{count} trials of {length} steps, searcher {options.searcher}, scheduler {options.scheduler}, over",
            *(f"  {path} = {domain}" for path, domain in trials.space.items()),
            *(["the first with the preset's own values"] if options.baseline else []),
            f"presets  {', '.join(trials.bases)}",
            f"data     {', '.join(dict.fromkeys(str(base.data.root) for base in trials.bases.values()))}",
            f"folder   {storage.join(storage.absolute(first.storage), name)}",
            f"MLflow   {masked(runs.resolve_uri(first.tracking, local))}",
            "dry run: nothing was started and nothing written",
        ]
    )


def execute(options: SweepOptions, trials: Trials, name: str, record: Mapping[str, Any]) -> SweepResult:
    """Start or resume the trials, wait for them, log the best.

    Args:
        options: of the sweep.
        trials: checked.
        name: of the sweep.
        record: what makes it this sweep and no other; a resumed one must have the same.

    Raises:
        ValueError: another sweep of that name is there, none is there to be resumed, or the cluster is too small.
        lease.Busy: another process runs this sweep.
    """
    first = next(iter(trials.bases.values()))
    check_storage(trials.bases.values())
    runs.check_answers(first.tracking, first.storage if "://" not in first.storage else "runs")
    folder = storage.join(storage.absolute(first.storage), name)
    # beside the folder, which does not exist before a sweep has been opened
    with occupied(f"{folder}.lease", f"the sweep {name}") as note:
        return _execute(options, trials, name, record, folder, note)


def _execute(
    options: SweepOptions, trials: Trials, name: str, record: Mapping[str, Any], folder: str, note: Callable[[], None]
) -> SweepResult:
    """`execute` with the sweep's folder held; `note` is called once Ray has started."""
    first = next(iter(trials.bases.values()))
    record = record_of(options, record)
    before = read_record(folder, name, record, options.resume)
    experiments = trials.experiments or tuple(trials.bases.values())
    place = masked(runs.resolve_uri(first.tracking, first.storage if "://" not in first.storage else "runs"))
    print(f"{name}: {count_trials(options, trials)} trials; folder {masked(folder)}; MLflow {place}", flush=True)
    concurrent, rounds = join_cluster(options.concurrent, experiments), rounds_of(experiments)
    note()
    if options.scheduler == "pbt":
        check_population(options.samples, concurrent)
    bases, data = prepare_bases(options, trials, concurrent)
    if options.scheduler == "pbt":
        # Keep every checkpoint: a trial may take over one that its own trial has since replaced by better ones.
        bases = {key: replace(base, train=replace(base.train, keep=rounds + 1)) for key, base in bases.items()}
    parent = open_parent(options, trials, bases, data, folder, name, before)
    if not before:
        content = {"run_id": parent.run_id, **record}
        storage.write_bytes(storage.join(folder, RECORD), json.dumps(content, indent=1).encode())
    names = search_space.short_names([path for path, domain in trials.space.items() if not domain.constant])
    given = (trials.configs, options.metric, options.mode, count_trials(options, trials))
    plan = Plan(bases, trials.preset, folder, parent, trials.space, names, *given)
    with runs.ending(parent):
        return conclude(name, run_trials(options, plan, concurrent, rounds), plan, first)


def record_of(options: SweepOptions, more: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a sweep this one and no other, as `sweep.json` keeps them: without passwords."""
    given = {key: value for key, value in asdict(options).items() if key not in ("resume", "concurrent", "dry_run")}
    return masked_values(json.loads(json.dumps({**given, **more})))


def prepare_bases(
    options: SweepOptions, trials: Trials, concurrent: int
) -> tuple[dict[str, Experiment], list[runs.DataSet]]:
    """The experiment of each preset, with all the data prepared that any trial may draw; and that data.

    Raises:
        ValueError: some of it cannot be prepared.
    """
    first, drawn = next(iter(trials.bases.values())), {}
    sets: dict[tuple[str, str], runs.DataSet] = {}
    for experiment in trials.experiments:
        if repr(experiment.data) not in drawn:
            prepared = prepare_base(experiment, concurrent, first, options.metric, options.mode, sets)
            drawn[repr(experiment.data)] = prepared
    with_data = next(iter(drawn.values()), first)
    bases = {}
    for key, base in trials.bases.items():
        # A sweep over data.root needs none outside of it; every trial brings its own.
        given = base if base.data.root or ROOT not in trials.space else replace(base, data=with_data.data)
        bases[key] = prepare_base(given, concurrent, first, options.metric, options.mode, sets)
    return bases, list(sets.values())


def prepare_base(
    base: Experiment,
    concurrent: int,
    first: Experiment,
    metric: str = "val/pq",
    mode: str = "max",
    sets: dict[tuple[str, str], runs.DataSet] | None = None,
) -> Experiment:
    """An experiment that trials can start from in any process.

    Its paths are absolute, its data is prepared, its workers have as many threads as the trials at once leave them, and
    its checkpoints are kept by what the trials are compared by.

    Args:
        base: experiment of a preset.
        concurrent: trials at once.
        first: experiment whose storage and MLflow store hold for the sweep.
        metric: what the trials are compared by.
        mode: max where more of it is better, else min.
        sets: takes its splits, by hash and use.

    Raises:
        ValueError: it has no data, or data that cannot be prepared.
    """
    root = storage.absolute(first.storage)
    data = replace(base.data, shards=base.data.shards or storage.join(root, "shards"))
    if data.root != "scenes":
        class_map = absolute_map(data.class_map) if data.class_map else ""
        data = replace(data, root=absolute(data.root), class_map=class_map) if data.root else data
    local = first.storage if "://" not in first.storage else "runs"
    uri = runs.resolve_uri(first.tracking, local)
    threads = base.train.threads or max(1, cores() // (concurrent * base.train.workers))
    named = replace(
        with_absolute_weights(base), data=data, storage=root, tracking=replace(base.tracking, uri=uri, register="")
    )
    train_set, val_set = prepare_data(named)
    for split, use in ((train_set, "train"), (val_set, "val")):
        (sets if sets is not None else {})[split.hash, use] = data_set(split, use)
    if data.root == "scenes":  # drawn below the storage, which is another folder in a trial
        named = replace(named, data=replace(data, root=str(PurePosixPath(train_set.uri).parent)))
    return replace(named, train=replace(named.train, threads=threads, score=metric, score_mode=mode))


def open_parent(
    options: SweepOptions,
    trials: Trials,
    bases: Mapping[str, Experiment],
    data: Sequence[runs.DataSet],
    folder: str,
    name: str,
    before: Mapping[str, Any],
) -> runs.Run:
    """Open the MLflow run of the sweep, above those of its trials: a new one, or the one that `before` names."""
    base = next(iter(bases.values()))
    named = replace(base.tracking, name=name)
    local = folder.rsplit("/", 1)[0] if "://" not in folder else "runs"
    if before:
        return runs.start(named, local, run_id=before["run_id"])
    given = {key: value for key, value in asdict(options).items() if key not in ("sweep", "resume", "dry_run")}
    params = {"presets": " ".join(bases), **given, "trials given": len(trials.configs)}
    params |= {path: f"{domain.kind}{domain.values}" for path, domain in trials.space.items()}
    tags = {"kind": "study" if trials.configs else "sweep", "sweep": " ".join(options.sweep)}
    return runs.start(named, local, params=params, tags=tags, data=data)


def run_trials(options: SweepOptions, plan: Plan, concurrent: int, rounds: int) -> list[progress.TrialResult]:
    """Run all trials through Ray Tune, and return what became of each.

    Raises:
        KeyboardInterrupt: they were interrupted.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.tune.analysis.experiment_analysis"):  # reasons stand in our table
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Consider boosting PBT")  # a trial's process ends with its training
    import ray

    tuner = tuner_of(options, plan, concurrent, rounds)
    limiter = start_limiter(plan.parent.run_id, concurrent)
    try:
        tuner.fit()
    finally:
        close_children(plan.parent)
        if ray.is_initialized():  # its handler of SIGTERM may have ended it
            ray.kill(limiter)
    results = progress.read(plan.folder)
    if not all(result.ended for result in results):  # Tune takes the first Ctrl-C for an end as any other
        raise KeyboardInterrupt
    return results


def tuner_of(options: SweepOptions, plan: Plan, concurrent: int, rounds: int) -> Any:
    """A new tuner, or the one that an earlier start of the sweep left."""
    from ray import tune

    filesystem, path = storage.resolve(plan.folder)
    function = tune.with_parameters(trial.run_trial, plan=plan)
    trainable = tune.with_resources(function, {"CPU": concurrency.TRIAL_CPUS, "memory": concurrency.TRIAL_MEMORY})
    if restorable(plan.folder):
        state = storage.join(path, STATE)
        return tune.Tuner.restore(state, trainable, resume_errored=True, storage_filesystem=filesystem)
    space = search_space.to_tune(plan.space, options.searcher == "grid")
    if plan.configs:
        space = {trial_config.GIVEN: tune.grid_search(list(range(len(plan.configs))))}
    points = [preset_values(plan.space, plan.bases[plan.preset])] if options.baseline else []
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode=options.mode,
            num_samples=options.samples,
            search_alg=searcher(options.searcher, options.mode, options.search_seed, concurrent, points),
            scheduler=scheduler(options, plan.space, rounds),
            max_concurrent_trials=concurrent if options.searcher == "optuna" else None,
            trial_dirname_creator=trial_folder,
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[progress.Progress(plan)],
            verbose=0,
        ),
    )


def trial_folder(tune_trial: Any) -> str:
    """The name of a trial's folder in Tune's state: its id, without the options, which may hold slashes."""
    return tune_trial.trial_id
