"""Running a study: the rows of a table as trials, on any data and any budget, our figures beside the paper's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.cluster import storage
from pipelines.config import Experiment, flatten, parse
from pipelines.studies import STUDIES
from pipelines.studies.evaluate import Result, outcome
from pipelines.studies.plan import (
    Options,
    Planned,
    Presets,
    check,
    experiment_of,
    key_of,
    label_of,
    limited,
    plan,
    short_name,
    typed_paths,
    with_weights,
)
from pipelines.studies.statistics import Cell
from pipelines.studies.study import METRICS
from pipelines.studies.table import Table, table_of
from pipelines.tracking import runs
from pipelines.tracking import tracker as tracker_module
from pipelines.training.driver import prepare_data
from pipelines.training.preflight import lacking
from pipelines.tuning import trial
from pipelines.tuning.checks import Checker, check_storage
from pipelines.tuning.concurrency import join_cluster
from pipelines.tuning.plan import Row as Trial
from pipelines.tuning.plan import Trials
from pipelines.tuning.progress import Line
from pipelines.tuning.resume import read_record
from pipelines.tuning.sweep import Finished, execute, record_of, split_preset


@dataclass(frozen=True)
class Report:
    """What studies leave."""

    tables: Mapping[str, Table]
    text: str
    finished: Finished


def run(options: Options, rest: Sequence[str], presets: Presets) -> Report:
    """Run studies to their end.

    Args:
        options: which, how long, how many seeds.
        rest: `[PRESET] --path value …` for every row; a PRESET takes the place of the studies' own.
        presets: by name.

    Raises:
        ValueError: nothing was started; the message says what to change.
    """
    given = check(options, rest, presets)
    planned = plan(options, rest, presets)
    names = sorted({entry.preset for entry in planned})
    bases = {name: parse([name, *split_preset(rest)[1]], presets)[1] for name in names}
    pretrain_steps = options.pretrain_steps or (600 if options.small else 0)
    checker = Checker(Trials(bases, names[0]), allow_lacking=pretrain_steps > 0)
    check_rows(planned, checker, "" if given else PRETRAIN)
    check_storage(bases.values())
    if pretrain_steps:
        check_pretraining(checker.experiments)
    name = bases[names[0]].name or f"study-{short_name(options.study)}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_name(options, rest, bases[names[0]], name)
    options = replace(options, concurrent=join_cluster(options.concurrent, checker.experiments))
    planned, bases = limited(planned, bases, typed_paths(rest))
    if pretrain_steps and any(map(lacking, checker.experiments)):
        for base in bases.values():
            prepare_data(base)  # what is wrong with it is said before minutes of pretraining
    planned = with_weights(planned, bases, pretrain_steps)
    keys = [key_of(entry, bases) for entry in planned]
    distinct = {key: entry for key, entry in reversed(list(zip(keys, planned, strict=True)))}
    rows = tuple(trial_of(distinct[key]) for key in dict.fromkeys(keys))
    # as they will train: the data of the checked ones may be limited to more images than there are
    experiments = tuple(experiment_of(distinct[key], bases) for key in dict.fromkeys(keys))
    trials = Trials(bases, names[0], rows=rows, experiments=experiments)
    done = execute(options, trials, name, {"arguments": list(rest)})
    lines = {line.label: line for line in done.lines}
    found = {key: results(lines.get(entry.label), done.folder) for key, entry in distinct.items()}
    uris = {(e.study, e.row, e.seed): found[key][0] for e, key in zip(planned, keys, strict=True)}
    outcomes = [
        outcome(Result(entry, key, found[key][1]), uris, bases[entry.preset], done.folder)
        for entry, key in zip(planned, keys, strict=True)
    ]
    told = {study: budget_of(study, options, rest, bases) for study in options.study}
    tables = {study: build(study, outcomes, told[study]) for study in options.study}
    return finish(tables, done, [f"{one.entry.label}: {one.reason}" for one in outcomes if one.reason])


PRETRAIN = "; or let the study train them on drawn scenes first: --pretrain-steps 600"


def check_rows(planned: Sequence[Planned], checker: Checker, remedy: str) -> None:
    """Every row makes an experiment that can train, and the weights it starts from fit it.

    Args:
        planned: rows.
        checker: of the sweep; keeps their experiments.
        remedy: added where weights are missing.

    Raises:
        ValueError: names the row, and what to change.
    """
    for entry in planned:
        try:
            checker.check(entry.preset, entry.changes)
        except ValueError as error:
            raise ValueError(f"{entry.label}: {error}{remedy if 'noise' in str(error) else ''}") from error


def check_name(options: Options, rest: Sequence[str], base: Experiment, name: str) -> None:
    """Whether the name is free, or `--resume` may go on with it, before anything is trained.

    Raises:
        ValueError: another sweep has the name, or there is none to be resumed.
    """
    record = record_of(options, {"arguments": list(rest)})
    read_record(storage.join(storage.absolute(base.storage), name), name, record, options.resume)


def check_pretraining(experiments: Sequence[Experiment]) -> None:
    """Weights for what is frozen are trained on drawn scenes.

    Raises:
        ValueError: these need a local folder.
    """
    for experiment in experiments:
        if "://" in experiment.storage and lacking(experiment):
            raise ValueError(
                "the weights of what is frozen would be trained on scenes that are drawn into a local folder, but "
                f"storage is {experiment.storage}; set --storage to one, or give --model.backbone.weights FILE"
            )


def trial_of(entry: Planned) -> Trial:
    """A row as Tune takes it."""
    params = {"study": entry.study, "row": label_of(entry), "seed": entry.seed}
    return Trial(entry.label, entry.preset, entry.changes, params)


def results(line: Line | None, folder: str) -> tuple[str, dict[str, float]]:
    """URI and metrics of a trial's last checkpoint; "" and none where it did not come to its end."""
    if line is None or line.state != "finished":
        return "", {}
    kept = list(trial.all_checkpoints(folder, line.identity).items())
    return max(kept, key=lambda entry: entry[0].rsplit("/", 1)[1]) if kept else ("", {})


