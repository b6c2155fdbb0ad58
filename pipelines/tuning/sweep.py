"""Sweeps: Ray Tune over trials that train through Ray Train.

Everything is checked before anything starts: expressions, options, models (built without memory), frozen parts, the
size of the cluster. A sweep has a name and a folder `<storage>/<name>`: Tune's state in `tune/`, a run folder
`trial-<id>` a trial, `sweep.json`, `trials.json`. `--resume` under that name goes on: finished trials stay, interrupted
ones continue from their last checkpoint, failed ones are tried again.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any

from pipelines.cluster import storage
from pipelines.config import Experiment, parse
from pipelines.tracking import runs
from pipelines.training.driver import prepare_data
from pipelines.tuning import concurrency, progress, search_space, trial
from pipelines.tuning.checks import Checker, check_options, check_population, check_storage
from pipelines.tuning.concurrency import create_trial_limit, join_cluster
from pipelines.tuning.failures import close_children
from pipelines.tuning.plan import Plan, Sweep, Trials
from pipelines.tuning.results import Finished, conclude
from pipelines.tuning.resume import RECORD, STATE, read_record, restorable
from pipelines.tuning.schedulers import rounds_of, scheduler, searcher
from pipelines.tuning.search_space import PRESET

ROOT = "data.root"


ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "60"}
"""Of Ray Tune: MLflow and our table take the place of its loggers."""


def sweep(options: Sweep, rest: Sequence[str], presets: Mapping[str, Callable[[], Experiment]]) -> Finished:
    """Run a sweep to its end.

    Args:
        options: of the sweep.
        rest: `[PRESET] --path value …` for every trial.
        presets: by name.

    Raises:
        ValueError: nothing was started; the message says what to change.
    """
    if not options.sweep:
        raise ValueError("--sweep: nothing to search; give path=expression, such as optim.lr=loguniform(1e-5,1e-3)")
    space = search_space.parse(options.sweep)
    check_options(options, space)
    chosen, arguments = split_preset(rest)
    names = [str(value) for value in space[PRESET].values] if PRESET in space else [chosen]
    unknown = [name for name in names if name not in presets]
    if unknown:
        raise ValueError(f"preset {', '.join(unknown)} is unknown; there are: {', '.join(sorted(presets))}")
    bases = {name: parse([name, *arguments], presets)[1] for name in names}
    checker = Checker(Trials(bases, names[0], space))
    search_space.dry_run(space, checker)
    if options.scheduler == "pbt":
        checker.check_exchange()
    first = bases[names[0]]
    name = first.name or f"{names[0]}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    trials = replace(checker.trials, experiments=tuple(checker.experiments))
    return execute(options, trials, name, {"arguments": list(rest)})


def split_preset(rest: Sequence[str]) -> tuple[str, list[str]]:
    """`[PRESET] --path value …` to the preset's name (demo where none is given) and its options."""
    arguments = list(rest)
    given = bool(arguments) and not arguments[0].startswith("-")
    return (arguments[0], arguments[1:]) if given else ("demo", arguments)


def execute(options: Sweep, trials: Trials, name: str, record: Mapping[str, Any]) -> Finished:
    """Start or resume the trials, wait for them, log the best.

    Args:
        options: of the sweep.
        trials: checked.
        name: of the sweep.
        record: what makes it this sweep and no other; a resumed one must have the same.

    Raises:
        ValueError: another sweep of that name is there, none is there to be resumed, or the cluster is too small.
    """
    first = next(iter(trials.bases.values()))
    check_storage(trials.bases.values())
    folder = storage.join(storage.absolute(first.storage), name)
    record = record_of(options, record)
    before = read_record(folder, name, record, options.resume)
    experiments = trials.experiments or tuple(trials.bases.values())
    concurrent, rounds = join_cluster(options.concurrent, experiments), rounds_of(experiments)
    if options.scheduler == "pbt":
        check_population(options.samples, concurrent)
    bases = ready_bases(options, trials, concurrent)
    if options.scheduler == "pbt":
        # What one trial takes over another may have left behind for better ones.
        bases = {key: replace(base, train=replace(base.train, keep=rounds + 1)) for key, base in bases.items()}
    parent = open_parent(options, trials, bases, folder, name, before)
    if not before:
        content = {"run_id": parent.run_id, **record}
        storage.write_bytes(storage.join(folder, RECORD), json.dumps(content, indent=1).encode())
    names = search_space.short_names([path for path, domain in trials.space.items() if not domain.constant])
    plan = Plan(bases, trials.preset, folder, parent, trials.space, names, trials.rows, options.metric, options.mode)
    with runs.ending(parent):
        lines = run(options, plan, concurrent, rounds)
        return conclude(name, lines, plan, first)


