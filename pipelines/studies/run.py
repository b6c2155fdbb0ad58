"""Running a study: the rows of a table as trials, on any data and any budget, our figures beside the paper's."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.cluster import storage
from pipelines.config import Experiment, check_run_name, flatten, parse, typed_paths
from pipelines.studies import STUDIES
from pipelines.studies.config import Options, Presets, check, seeds_of
from pipelines.studies.evaluate import RowResult, evaluate_row
from pipelines.studies.plan import (
    PlannedTrial,
    begins_with_imagenet,
    experiment_of,
    key_of,
    label_of,
    limited,
    plan,
    short_name,
    with_weights,
)
from pipelines.studies.statistics import Cell
from pipelines.studies.study import COSTS, DECIMALS, METRICS, UNITS, small_value
from pipelines.studies.table import Table, table_of
from pipelines.tracking import runs
from pipelines.tracking import tracker as tracker_module
from pipelines.tracking.curves import curves
from pipelines.training.driver import prepare_data
from pipelines.training.preflight import check_weights, lacking
from pipelines.training.state import last_step
from pipelines.tuning import trial
from pipelines.tuning.checks import MissingWeights, TrialCheck, check_storage
from pipelines.tuning.concurrency import join_cluster
from pipelines.tuning.config import split_preset
from pipelines.tuning.plan import TrialConfig, Trials, run_id
from pipelines.tuning.progress import TrialResult
from pipelines.tuning.results import SweepResult
from pipelines.tuning.resume import read_record
from pipelines.tuning.sweep import execute, record_of

logger = logging.getLogger(__name__)

PRETRAIN_STEPS = 600
"""Steps on drawn scenes with --small, where --pretrain-steps says none."""

PRETRAIN = f"; or let the study train them on drawn scenes first: --pretrain-steps {PRETRAIN_STEPS}"
"""Remedy for frozen parts without weights."""


@dataclass(frozen=True)
class StudyResults:
    """The results of studies."""

    tables: Mapping[str, Table]
    """The table of each study, by the study's name."""
    text: str
    """The text of all tables, and the folder that they lie in."""
    sweep: SweepResult
    """The trainings of their rows."""


def run(options: Options, rest: Sequence[str], presets: Presets) -> StudyResults:
    """Run studies to their end.

    Args:
        options: which, how long, how many seeds.
        rest: `[PRESET] --path value …` for every row; a PRESET takes the place of the studies' own.
        presets: by name.

    Raises:
        ValueError: nothing was started; the message says what to change.
    """
    options = replace(options, seeds=seeds_of(options))
    planned, bases, name, trial_check = checked(options, rest, presets)
    pretrain_steps = pretraining(options)
    starts = {study: beginning(study, planned, bases, pretrain_steps) for study in options.study}
    for line in filter(None, starts.values()):
        print(line, flush=True)
    fetch_weights(trial_check.experiments)
    options = replace(options, concurrent=join_cluster(options.concurrent, trial_check.experiments))
    planned, bases = limited(planned, bases, typed_paths(rest))
    if pretrain_steps and any(map(lacking, trial_check.experiments)):
        for base in bases.values():
            prepare_data(base)  # what is wrong with it is said before minutes of pretraining
    planned = with_weights(planned, bases, pretrain_steps)
    sweep = train_rows(options, rest, planned, bases, name)
    results = evaluate_rows(planned, bases, sweep)
    tables = {
        study: table_of_study(
            study,
            results,
            budget_of(study, options, rest, bases),
            [*filter(None, (starts[study], substitutions(study, planned, bases) if options.small else ""))],
        )
        for study in options.study
    }
    return finish(tables, sweep, [f"{result.entry.label}: {result.reason}" for result in results if result.reason])


def pretraining(options: Options) -> int:
    """The steps for which frozen parts without weights are trained first."""
    return options.pretrain_steps or (PRETRAIN_STEPS if options.small else 0)


def fetch_weights(experiments: Iterable[Experiment]) -> None:
    """Look for the ImageNet weights of all rows, and download those that are not at hand, before anything starts.

    Raises:
        ValueError: they are not to be had; says what to install.
    """
    by_name = {one.model.backbone.timm_name: one for one in experiments if begins_with_imagenet(one)}
    for experiment in by_name.values():
        check_weights(experiment)