def build(study: str, outcomes: Sequence[Result], budget: str) -> Table:
    """The table of one study from the results of its rows."""
    definition = STUDIES[study]
    cells: list[list[Cell]] = []
    for index, row in enumerate(definition.rows):
        mine = [one for one in outcomes if one.entry.study == study and one.entry.row == index]
        paper = (*row.paper, *([None] * (len(definition.columns) - len(row.paper))))
        cells.append([])
        for figure, column in zip(paper, definition.columns, strict=True):
            # two branches merged are one model: as if one training had made it
            merged = column == "PQ" and index in definition.merged
            trainings = tuple(f"merged, seed {one.entry.seed}" if merged else one.training for one in mine)
            ours = tuple(one.values.get(METRICS[column], math.nan) for one in mine)
            cells[-1].append(Cell(figure, ours, trainings))
    return table_of(study, definition, cells, budget)


def budget_of(study: str, options: Options, rest: Sequence[str], bases: Mapping[str, Experiment]) -> str:
    """Steps and seeds of a study in words, and what the user typed in place of what its table says."""
    steps = f"{options.steps} steps" if options.steps else "the preset's steps"
    definition, typed = STUDIES[study], typed_paths(rest)
    said = {*definition.setting, *(path for row in definition.rows for path in row.change)}
    said |= set() if options.small else set(definition.recipe)
    base = flatten(next(iter(bases.values())))
    instead = "".join(f", {path} {base[path]}" for path in sorted(typed & said))
    return f"{steps}, {options.seeds} seed{'s' if options.seeds > 1 else ''}{instead}"


def finish(tables: Mapping[str, Table], done: Finished, unevaluated: Sequence[str] = ()) -> Report:
    """Print-out, and the same in MLflow: text, Markdown, CSV and plot of each study.

    Args:
        tables: by study.
        done: what the sweep left.
        unevaluated: rows that were trained and could not be evaluated, and why.
    """
    tracker = tracker_module.Tracker(done.parent)
    for name, table in tables.items():
        tracker.table(f"studies/{name}", table.rows, table.text)
        tracker.text(f"studies/{name}.md", table.markdown)
        tracker.text(f"studies/{name}.svg", table.plot)
        for ending, content in (("md", table.markdown), ("svg", table.plot), ("csv", table.csv)):
            storage.write_bytes(storage.join(done.folder, "studies", f"{name}.{ending}"), content.encode())
    tracker.close()
    text = "\n\n".join(table.text for table in tables.values())
    runs.describe(done.parent, "\n\n".join(table.markdown for table in tables.values()))
    failed = [f"{line.label}: {line.reason}" for line in done.lines if line.state != "finished"]
    failed += unevaluated
    more = "".join(f"\nwithout a figure: {line}" for line in failed)
    return Report(
        tables, f"\n{text}\n{more}\ntables and plots: {done.folder}/studies, and MLflow run {done.parent.run_id}", done
    )


def listing(presets: Presets) -> str:
    """Every study with its table, and why it cannot run yet where that is so."""
    lines = []
    for name, study in STUDIES.items():
        reason = unavailable(name, presets)
        lines.append(
            f"{name:18} {len(study.rows)} rows  {study.title}" + (f"\n{'':18} not yet: {reason}" if reason else "")
        )
    return "\n".join(lines)


def unavailable(name: str, presets: Presets) -> str:
    """Why a study's rows are not understood yet: a preset or an option that has not landed; "" where all are."""
    for small in (False, True):
        options = Options(study=(name,), small=small)
        try:
            check(options, [], presets)
            plan(options, [], presets)  # refuses options that do not exist
        except ValueError as error:
            return str(error)
    return ""
