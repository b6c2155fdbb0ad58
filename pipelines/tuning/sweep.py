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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from panoptic.training.transfer import COUNTER
from pipelines.cluster import storage
from pipelines.config import Experiment, parse
from pipelines.tracking import runs
from pipelines.training.preflight import check_freezing, meta_model
from pipelines.training.worker import accumulation
from pipelines.tuning import progress, search_space, trial, trial_config
from pipelines.tuning.checks import WeightsCheck
from pipelines.tuning.concurrency import join_cluster, ready
from pipelines.tuning.failures import close_children
from pipelines.tuning.plan import Plan, Row
from pipelines.tuning.results import Finished, conclude
from pipelines.tuning.resume import RECORD, STATE, read_record, restorable
from pipelines.tuning.schedulers import rounds_of, scheduler, searcher
from pipelines.tuning.search_space import PRESET, Space
from pipelines.tuning.trial_limit import create_trial_limit

ROOT = "data.root"

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
    """Which trials end early. hyperband: asha with several brackets, which begin to end trials later and later. pbt:
    population based training, the worst take over weights and options of the best."""
    metric: str = "val/pq"
    """What the trials are compared by, and which of their checkpoints are kept: any metric of a validation."""
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
    experiments: tuple[Experiment, ...] = ()
    """Of the dry run: every kind of trial that may be drawn. What the cluster must hold, and for how long."""


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
    if options.searcher == "optuna" and all(domain.constant for domain in space.values()):
        raise ValueError("--searcher optuna: every path has one value, so there is nothing to draw")
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


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Checker:
    """Whether a draw makes an experiment that can train, and its backbone's weights fit; models are built without
    memory, each once."""

    def __init__(self, trials: Trials, allow_lacking: bool = False) -> None:
        """Args:
        trials: of the sweep.
        allow_lacking: frozen parts will get their weights before anything starts.
        """
        self.trials, self.allow_lacking = trials, allow_lacking
        self.experiments: list[Experiment] = []
        self._built: dict[str, Shapes] = {}
        self._fitting = WeightsCheck()

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
        experiment, schedule = trial_config.apply(self.trials.bases[preset], changes)
        options, backbone = experiment.train, experiment.model.backbone
        accumulation(options.batch, options.workers, options.micro_batch)
        for stages in {stages for _, stages in schedule}:
            part = replace(experiment, model=replace(experiment.model, backbone=replace(backbone, freeze=stages)))
            self._shapes(part)
            if not self.allow_lacking:
                check_freezing(part)
        self._fitting.check(experiment)
        self.experiments.append(experiment)
        return experiment

    def _shapes(self, experiment: Experiment) -> Shapes:
        """Of all tensors of its model."""
        key = repr(experiment.model)
        if key not in self._built:
            state = meta_model(experiment).state_dict()
            # A frozen norm holds the same tensors in another order, timm's without the counter.
            shapes = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}
            self._built[key] = tuple(sorted(shapes.items()))
        return self._built[key]

    def check_exchange(self) -> None:
        """Population based training moves weights between trials.

        Raises:
            ValueError: a path of the space changes their shapes.
        """
        first = next(search_space.probes(self.trials.space))
        for path, domain in self.trials.space.items():
            drawn = [self({**first, path: value}) for value in domain.probes()]
            if len({self._shapes(experiment) for experiment in drawn}) > 1:
                raise ValueError(
                    f"--scheduler pbt: {path} changes the shapes of the model's weights, which no trial could take "
                    "over from another; leave it out, or choose another scheduler"
                )


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


def check_storage(bases: Iterable[Experiment]) -> None:
    """Drawn scenes need a local folder.

    Raises:
        ValueError: says so before anything is started.
    """
    for base in bases:
        if base.data.root == "scenes" and "://" in base.storage:
            raise ValueError(
                f"data.root scenes: the scenes are drawn into a local folder, but storage is {base.storage}; set "
                "--storage to one, or give --data.root"
            )


def check_population(samples: int, concurrent: int) -> None:
    """A population exchanges only while all of it trains.

    Raises:
        ValueError: it does not fit.
    """
    if concurrent < samples:
        raise ValueError(
            f"--scheduler pbt: a population of --samples {samples} must train at once, and {concurrent} trials do; "
            f"lower --samples to {concurrent}, let more of them share a machine's cores with --concurrent {samples}, "
            "or give each trial less with --train.workers and --train.cpus-per-worker"
        )


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
    trainable = tune.with_resources(function, {"CPU": trial.DRIVER_CPUS, "memory": trial.DRIVER_MEMORY})
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
