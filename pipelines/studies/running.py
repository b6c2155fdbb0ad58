"""Running a study: the rows of a table as trials, on any data and any budget, our figures beside the paper's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines import storage, tracking
from pipelines.config import Experiment, flatten, override, parse
from pipelines.studies import STUDIES
from pipelines.studies.judging import COSTLY, judged, merged_quality
from pipelines.studies.results import Cell, Table, table_of
from pipelines.studies.table import METRICS, SMALL, Row, Study
from pipelines.sweeps import trial
from pipelines.sweeps.freezing import lacking
from pipelines.sweeps.plan import Row as Trial
from pipelines.sweeps.pretrain import pretrained
from pipelines.sweeps.progress import Line
from pipelines.sweeps.room import join_cluster
from pipelines.train import prepare_data
from pipelines.tune import Checker, Finished, Sweep, Trials, check_storage, execute, split_preset

Presets = Mapping[str, Callable[[], Experiment]]


@dataclass(frozen=True)
class Options(Sweep):
    """A sweep (--sweep) or studies of the papers (--study)."""

    study: tuple[str, ...] = ()
    """Studies to run one after the other, sharing rows that are equal; `list` names them."""
    steps: int = 0
    """Training steps of a study's recipe; rows of other lengths, milestones and warm-up follow. 0 = the paper's."""
    seeds: int = 1
    """Seeds of every row; two or more give mean ± deviation, and say what exceeds it."""
    small: bool = False
    """The study on two CPU cores: its small preset, small trunks, from scratch."""
    pretrain_steps: int = 0
    """Where a row freezes parts without weights, train these on drawn scenes for so many steps first, once.
    0 = 600 with --small, else an error."""


@dataclass(frozen=True)
class Planned:
    """One row of a study under one seed."""

    study: str
    row: int
    seed: int
    preset: str
    changes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Of its trial."""
        return f"{self.study} {STUDIES[self.study].rows[self.row].label}, seed {self.seed}"


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
    for entry in planned:
        try:
            checker.check(entry.preset, entry.changes)
        except ValueError as error:
            raise ValueError(
                f"{entry.label}: {error}{'' if given or 'noise' not in str(error) else PRETRAIN}"
            ) from error
    check_storage(bases.values())
    if pretrain_steps:
        check_pretraining(checker.experiments)
    name = bases[names[0]].name or f"study-{short_name(options.study)}-{time.strftime('%Y%m%d-%H%M%S')}"
    options = replace(options, concurrent=join_cluster(options.concurrent, checker.experiments))
    planned = limited(planned, bases)
    planned = with_weights(planned, bases, pretrain_steps)
    keys = [key_of(entry, bases) for entry in planned]
    distinct = {key: entry for key, entry in reversed(list(zip(keys, planned, strict=True)))}
    ordered = [key for key in dict.fromkeys(keys)]
    rows = tuple(
        Trial(
            distinct[key].label,
            distinct[key].preset,
            distinct[key].changes,
            {"study": distinct[key].study, "row": label_of(distinct[key]), "seed": distinct[key].seed},
        )
        for key in ordered
    )
    trials = Trials(bases, names[0], rows=rows, experiments=tuple(checker.experiments))
    done = execute(options, trials, name, {"arguments": list(rest)})
    lines = {line.label: line for line in done.lines}
    found = {key: results(lines.get(distinct[key].label), done.folder) for key in ordered}
    uris = {(e.study, e.row, e.seed): found[key][0] for e, key in zip(planned, keys, strict=True)}
    figures = [
        (entry, measured(entry, uris, found[key][1], bases[entry.preset], done.folder))
        for entry, key in zip(planned, keys, strict=True)
    ]
    tables = {study: build(study, figures, options) for study in options.study}
    return finish(tables, done)


PRETRAIN = "; or let the study train them on drawn scenes first: --pretrain-steps 600"