def checked(
    options: Options, rest: Sequence[str], presets: Presets
) -> tuple[list[PlannedTrial], dict[str, Experiment], str, TrialCheck]:
    """Rows, presets, name and trials of studies, after all checks that need no Ray.

    Arguments and errors are those of `run`.
    """
    options = replace(options, seeds=seeds_of(options))
    given = check(options, rest, presets)
    planned = plan(options, rest, presets)
    names = sorted({entry.preset for entry in planned})
    bases = {name: parse([name, *split_preset(rest)[1]], presets)[1] for name in names}
    name = check_run_name(bases[names[0]].name or f"study-{short_name(options.study)}-{time.strftime('%Y%m%d-%H%M%S')}")
    pretrain_steps = pretraining(options)
    trial_check = TrialCheck(Trials(bases, names[0]), allow_lacking=pretrain_steps > 0)
    check_rows(planned, trial_check, "" if given else PRETRAIN)
    check_storage(bases.values())
    if pretrain_steps:
        check_pretraining(trial_check.experiments)
    check_name(options, rest, bases[names[0]], name)
    return planned, bases, name, trial_check


def outline(options: Options, rest: Sequence[str], presets: Presets) -> str:
    """The rows that studies would train, each with the options that it sets, and where they would be written.

    Arguments and errors are those of `run`.
    """
    planned, bases, name, _ = checked(options, rest, presets)
    distinct: dict[str, list[PlannedTrial]] = {}
    for entry in planned:
        distinct.setdefault(key_of(entry, bases), []).append(entry)
    lines = [f"{len(planned)} rows under their seeds, {len(distinct)} trainings:"]
    for same in distinct.values():
        steps = last_step(experiment_of(same[0], bases).train)
        lines.append(f"  {' = '.join(entry.label for entry in same)}: {same[0].preset}, {steps:,} steps")
        lines += [f"    {path} {value}" for path, value in same[0].changes.items()]
    folder = storage.join(storage.absolute(next(iter(bases.values())).storage), name)
    return "\n".join([*lines, f"folder   {folder}", "dry run: nothing was started and nothing written"])


WEIGHTS = {
    "ImageNet": "a backbone trained on ImageNet (--model.backbone.weights imagenet, or FILE)",
    "COCO": "a model trained on COCO (--train.weights CHECKPOINT)",
}
"""The weights that a paper's models begin with, in words."""


def beginning(study: str, planned: Sequence[PlannedTrial], bases: Mapping[str, Experiment], pretrain_steps: int) -> str:
    """A line that says that a study begins from ImageNet weights, or from others than its paper; "" from a checkpoint.

    Args:
        study: its name.
        planned: rows of all studies.
        bases: experiments by preset.
        pretrain_steps: for which parts that are frozen without weights are trained on drawn scenes; 0 = they are not.
    """
    begins = STUDIES[study].begins
    experiments = [experiment_of(entry, bases) for entry in planned if entry.study == study]
    given = [
        one.train.weights or (begins == "ImageNet" and one.model.backbone.weights != "none") for one in experiments
    ]
    names = sorted({one.model.backbone.name for one in experiments if begins_with_imagenet(one)})
    if not begins or all(given):
        if begins != "ImageNet" or not names:
            return ""
        return f"{study}: begins with ImageNet weights, as the paper's models: {', '.join(names)}"
    drawn = pretrain_steps > 0 and any(map(lacking, experiments))
    ours = "a training on drawn scenes" if drawn else "random weights"
    if names:
        ours += f", the backbone with ImageNet weights ({', '.join(names)})"
    elif begins == "ImageNet":
        without = sorted({one.model.backbone.name for one in experiments if one.model.backbone.weights == "none"})
        ours += f"; no package has ImageNet weights of {', '.join(without)}"
    return f"{study}: the paper's models begin with {WEIGHTS[begins]}, these with {ours}"


def substitutions(study: str, planned: Sequence[PlannedTrial], bases: Mapping[str, Experiment]) -> str:
    """A line that names the values that --small takes in place of the paper's; "" where there are none.

    Args:
        study: its name.
        planned: rows of all studies.
        bases: experiments by preset.
    """
    definition, changed = STUDIES[study], dict[str, None]()
    with_weights = any(begins_with_imagenet(bases[entry.preset]) for entry in planned if entry.study == study)
    for row in definition.trained:
        paper = {**definition.setting, **row.change}
        small = row.change if row.small_change is None else row.small_change
        for path, value in {**definition.setting, **small}.items():
            own = small_value(path, value, with_weights)
            if own != paper.get(path, own):
                changed[f"{path} {paper[path]} is {own}"] = None
    return f"With --small: {'; '.join(changed)}." if changed else ""


