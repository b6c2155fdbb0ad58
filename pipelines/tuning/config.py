"""The options of a sweep, and the checks that need nothing but the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge

from panoptic.ranges import NonNegativeInt, PositiveInt, check_ranges
from pipelines.config import Experiment, check_path, check_run_name, flatten, parse, unknown_presets
from pipelines.tuning import search_space
from pipelines.tuning.search_space import PRESET, Space


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep. Options of the experiment (`jobs/train.py PRESET --help`) hold for every trial."""

    sweep: tuple[str, ...] = ()
    """path=expression: grid(…) choice(…) uniform(a,b) loguniform(a,b) randint(a,b) quniform(a,b,step), or a value;
    the path is any option, or `preset`; model.backbone.freeze takes schedules such as '5 2@500' too."""
    samples: PositiveInt = 1
    """Trials; with grids, draws of the other values for each of their combinations."""
    baseline: bool = False
    """The first trial has the preset's own values (one of Ray Tune's `points_to_evaluate`), to compare others with."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """random draws; grid enumerates choices too; optuna learns from finished trials (extra `search`)."""
    scheduler: Literal["none", "asha", "hyperband", "pbt", "median"] = "none"
    """The rule that ends trials early. hyperband: asha with several brackets, which begin to end trials later and
    later. pbt: population based training, the worst take over weights and options of the best."""
    metric: str = "val/pq"
    """The metric of a validation that trials are compared by, and that says which of their checkpoints are kept."""
    mode: Literal["max", "min"] = "max"
    """max where a larger value of the metric is better, else min."""
    grace: PositiveInt = 1
    """Validations that each trial gets before it may be ended (pbt: between two exchanges)."""
    reduction: Annotated[int, Ge(2)] = 3
    """asha, hyperband: one in this many trials goes on."""
    concurrent: NonNegativeInt = 0
    """Trials at once; 0 = as many as the cluster holds without waiting for each other."""
    resume: bool = False
    """Go on with the sweep of this --name."""
    search_seed: NonNegativeInt = 0
    """Seed of the draws."""
    dry_run: bool = False
    """Check everything, say which trials there would be and where they would be written, and stop."""


def check_options(options: SweepOptions, space: Space) -> None:
    """Refuse options outside of their ranges, and combinations of them that Ray Tune cannot do.

    Raises:
        ValueError: says what to write instead.
    """
    check_ranges(options)
    kinds = {domain.kind for domain in space.values()}
    gridded = [path for path, domain in space.items() if domain.kind == "grid" and len(domain.values) > 1]
    if options.searcher == "grid" and kinds - {"grid", "choice"}:
        raise ValueError("--searcher grid enumerates: write grid(…) or choice(…) for every path")
    if gridded and (options.searcher == "optuna" or options.scheduler == "pbt"):
        which = "--searcher optuna" if options.searcher == "optuna" else "--scheduler pbt"
        raise ValueError(f"{which} draws values: write choice(…) instead of grid(…) for {', '.join(gridded)}")
    if options.baseline and (gridded or PRESET in space or options.searcher == "grid"):
        raise ValueError("--baseline: grids and presets are tried one by one; write the preset's own value among them")
    if options.searcher == "optuna" and all(domain.constant for domain in space.values()):
        raise ValueError("--searcher optuna: every path has one value, so there is nothing to draw")
    if options.searcher == "optuna" and options.scheduler == "pbt":
        raise ValueError("--scheduler pbt changes options itself and takes no --searcher optuna; leave that out")
    if options.scheduler == "pbt" and options.samples < 2:
        raise ValueError("--scheduler pbt needs a population: --samples 4 or more")
    if options.scheduler == "pbt" and PRESET in space:
        raise ValueError("--scheduler pbt: weights of one architecture do not fit another; leave preset out")
    if options.searcher == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "--searcher optuna needs the extra `search`: pip install 'panoptic-ray[search]'"
            ) from error


def check_whole_numbers(space: Space, bases: Mapping[str, Experiment]) -> None:
    """Refuse ranges of fractions for options that are whole numbers.

    Raises:
        ValueError: names the path, and the expressions that suit it.
    """
    for path, domain in space.items():
        fractions = domain.kind not in search_space.ENUMERATED and not domain.whole
        if fractions and any(is_whole_number(base, path) for base in bases.values()):
            raise ValueError(
                f"the sweep cannot take {path}={domain}: this option takes whole numbers: use randint, or quniform "
                "with whole numbers"
            )


def preset_values(space: Space, base: Experiment) -> dict[str, Any]:
    """The preset's own values of the paths that a sweep draws.

    Raises:
        ValueError: there is no such option, or the value is outside of what the sweep draws from, which searchers and
            schedulers do not take.
    """
    own = flatten(base)
    for path in space:
        check_path(base, path)
    values = {path: own[path] for path, domain in space.items() if not domain.constant}
    for path, value in values.items():
        if value not in space[path]:
            raise ValueError(f"--baseline: {path} is {value} in the preset, outside of {space[path]}; widen that")
    return values


def is_whole_number(experiment: Experiment, path: str) -> bool:
    """True if the option of this dotted path is declared as an `int`; False where there is no such option."""
    *groups, name = path.split(".")
    owner: Any = experiment
    for group in groups:
        owner = getattr(owner, group, None)
    return get_type_hints(type(owner)).get(name) is int


def split_preset(rest: Sequence[str]) -> tuple[str, list[str]]:
    """`[PRESET] --path value …` to the preset's name (demo where none is given) and its options."""
    arguments = list(rest)
    given = bool(arguments) and not arguments[0].startswith("-")
    return (arguments[0], arguments[1:]) if given else ("demo", arguments)


def read_command(
    options: SweepOptions, rest: Sequence[str], presets: Mapping[str, Callable[[], Experiment]]
) -> tuple[Space, dict[str, Experiment], str]:
    """The search space of a sweep, the experiment of each of its presets, and its name.

    Args:
        options: of the sweep.
        rest: `[PRESET] --path value …` for every trial.
        presets: by name.

    Raises:
        ValueError: what the command line alone tells to be wrong; the message says what to write instead.
    """
    if not options.sweep:
        raise ValueError("--sweep: nothing to search; give path=expression, such as optim.lr=loguniform(1e-5,1e-3)")
    space = search_space.parse(options.sweep)
    check_options(options, space)
    chosen, arguments = split_preset(rest)
    names = [str(value) for value in space[PRESET].values] if PRESET in space else [chosen]
    unknown = [name for name in names if name not in presets]
    if unknown:
        raise ValueError(unknown_presets(unknown, presets))
    bases = {name: parse([name, *arguments], presets)[1] for name in names}
    name = check_run_name(bases[names[0]].name or f"{names[0]}-sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    check_whole_numbers(space, bases)
    if options.baseline:
        preset_values(space, bases[names[0]])
    return space, bases, name