def check(options: Options, rest: Sequence[str], presets: Presets) -> bool:
    """Whether a preset is given in place of the studies' own.

    Raises:
        ValueError: unknown studies or presets, or options that studies do not take.
    """
    unknown = [name for name in options.study if name not in STUDIES]
    if unknown:
        raise ValueError(f"--study {' '.join(unknown)}: unknown; there are: list, {', '.join(STUDIES)}")
    if options.sweep or options.samples != 1 or options.searcher != "random" or options.scheduler != "none":
        raise ValueError(
            "--study: its rows are given, and each trains to its end, or it has no figure; leave --sweep, --samples, "
            "--searcher and --scheduler out"
        )
    if options.seeds < 1 or options.steps < 0:
        raise ValueError("--seeds is 1 or more, --steps 0 (the paper's) or more")
    given = bool(rest) and not rest[0].startswith("-")
    needed = (
        [rest[0]]
        if given
        else [preset_of(STUDIES[s], row, options.small) for s in options.study for row in STUDIES[s].rows]
    )
    missing = sorted({name for name in needed if name not in presets})
    if missing:
        raise ValueError(f"preset {', '.join(missing)} is unknown; there are: {', '.join(sorted(presets))}")
    return given


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


def short_name(studies: Sequence[str]) -> str:
    """Of several studies, as a folder's: the first and how many more where there are many."""
    return "-".join(studies) if len(studies) <= 3 else f"{studies[0]}-and-{len(studies) - 1}-more"


def preset_of(study: Study, row: Row, small: bool) -> str:
    """Of a row."""
    return study.small if small else row.preset or study.preset


def plan(options: Options, rest: Sequence[str], presets: Presets) -> list[Planned]:
    """Every row of the studies under every seed, with all its options."""
    given = rest[0] if rest and not rest[0].startswith("-") else ""
    arguments, bases, planned = split_preset(rest)[1], {}, []
    for name in options.study:
        study = STUDIES[name]
        for index, row in enumerate(study.rows):
            preset = given or preset_of(study, row, options.small)
            if preset not in bases:
                bases[preset] = parse([preset, *arguments], presets)[1]
            changes = changes_of(study, row, bases[preset], options, published=not (given or options.small))
            seeds = range(bases[preset].train.seed, bases[preset].train.seed + options.seeds)
            planned += [Planned(name, index, seed, preset, {**changes, "train.seed": seed}) for seed in seeds]
    return planned


def changes_of(study: Study, row: Row, base: Experiment, options: Options, published: bool) -> dict[str, Any]:
    """The options of a row: recipe (unless another preset is used), setting, row; then scaled to the budget."""
    shared = {**(study.recipe if published else {}), **study.setting}
    changes = {**shared, **row.change}
    if options.small:
        changes = {path: SMALL.get(path, {}).get(value, value) for path, value in changes.items()}
    whole = study.recipe.get("train.steps", base.train.steps) if "train.steps" in row.change else 0
    own = changes.pop("train.steps", base.train.steps)
    usual = shared.get("train.steps", base.train.steps)
    budget = options.steps or usual
    steps = max(1, round(own * budget / whole)) if whole else budget
    whole_run = override(base, {**changes, "train.steps": usual})  # milestones and warm-up belong to this length
    return {**changes, "train.steps": steps, **shortened(whole_run, steps)}


def shortened(base: Experiment, steps: int) -> dict[str, Any]:
    """What a length other than its own changes in an experiment: milestones, warm-up, validations."""
    if steps == base.train.steps:
        return {"train.validate_every": steps} if base.train.validate_every > steps else {}
    scale = steps / base.train.steps
    every = max(1, math.ceil(steps / 2)) if scale < 1 else base.train.validate_every
    changes: dict[str, Any] = {"train.steps": steps, "train.validate_every": min(every, steps)}
    if base.optim.milestones:
        changes["optim.milestones"] = tuple(round(step * scale) for step in base.optim.milestones)
    if base.optim.warmup_steps > steps // 10:
        changes["optim.warmup_steps"] = steps // 10
    return changes


def limited(planned: list[Planned], bases: Mapping[str, Experiment]) -> list[Planned]:
    """The shares of the data set that rows ask for, as numbers of the images that there are."""
    counted: dict[str, int] = {}
    result = []
    for entry in planned:
        limit, images = entry.changes.get("data.limit"), STUDIES[entry.study].images
        if limit and images:
            if entry.preset not in counted:
                counted[entry.preset] = prepare_data(bases[entry.preset])[0].rows
            rows = counted[entry.preset]
            entry = replace(entry, changes={**entry.changes, "data.limit": max(1, round(limit * rows / images))})
        result.append(entry)
    return result


