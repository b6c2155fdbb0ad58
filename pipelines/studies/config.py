"""The options of studies, and the checks that need nothing but the command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from panoptic.ranges import NonNegativeInt
from pipelines.config import Experiment, typed_paths, unknown_presets
from pipelines.studies import STUDIES
from pipelines.studies.study import Row, Study
from pipelines.tuning.config import SweepOptions

Presets = Mapping[str, Callable[[], Experiment]]

STEPS = "train.steps"
"""The option that --steps takes the place of."""


@dataclass(frozen=True)
class Options(SweepOptions):
    """A sweep (--sweep) or studies of the papers (--study)."""

    study: tuple[str, ...] = ()
    """Studies to run one after the other, sharing rows that are equal; `list` names them."""
    steps: NonNegativeInt = 0
    """Training steps of a study's recipe; rows of other lengths, milestones and warm-up follow. 0 = the paper's."""
    seeds: NonNegativeInt = 0
    """Seeds of every row; two or more give mean ± deviation, and say what exceeds it. 0 = as many as the study asks
    for: one, those on photographs of their own (freezing-photographs) three."""
    small: bool = False
    """The study on two CPU cores: its small preset and small backbones, with ImageNet weights where a package has
    them."""
    pretrain_steps: NonNegativeInt = 0
    """Steps for which parts that a row freezes without weights are first trained on drawn scenes, once.
    0 = 600 with --small, else an error."""


def check(options: Options, rest: Sequence[str], presets: Presets) -> bool:
    """Check the options of studies; True if a preset is given in place of the studies' own.

    Raises:
        ValueError: unknown studies or presets, or options that studies do not take.
    """
    unknown = [name for name in options.study if name not in STUDIES]
    if unknown:
        near = dict.fromkeys(other for name in unknown for other in get_close_matches(name, STUDIES, 3, 0.5))
        hint = f"near: {', '.join(near)}; " if near else ""
        raise ValueError(f"--study {' '.join(unknown)}: unknown; {hint}there are: list, {', '.join(STUDIES)}")
    if options.sweep or options.samples != 1 or options.searcher != "random" or options.scheduler != "none":
        raise ValueError(
            "--study: its rows are given, and each trains to its end, or it has no figure; leave --sweep, --samples, "
            "--searcher and --scheduler out"
        )
    if options.seeds < 0 or options.steps < 0:
        raise ValueError("--seeds is 1 or more, --steps 0 (the paper's) or more")
    check_typed(options, typed_paths(rest))
    given = bool(rest) and not rest[0].startswith("-")
    needed = (
        [rest[0]]
        if given
        else [preset_of(STUDIES[s], row, options.small) for s in options.study for row in STUDIES[s].trained]
    )
    missing = sorted({name for name in needed if name not in presets})
    if missing:
        raise ValueError(unknown_presets(missing, presets))
    return given


def check_typed(options: Options, typed: Collection[str]) -> None:
    """Refuse typed options that cannot hold for all rows.

    Raises:
        ValueError: an option in which the rows of a study differ, or the length, which is --steps.
    """
    if STEPS in typed:
        raise ValueError("--train.steps: the length of a study is --steps, which milestones and warm-up follow")
    for name in options.study:
        rows = STUDIES[name].trained
        for path in sorted(typed):
            if len({repr((row.change.get(path), row.evaluate_with.get(path))) for row in rows}) > 1:
                raise ValueError(f"--{path}: the rows of {name} differ in it; leave it out, or the study")


def preset_of(study: Study, row: Row, small: bool) -> str:
    """The preset of a row."""
    return (row.small or study.small) if small else row.preset or study.preset


def seeds_of(options: Options) -> int:
    """The seeds of every row: those of the options, or the most that one of the studies asks for."""
    return options.seeds or max((STUDIES[name].seeds for name in options.study if name in STUDIES), default=1)
