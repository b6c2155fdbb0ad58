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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pipelines import storage, tracking
from pipelines.config import Experiment, parse
from pipelines.sweeps import progress, search, trial
from pipelines.sweeps.freezing import check_freezing, meta_model
from pipelines.sweeps.room import join_cluster, ready
from pipelines.sweeps.schedulers import scheduler, searcher
from pipelines.sweeps.search import PRESET, Space
from pipelines.sweeps.trial import Plan, Row
from pipelines.worker import accumulation, load_checkpoint

STATE = "tune"
RECORD = "sweep.json"

ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "60"}
"""Of Ray Tune: MLflow and our table take the place of its loggers."""


@dataclass(frozen=True)
class Sweep:
    """What is searched, and how. Options of the experiment (`jobs/train.py PRESET --help`) hold for every trial."""

    sweep: tuple[str, ...] = ()
    """path=expression: grid(…) choice(…) uniform(a,b) loguniform(a,b) randint(a,b) quniform(a,b,step), or a value;
    the path is any option, or `preset`; model.backbone.freeze takes schedules such as '5 2@500' too."""
    samples: int = 1
    """Trials; with grids, draws of the other values for each of their combinations."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """random draws; grid enumerates choices too; optuna learns from finished trials (extra `search`)."""
    scheduler: Literal["none", "asha", "hyperband", "pbt", "median"] = "none"
    """Which trials end early. pbt: population based training, the worst take over weights and options of the best."""
    metric: str = "val/pq"
    """What the trials are compared by: any metric of a validation."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    grace: int = 1
    """Validations that each trial gets before it may be ended (pbt: between two exchanges)."""
    reduction: int = 3
    """asha, hyperband: one in so many trials goes on."""
    concurrent: int = 0
    """Trials at once; 0 = as many as the cluster holds without waiting for each other."""
    resume: bool = False
    """Go on with the sweep of this --name."""
    search_seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Trials:
    """Everything that is needed to start: what `execute` takes."""

    bases: Mapping[str, Experiment]
    preset: str
    space: Space = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Finished:
    """What a sweep leaves."""

    name: str
    folder: str
    lines: list[progress.Line]
    best: progress.Line | None
    checkpoint: str
    """Best one of the best trial, "" without one."""
    model: str
    """MLflow URI of its model."""
    parent: tracking.Run
    table: str


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
    space = search.parse(options.sweep)
    check_options(options, space)
    chosen, arguments = split_preset(rest)
    names = [str(value) for value in space[PRESET].values] if PRESET in space else [chosen]
    unknown = [name for name in names if name not in presets]
    if unknown:
        raise ValueError(f"preset {', '.join(unknown)} is unknown; there are: {', '.join(sorted(presets))}")
    bases = {name: parse([name, *arguments], presets)[1] for name in names}
    trials = Trials(bases, names[0], space)
    search.dry_run(space, Checker(trials))
    first = bases[names[0]]
    name = first.name or f"{names[0]}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    return execute(options, trials, name, {"sweep": list(options.sweep), "arguments": list(rest)})


def split_preset(rest: Sequence[str]) -> tuple[str, list[str]]:
    """`[PRESET] --path value …` to the preset's name (demo where none is given) and its options."""
    arguments = list(rest)
    given = bool(arguments) and not arguments[0].startswith("-")
    return (arguments[0], arguments[1:]) if given else ("demo", arguments)


def check_options(options: Sweep, space: Space) -> None:
    """Combinations that Tune cannot do.

    Raises:
        ValueError: says what to write instead.
    """
    kinds = {domain.kind for domain in space.values()}
    gridded = [path for path, domain in space.items() if domain.kind == "grid" and len(domain.values) > 1]
    if options.searcher == "grid" and kinds - {"grid", "choice"}:
        raise ValueError("--searcher grid enumerates: write grid(…) or choice(…) for every path")
    if gridded and (options.searcher == "optuna" or options.scheduler == "pbt"):
        which = "--searcher optuna" if options.searcher == "optuna" else "--scheduler pbt"
        raise ValueError(f"{which} draws values: write choice(…) instead of grid(…) for {', '.join(gridded)}")
    if options.searcher == "optuna" and options.scheduler == "pbt":
        raise ValueError("--scheduler pbt changes options itself and takes no --searcher optuna; leave that out")
    if options.scheduler == "pbt" and options.samples < 2:
        raise ValueError("--scheduler pbt needs a population: --samples 4 or more")
    if options.scheduler == "pbt" and PRESET in space:
        raise ValueError("--scheduler pbt: weights of one architecture do not fit another; leave preset out")
    if options.samples < 1 or options.grace < 1 or options.reduction < 2 or options.concurrent < 0:
        raise ValueError("--samples and --grace are 1 or more, --reduction 2 or more, --concurrent 0 or more")
    if options.searcher == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "--searcher optuna needs the extra `search`: pip install 'panoptic-ray[search]'"
            ) from error