def with_weights(planned: list[Planned], bases: Mapping[str, Experiment], steps: int) -> list[Planned]:
    """Rows of a study in which any row freezes parts without weights start from weights trained on the scenes."""
    experiments = {id(entry): trial.apply(bases[entry.preset], entry.changes)[0] for entry in planned}
    kinds = {
        name: {lacking(experiments[id(entry)]) for entry in planned if entry.study == name} - {""}
        for name in {entry.study for entry in planned}
    }
    result = []
    for entry in planned:
        kind = kinds[entry.study]
        if not kind or steps == 0:
            result.append(entry)
            continue
        given = pretrained(experiments[id(entry)], "model" if "model" in kind else "backbone", steps)
        result.append(replace(entry, changes={**entry.changes, **given}))
    return result


def key_of(entry: Planned, bases: Mapping[str, Experiment]) -> str:
    """Equal for rows that train the same."""
    return repr(flatten(trial.apply(bases[entry.preset], entry.changes)[0]))


def label_of(entry: Planned) -> str:
    return STUDIES[entry.study].rows[entry.row].label


def results(line: Line | None, folder: str) -> tuple[str, dict[str, float]]:
    """URI and metrics of a trial's last checkpoint; "" and none where it did not come to its end."""
    if line is None or line.state != "finished":
        return "", {}
    kept = list(trial.all_checkpoints(folder, line.identity).items())
    return max(kept, key=lambda entry: entry[0].rsplit("/", 1)[1]) if kept else ("", {})


def measured(
    entry: Planned,
    uris: Mapping[tuple[str, int, int], str],
    values: dict[str, float],
    base: Experiment,
    folder: str,
) -> dict[str, float]:
    """The metrics of a run, with those that its study asks for beyond its own validation.

    Args:
        entry: the row.
        uris: of the last checkpoints, by study, row and seed; "" where there is none.
        values: of its own last validation.
        base: names the data.
        folder: of the sweep.
    """
    study, uri = STUDIES[entry.study], uris[entry.study, entry.row, entry.seed]
    changes = study.rows[entry.row].judge
    if not uri:
        return values
    if changes or set(study.columns) & set(COSTLY):
        values = {**values, **judged(uri, changes, base, folder)}
    if entry.row in study.merged:
        semantic, instances = (uris[entry.study, row, entry.seed] for row in study.merged)
        values = {**values, METRICS["PQ"]: merged_quality(semantic, instances, base, folder)}
    return values


def build(study: str, entries: list[tuple[Planned, dict[str, float]]], options: Options) -> Table:
    """The table of one study from the results of its rows."""
    definition = STUDIES[study]
    cells: list[list[Cell]] = []
    for index, row in enumerate(definition.rows):
        mine = [values for entry, values in entries if entry.study == study and entry.row == index]
        paper = (*row.paper, *([None] * (len(definition.columns) - len(row.paper))))
        cells.append(
            [
                Cell(paper[k], tuple(values.get(METRICS[column], math.nan) for values in mine))
                for k, column in enumerate(definition.columns)
            ]
        )
    budget = f"{options.steps} steps" if options.steps else "the preset's steps"
    return table_of(study, definition, cells, f"{budget}, {options.seeds} seed{'s' if options.seeds > 1 else ''}")


def finish(tables: Mapping[str, Table], done: Finished) -> Report:
    """Print-out, and the same in MLflow: text, Markdown, CSV and plot of each study."""
    tracker = tracking.Tracker(done.parent)
    for name, table in tables.items():
        tracker.table(f"studies/{name}", table.rows, table.text)
        tracker.text(f"studies/{name}.md", table.markdown)
        tracker.text(f"studies/{name}.svg", table.plot)
        for ending, content in (("md", table.markdown), ("svg", table.plot), ("csv", table.csv)):
            storage.write_bytes(storage.join(done.folder, "studies", f"{name}.{ending}"), content.encode())
    tracker.close()
    text = "\n\n".join(table.text for table in tables.values())
    tracking.describe(done.parent, "\n\n".join(table.markdown for table in tables.values()))
    failed = [f"{line.label}: {line.reason}" for line in done.lines if line.state != "finished"]
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