def record_of(options: Sweep, more: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a sweep this one and no other, as it is written beside it."""
    given = {key: value for key, value in asdict(options).items() if key not in ("resume", "concurrent")}
    return json.loads(json.dumps({**given, **more}))


def ready_bases(options: Sweep, trials: Trials, concurrent: int) -> dict[str, Experiment]:
    """What the trials change, with all the data prepared that any of them may draw.

    Raises:
        ValueError: some of it cannot be prepared.
    """
    first, drawn = next(iter(trials.bases.values())), {}
    for one in trials.experiments:
        if repr(one.data) not in drawn:
            drawn[repr(one.data)] = ready(one, concurrent, first, options.metric, options.mode)
    with_data = next(iter(drawn.values()), first)
    bases = {}
    for key, base in trials.bases.items():
        # A sweep over data.root needs none outside of it; every trial brings its own.
        given = base if base.data.root or ROOT not in trials.space else replace(base, data=with_data.data)
        bases[key] = ready(given, concurrent, first, options.metric, options.mode)
    return bases


def open_parent(
    options: Sweep,
    trials: Trials,
    bases: Mapping[str, Experiment],
    folder: str,
    name: str,
    before: Mapping[str, Any],
) -> runs.Run:
    """The MLflow run above all trials."""
    base = next(iter(bases.values()))
    named = replace(base.tracking, name=name)
    local = folder.rsplit("/", 1)[0] if "://" not in folder else "runs"
    if before:
        return runs.start(named, local, run_id=before["run_id"])
    given = {key: value for key, value in asdict(options).items() if key not in ("sweep", "resume")}
    params = {"presets": " ".join(bases), **given, "trials given": len(trials.rows)}
    params |= {path: f"{domain.kind}{domain.values}" for path, domain in trials.space.items()}
    tags = {"kind": "study" if trials.rows else "sweep", "sweep": " ".join(options.sweep)}
    return runs.start(named, local, params=params, tags=tags)


def run(options: Sweep, plan: Plan, concurrent: int, rounds: int) -> list[progress.Line]:
    """All trials, through Ray Tune.

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
    trial_limit = create_trial_limit(plan.parent.run_id, concurrent)
    try:
        tuner.fit()
    finally:
        close_children(plan.parent)
        if ray.is_initialized():  # its handler of SIGTERM may have ended it
            ray.kill(trial_limit)
    lines = progress.read(plan.folder)
    if not all(line.ended for line in lines):  # Tune takes the first Ctrl-C for an end as any other
        raise KeyboardInterrupt
    return lines


def tuner_of(options: Sweep, plan: Plan, concurrent: int, rounds: int) -> Any:
    """A new tuner, or the one that the sweep had."""
    from ray import tune

    filesystem, path = storage.resolve(plan.folder)
    function = tune.with_parameters(trial.run_trial, plan=plan)
    trainable = tune.with_resources(function, {"CPU": concurrency.DRIVER_CPUS, "memory": concurrency.DRIVER_MEMORY})
    if restorable(plan.folder):
        state = storage.join(path, STATE)
        return tune.Tuner.restore(state, trainable, resume_errored=True, storage_filesystem=filesystem)
    space = search_space.to_tune(plan.space, options.searcher == "grid")
    if plan.rows:
        space = {"row": tune.grid_search(list(range(len(plan.rows))))}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode=options.mode,
            num_samples=options.samples,
            search_alg=searcher(options.searcher, options.mode, options.search_seed, concurrent),
            scheduler=scheduler(options, plan.space, rounds),
            max_concurrent_trials=concurrent if options.searcher == "optuna" else None,
            trial_dirname_creator=folder_name,
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[progress.Progress(plan)],
            verbose=0,
        ),
    )


def folder_name(one: Any) -> str:
    """Of a trial in Tune's state: without the options, which may hold slashes."""
    return one.trial_id


def ready(
    base: Experiment, concurrent: int, first: Experiment, metric: str = "val/pq", mode: str = "max"
) -> Experiment:
    """An experiment with paths that hold in every process, its data prepared, as many threads as its trials may have,
    and checkpoints kept by what the trials are compared by.

    Raises:
        ValueError: it has no data, or data that cannot be prepared.
    """
    root = storage.absolute(first.storage)
    data = replace(base.data, shards=base.data.shards or storage.join(root, "shards"))
    if data.root != "scenes":
        data = replace(data, root=storage.absolute(data.root)) if data.root else data
    local = first.storage if "://" not in first.storage else "runs"
    uri = runs.resolve_uri(first.tracking, local)
    threads = base.train.threads or max(1, (os.cpu_count() or 1) // (concurrent * base.train.workers))
    named = replace(base, data=data, storage=root, tracking=replace(base.tracking, uri=uri, register=""))
    train_set, _ = prepare_data(named)
    if data.root == "scenes":  # drawn below the storage, which is another folder in a trial
        named = replace(named, data=replace(data, root=str(PurePosixPath(train_set.uri).parent)))
    return replace(named, train=replace(named.train, threads=threads, score=metric, score_mode=mode))