class Checker:
    """Whether a draw makes an experiment that can train; models are built without memory, each once."""

    def __init__(self, trials: Trials, allow_lacking: bool = False) -> None:
        """Args:
        trials: of the sweep.
        allow_lacking: frozen parts will get their weights before anything starts.
        """
        self.trials, self.allow_lacking = trials, allow_lacking
        self.experiments: list[Experiment] = []
        self._built: set[str] = set()

    def __call__(self, values: Mapping[str, Any]) -> Experiment:
        """Raises:
        ValueError: it does not.
        """
        changes = {path: value for path, value in values.items() if path != PRESET}
        return self.check(values.get(PRESET, self.trials.preset), changes)

    def check(self, preset: str, changes: Mapping[str, Any]) -> Experiment:
        """The experiment of a preset with changes.

        Raises:
            ValueError: there is none, or it cannot train.
        """
        experiment, schedule = trial.apply(self.trials.bases[preset], changes)
        options, trunk = experiment.train, experiment.model.backbone
        accumulation(options.batch, options.workers, options.micro_batch)
        for stages in {stages for _, stages in schedule}:
            part = replace(experiment, model=replace(experiment.model, backbone=replace(trunk, freeze=stages)))
            if repr(part.model) not in self._built:
                meta_model(part)
                self._built.add(repr(part.model))
            if not self.allow_lacking:
                check_freezing(part)
        self.experiments.append(experiment)
        return experiment


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
    folder = storage.join(storage.absolute(first.storage), name)
    before = read_record(folder, name, record, options.resume)
    concurrent = join_cluster(options.concurrent, list(trials.bases.values()))
    bases = {key: ready(base, concurrent, first) for key, base in trials.bases.items()}
    parent = open_parent(options, trials, bases, folder, name, before)
    if not before:
        content = {"run_id": parent.run_id, **record}
        storage.write_bytes(storage.join(folder, RECORD), json.dumps(content, indent=1).encode())
    names = search.short_names([path for path, domain in trials.space.items() if not domain.constant])
    plan = Plan(bases, trials.preset, folder, parent, trials.space, names, trials.rows, options.metric, options.mode)
    with tracking.ending(parent):
        lines = run(options, plan, concurrent)
        return conclude(name, lines, plan, first)