def check_rows(planned: Sequence[PlannedTrial], trial_check: TrialCheck, remedy: str) -> None:
    """Check that every row makes an experiment that can train, and that the weights it starts from fit it.

    Args:
        planned: rows.
        trial_check: collects their experiments.
        remedy: added to the message where weights are missing.

    Raises:
        ValueError: names the row, and what to change.
    """
    for entry in planned:
        try:
            trial_check.check(entry.preset, entry.changes)
        except MissingWeights as error:
            raise ValueError(f"{entry.label}: {error}{remedy}") from error
        except ValueError as error:
            raise ValueError(f"{entry.label}: {error}") from error


def check_name(options: Options, rest: Sequence[str], base: Experiment, name: str) -> None:
    """Check, before anything is trained, that the name is free or that `--resume` may go on with it.

    Raises:
        ValueError: another sweep has the name, or there is none to be resumed.
    """
    record = record_of(options, {"arguments": list(rest)})
    read_record(storage.join(storage.absolute(base.storage), name), name, record, options.resume)


def check_pretraining(experiments: Sequence[Experiment]) -> None:
    """Check that the weights of what is frozen can be trained: on scenes that are drawn into a local folder.

    Raises:
        ValueError: the storage is a bucket.
    """
    for experiment in experiments:
        if "://" in experiment.storage and lacking(experiment):
            raise ValueError(
                "the weights of what is frozen would be trained on scenes that are drawn into a local folder, but "
                f"storage is {experiment.storage}; set --storage to one, or give --model.backbone.weights FILE"
            )


def train_rows(
    options: Options,
    rest: Sequence[str],
    planned: Sequence[PlannedTrial],
    bases: Mapping[str, Experiment],
    name: str,
) -> SweepResult:
    """Train all rows as one sweep; rows that train the same are one trial.

    Args:
        options: of the studies.
        rest: options that hold for every row, as typed.
        planned: rows.
        bases: experiments by preset.
        name: of the sweep.
    """
    distinct: dict[str, PlannedTrial] = {}
    for entry in planned:
        distinct.setdefault(key_of(entry, bases), entry)
    # the experiments as they will train: those that were checked may be limited to more images than there are
    experiments = tuple(experiment_of(entry, bases) for entry in distinct.values())
    configs = tuple(map(trial_config_of, distinct.values()))
    trials = Trials(bases, min(bases), configs=configs, experiments=experiments)
    return execute(options, trials, name, {"arguments": list(rest)})


def trial_config_of(entry: PlannedTrial) -> TrialConfig:
    """A row as a trial of a sweep."""
    params = {"study": entry.study, "row": label_of(entry), "seed": entry.seed}
    return TrialConfig(entry.label, entry.preset, entry.changes, params)


def evaluate_rows(
    planned: Sequence[PlannedTrial], bases: Mapping[str, Experiment], sweep: SweepResult
) -> list[RowResult]:
    """The metrics of each row under each seed.

    Args:
        planned: rows.
        bases: experiments by preset.
        sweep: their trainings.
    """
    by_label = {result.label: result for result in sweep.trials}
    keys = [key_of(entry, bases) for entry in planned]
    trained: dict[str, tuple[str, dict[str, float]]] = {}
    for key, entry in zip(keys, planned, strict=True):
        if key not in trained:
            uri, values = last_validation(by_label.get(entry.label), sweep.folder)
            costly = uri and set(STUDIES[entry.study].columns) & set(COSTS)
            trained[key] = uri, values | (costs(by_label[entry.label], sweep) if costly else {})
    uris = {(entry.study, entry.row, entry.seed): trained[key][0] for entry, key in zip(planned, keys, strict=True)}
    return [
        evaluate_row(RowResult(entry, key, trained[key][1]), uris, bases[entry.preset], sweep.folder)
        for entry, key in zip(planned, keys, strict=True)
    ]


