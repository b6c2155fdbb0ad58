"""The rows of studies as experiments: a recipe on any data, at any budget, with the options that the user gives."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from panoptic.backbones import imagenet
from pipelines.config import Experiment, flatten, override, parse, typed_paths
from pipelines.studies import STUDIES
from pipelines.studies.config import STEPS, Options, Presets, preset_of, seeds_of
from pipelines.studies.pretrain import pretrained
from pipelines.studies.study import Row, Study, small_value
from pipelines.training.driver import prepare_data
from pipelines.training.preflight import lacking
from pipelines.tuning import trial_config
from pipelines.tuning.config import split_preset

BATCH, WORKERS, LIMIT = "train.batch", "train.workers", "data.limit"
LIMIT_VAL = "data.limit_val"
VALIDATE, MILESTONES = "train.validate_every", "optim.milestones"
WARMUPS = ("optim.warmup_steps", "optim.backbone_warmup_steps")


@dataclass(frozen=True)
class PlannedTrial:
    """One row of a study under one seed."""

    study: str
    row: int
    """Index of the row in its study."""
    seed: int
    preset: str
    changes: Mapping[str, Any]
    """Value of each option that it sets, by dotted path."""

    @property
    def label(self) -> str:
        """The name of its trial."""
        return f"{self.study} {STUDIES[self.study].rows[self.row].label}, seed {self.seed}"


def plan(options: Options, rest: Sequence[str], presets: Presets) -> list[PlannedTrial]:
    """Every row of the studies under every seed, with all its options."""
    given = rest[0] if rest and not rest[0].startswith("-") else ""
    arguments = split_preset(rest)[1]
    typed = typed_paths(arguments)
    bases: dict[str, Experiment] = {}
    planned = []
    for name in options.study:
        study, rows = STUDIES[name], []
        for row in study.trained:
            preset = given or preset_of(study, row, options.small)
            if preset not in bases:
                bases[preset] = parse([preset, *arguments], presets)[1]
            published = not (given or options.small)
            rows.append((preset, changes_of(study, row, bases[preset], options, published, typed)))
        workers = common_workers([(bases[preset], changes) for preset, changes in rows])
        places = [place for place, row in enumerate(study.rows) if not row.quoted]
        for index, (preset, changes) in zip(places, rows, strict=True):
            first = bases[preset].train.seed
            planned += [
                PlannedTrial(name, index, seed, preset, {**changes, **workers, "train.seed": seed})
                for seed in range(first, first + seeds_of(options))
            ]
    return planned


def common_workers(rows: Sequence[tuple[Experiment, Mapping[str, Any]]]) -> dict[str, int]:
    """The option that gives all rows one number of workers, because batch norm sees each worker's own batch.

    Args:
        rows: base and changes of each.

    Returns:
        {} where they have one anyway.
    """
    trains = [
        replace(base, train=replace(base.train, batch=changes.get(BATCH, base.train.batch))) for base, changes in rows
    ]
    if len({trial_config.fit_workers(one).train.workers for one in trains}) == 1:
        return {}
    common = math.gcd(*(one.train.batch for one in trains))
    most = min(one.train.workers for one in trains)
    return {WORKERS: next(n for n in range(most, 0, -1) if common % n == 0)}


def changes_of(
    study: Study, row: Row, base: Experiment, options: Options, published: bool, typed: Collection[str] = ()
) -> dict[str, Any]:
    """The options of a row: recipe (unless another preset is used), setting and row, scaled to the budget.

    Args:
        study: of the row.
        row: in which it differs.
        base: preset with what the user typed.
        options: budget, and whether the small preset is used.
        published: whether the recipe holds.
        typed: paths that the user gave, which stay as they are.
    """
    shared = {**(study.recipe if published else {}), **study.setting}
    own_change = row.small_change if options.small and row.small_change is not None else row.change
    changes = {path: value for path, value in {**shared, **own_change}.items() if path not in typed}
    if options.small:
        changes = {path: small_value(path, value, begins_with_imagenet(base)) for path, value in changes.items()}
    whole = study.recipe.get(STEPS, base.train.steps) if STEPS in row.change else 0
    own = changes.pop(STEPS, base.train.steps)
    usual = shared.get(STEPS, base.train.steps)
    budget = options.steps or usual
    steps = max(1, round(own * budget / whole)) if whole else budget
    whole_run = override(base, {**changes, STEPS: usual})  # milestones and warm-up belong to this length
    return {**changes, STEPS: steps, **shortened(whole_run, steps, typed, budget)}


def begins_with_imagenet(experiment: Experiment) -> bool:
    """True if the backbone of an experiment begins with ImageNet weights that are asked for by that word."""
    return experiment.model.backbone.weights in imagenet.NAMES


def shortened(base: Experiment, steps: int, typed: Collection[str] = (), budget: int = 0) -> dict[str, Any]:
    """The options that change in an experiment with its length: milestones, warm-up, validations.

    Args:
        base: of its own length.
        steps: of a row.
        typed: paths that the user gave, for a run of the budget: they stay where they fit.
        budget: steps of a row without a length of its own; 0 = those of the row.
    """
    train, optim = base.train, base.optim
    every = train.validate_every
    if steps < train.steps and VALIDATE not in typed:
        every = max(1, math.ceil(steps / 2))
    every = min(every, steps)
    changes: dict[str, Any] = {STEPS: steps} if steps != train.steps else {}
    if changes or every != train.validate_every:
        changes[VALIDATE] = every
    scale = steps / ((budget or steps) if MILESTONES in typed else train.steps)
    if optim.milestones and scale != 1:
        changes[MILESTONES] = tuple(round(step * scale) for step in optim.milestones)
    for path, own in zip(WARMUPS, (optim.warmup_steps, optim.backbone_warmup_steps), strict=True):
        fits = path in typed and own < steps
        if steps != train.steps and own > steps // 10 and not fits:
            changes[path] = steps // 10
    return changes


def limited(
    planned: Sequence[PlannedTrial], bases: Mapping[str, Experiment], typed: Collection[str] = ()
) -> tuple[list[PlannedTrial], dict[str, Experiment]]:
    """Rows and bases with the same share of the images that there are as their `data.limit` is of the paper's.

    A row validates on as many images as its paper, or on all where there are fewer.

    Args:
        planned: rows.
        bases: by preset.
        typed: paths that the user gave: a limit among them is a number of images already.
    """
    images = {entry.preset: STUDIES[entry.study].images for entry in planned if STUDIES[entry.study].images}
    asked = {name for name in images if bases[name].data.limit and LIMIT not in typed}
    asked |= {entry.preset for entry in planned if entry.preset in images and LIMIT in entry.changes}
    validated = {entry.preset for entry in planned if entry.changes.get(LIMIT_VAL)}
    sets = {name: prepare_data(_with_limit(bases[name], 0)) for name in sorted(asked | validated)}
    rows = {name: sets[name][0].rows for name in asked}

    def fitted(entry: PlannedTrial) -> PlannedTrial:
        """The row with at most as many validation images as there are."""
        asked_for = entry.changes.get(LIMIT_VAL)
        if not asked_for:
            return entry
        return replace(entry, changes={**entry.changes, LIMIT_VAL: min(asked_for, sets[entry.preset][1].rows)})

    def share(name: str, limit: int) -> int:
        return min(rows[name], max(1, round(limit * rows[name] / images[name])))

    result = [
        replace(entry, changes={**entry.changes, LIMIT: share(entry.preset, entry.changes[LIMIT])})
        if entry.preset in rows and entry.changes.get(LIMIT)
        else entry
        for entry in map(fitted, planned)
    ]
    scaled = {
        name: _with_limit(base, share(name, base.data.limit)) if name in rows and base.data.limit else base
        for name, base in bases.items()
    }
    return result, scaled


def _with_limit(base: Experiment, limit: int) -> Experiment:
    return replace(base, data=replace(base.data, limit=limit))


def with_weights(planned: Sequence[PlannedTrial], bases: Mapping[str, Experiment], steps: int) -> list[PlannedTrial]:
    """The rows, with weights trained on drawn scenes where any row of their study freezes parts without weights.

    Args:
        planned: rows.
        bases: by preset.
        steps: of that training; 0 = none.
    """
    experiments = {id(entry): experiment_of(entry, bases) for entry in planned}
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
        what = "model" if "model" in kind else "backbone"
        given = pretrained(experiments[id(entry)], bases[entry.preset], what, steps)
        result.append(replace(entry, changes={**entry.changes, **given}))
    return result


def experiment_of(entry: PlannedTrial, bases: Mapping[str, Experiment]) -> Experiment:
    """The experiment of a row."""
    return trial_config.apply(bases[entry.preset], entry.changes)[0]


def key_of(entry: PlannedTrial, bases: Mapping[str, Experiment]) -> str:
    """A key that is equal for rows that train the same."""
    return repr(flatten(experiment_of(entry, bases)))


def label_of(entry: PlannedTrial) -> str:
    """The label of a row, whatever the seed."""
    return STUDIES[entry.study].rows[entry.row].label


def short_name(studies: Sequence[str]) -> str:
    """The name of a folder for several studies: the first and how many more where there are many."""
    return "-".join(studies) if len(studies) <= 3 else f"{studies[0]}-and-{len(studies) - 1}-more"