def read_record(folder: str, name: str, record: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """What the sweep of this name was started with; {} for a new one."""
    file = storage.join(folder, RECORD)
    if not storage.exists(file):
        if resume:
            raise ValueError(f"--resume: there is no sweep {name!r} in {PurePosixPath(folder).parent}; give its --name")
        if storage.exists(folder):
            raise ValueError(f"{folder} exists and is no sweep; choose another --name")
        return {}
    before = json.loads(storage.read_bytes(file))
    if not resume:
        raise ValueError(f"a sweep {name!r} is there already; go on with --resume, or choose another --name")
    for key in ("sweep", "arguments"):
        if before[key] != record[key]:
            raise ValueError(
                f"sweep {name!r} was started with {' '.join(before[key])}, not {' '.join(record[key])}; resume it "
                "as it was, or choose another --name"
            )
    return before


def open_parent(
    options: Sweep,
    trials: Trials,
    bases: Mapping[str, Experiment],
    folder: str,
    name: str,
    before: Mapping[str, Any],
) -> tracking.Run:
    """The MLflow run above all trials."""
    base = next(iter(bases.values()))
    named = replace(base.tracking, name=name)
    local = folder.rsplit("/", 1)[0] if "://" not in folder else "runs"
    if before:
        return tracking.start(named, local, run_id=before["run_id"])
    given = {key: value for key, value in asdict(options).items() if key not in ("sweep", "resume")}
    params = {"presets": " ".join(bases), **given, "trials given": len(trials.rows)}
    params |= {path: f"{domain.kind}{domain.values}" for path, domain in trials.space.items()}
    tags = {"kind": "study" if trials.rows else "sweep", "sweep": " ".join(options.sweep)}
    return tracking.start(named, local, params=params, tags=tags)


def run(options: Sweep, plan: Plan, concurrent: int) -> list[progress.Line]:
    """All trials, through Ray Tune."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import tune

    for name in ("ray.tune", "ray.tune.analysis.experiment_analysis"):  # reasons stand in our table
        logging.getLogger(name).setLevel(logging.CRITICAL)
    filesystem, path = storage.resolve(plan.folder)
    function = tune.with_parameters(trial.run_trial, plan=plan)
    trainable = tune.with_resources(function, {"CPU": trial.DRIVER_CPUS})
    state = storage.join(path, STATE)
    if storage.exists(storage.join(plan.folder, STATE, "tuner.pkl")):
        tuner = tune.Tuner.restore(state, trainable, resume_errored=True, storage_filesystem=filesystem)
    else:
        space = search.to_tune(plan.space, options.searcher == "grid")
        if plan.rows:
            space = {"row": tune.grid_search(list(range(len(plan.rows))))}
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="objective",
                mode=options.mode,
                num_samples=options.samples,
                search_alg=searcher(options.searcher, options.mode, options.search_seed, concurrent),
                scheduler=scheduler(options, plan),
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
    tuner.fit()
    return progress.read(plan.folder)


def folder_name(one: Any) -> str:
    """Of a trial in Tune's state: without the options, which may hold slashes."""
    return one.trial_id


def conclude(name: str, lines: list[progress.Line], plan: Plan, first: Experiment) -> Finished:
    """The table in MLflow, and the best trial's model."""
    tracker = tracking.Tracker(plan.parent)
    text = progress.table(lines, progress.short_metric(plan.metric), plan.mode, most=len(lines) + 1)
    tracker.table("trials", progress.rows(lines, plan.metric), text)
    ordered = progress.ranked(lines, plan.mode)
    best = ordered[0] if ordered and ordered[0].best == ordered[0].best else None
    checkpoint = model = ""
    if best is not None:
        checkpoint = trial.best_of(trial.all_checkpoints(plan.folder, best.identity), plan.metric, plan.mode)
        tracker.metrics(best.step, {f"best/{plan.metric}": best.best})
        tracker.tags({"best_trial": best.label, "best_checkpoint": checkpoint})
    tracker.close()
    if checkpoint:
        model = log_best(plan.parent, checkpoint, first)
    told = "" if best is None else f"Best: **{best.label}**, {plan.metric} {best.best:.2f}\n\n"
    tracking.describe(plan.parent, f"{told}```\n{text}\n```")
    return Finished(name, plan.folder, lines, best, checkpoint, model, plan.parent, text)


def log_best(parent: tracking.Run, checkpoint: str, first: Experiment) -> str:
    """MLflow URI of a checkpoint's model, logged with the sweep and registered where `tracking.register` says so."""
    from pipelines.mlflow_model import log_model

    names = first.tracking
    try:
        return log_model(parent, load_checkpoint(checkpoint), first.resize, register=names.register, alias=names.alias)
    except Exception as error:  # whatever MLflow, requests or SQLAlchemy raise: the checkpoint is safe
        print(f"the best model could not be logged ({error}); its checkpoint is {checkpoint}", file=sys.stderr)
        return ""


def closing_words(done: Finished) -> str:
    """The table, and where things lie."""
    return "\n".join(
        [
            "",
            done.table,
            "",
            f"sweep       {done.folder}",
            f"best        {done.best.label if done.best else 'no trial reported a validation'}",
            f"checkpoint  {done.checkpoint or '-'}",
            f"model       {done.model or '-'}",
            f"MLflow      {done.parent.tracking_uri}, run {done.parent.run_id}",
        ]
    )