def last_validation(result: TrialResult | None, folder: str) -> tuple[str, dict[str, float]]:
    """URI and metrics of a trial's last checkpoint; "" and none where it did not come to its end."""
    if result is None or result.state != "finished":
        return "", {}
    kept = list(trial.all_checkpoints(folder, result.identity).items())
    return max(kept, key=lambda entry: entry[0].rsplit("/", 1)[1]) if kept else ("", {})


def costs(result: TrialResult, sweep: SweepResult) -> dict[str, float]:
    """Time and memory of a step of a trial's training (`COSTS`), from the curves of its MLflow run; {} if not known.

    Args:
        result: of the trial.
        sweep: that trained it.
    """
    run = replace(sweep.parent, run_id=run_id(sweep.folder, result.identity))
    try:
        seconds, memory = curves(run, [METRICS[column] for column in COSTS]) if run.run_id else ([], [])
    except ConnectionError as error:
        logger.warning("%s: what its steps took is not known (%s)", result.label, error)
        return {}
    found = {"s/step": statistics.median(value for _, value in seconds)} if seconds else {}
    found |= {"MiB": memory[0][1]} if memory else {}
    return {METRICS[column]: value for column, value in found.items()}


def table_of_study(study: str, results: Sequence[RowResult], budget: str, notes: Sequence[str] = ()) -> Table:
    """The table of one study from the results of its rows.

    Args:
        study: its name.
        results: of all rows under all seeds.
        budget: steps and seeds, in words.
        notes: more lines below the table.
    """
    definition = STUDIES[study]
    cells: list[list[Cell]] = []
    for index, row in enumerate(definition.rows):
        seeds = [result for result in results if result.entry.study == study and result.entry.row == index]
        cells.append([])
        for figure, column in zip(row.figures(len(definition.columns)), definition.columns, strict=True):
            # two branches merged are one model: as if one training had made it
            merged = column == "PQ" and index in definition.merged
            trainings = tuple(f"merged, seed {one.entry.seed}" if merged else one.training for one in seeds)
            unit = UNITS.get(column, 1.0)
            ours = tuple(unit * one.values.get(METRICS[column], math.nan) for one in seeds)
            cells[-1].append(Cell(figure, ours, trainings, decimals=DECIMALS.get(column, 2)))
    return table_of(study, definition, cells, budget, notes)


def budget_of(study: str, options: Options, rest: Sequence[str], bases: Mapping[str, Experiment]) -> str:
    """Steps and seeds of a study in words, and what the user typed in place of what its table says."""
    steps = f"{options.steps} steps" if options.steps else "the preset's steps"
    definition, typed = STUDIES[study], typed_paths(rest)
    said = {*definition.setting, *(path for row in definition.rows for path in row.change)}
    said |= set() if options.small else set(definition.recipe)
    base = flatten(next(iter(bases.values())))
    instead = "".join(f", {path} {base[path]}" for path in sorted(typed & said))
    seeds = seeds_of(options)
    return f"{steps}, {seeds} seed{'s' if seeds > 1 else ''}{instead}"


def finish(tables: Mapping[str, Table], sweep: SweepResult, unevaluated: Sequence[str] = ()) -> StudyResults:
    """Write text, Markdown, CSV and plot of each study into the sweep's folder and MLflow, and return the results.

    Args:
        tables: by study.
        sweep: the trainings of their rows.
        unevaluated: rows that were trained and could not be evaluated, and why.
    """
    tracker = tracker_module.Tracker(sweep.parent)
    for name, table in tables.items():
        tracker.table(f"studies/{name}", table.rows, table.text)
        tracker.text(f"studies/{name}.md", table.markdown)
        tracker.text(f"studies/{name}.svg", table.plot)
        for ending, content in (("md", table.markdown), ("svg", table.plot), ("csv", table.csv)):
            storage.write_bytes(storage.join(sweep.folder, "studies", f"{name}.{ending}"), content.encode())
    tracker.close()
    text = "\n\n".join(table.text for table in tables.values())
    runs.describe(sweep.parent, "\n\n".join(table.markdown for table in tables.values()))
    failed = [f"{result.label}: {result.reason}" for result in sweep.trials if result.state != "finished"]
    failed += unevaluated
    more = "".join(f"\nwithout a figure: {reason}" for reason in failed)
    return StudyResults(
        tables,
        f"\n{text}\n{more}\ntables and plots: {sweep.folder}/studies, and MLflow run {sweep.parent.run_id}",
        sweep,
    )
