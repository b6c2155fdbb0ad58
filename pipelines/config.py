"""The tree of options of one experiment, and the only place that parses a command line.

Each option is a field of the dataclass of the module that uses it, and the line under the field is its
documentation and its `--help`. A named experiment is a function in the package `presets`; the command line, a
sweep and a stored run all change it through the same parser:

    override(preset, {"optim.lr": 1e-4, "model.backbone.freeze": 2})
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro
from annotated_types import Ge, Interval
from tyro.constructors import PrimitiveConstructorSpec

from panoptic.models import Architecture
from panoptic.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, ThreadCount, UnitFloat, check_ranges
from panoptic.training.config import Engine, Optim
from panoptic.transforms import Augment, Resize
from pipelines.data.config import AUTO, FeedConfig, OnInvalid, ReaderOptions
from pipelines.option_help import job_help, option_help, walk
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from pipelines.data.manifest import Manifest

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Images = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""Arguments that a command line gives without a name, in the order of the fields."""

Actors = Annotated[int, Ge(-1)]
"""Processes; -1 = one a GPU or core, 0 = none."""


def _one_or_more(words: Sequence[str]) -> str | tuple[str, ...]:
    if not words:
        raise ValueError("give one at least")
    return words[0] if len(words) == 1 else tuple(words)


OneOrMore = Annotated[
    str | tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="STR [STR …]",
        instance_from_str=_one_or_more,
        is_instance=lambda value: isinstance(value, str | tuple),
        str_from_instance=lambda value: [value] if isinstance(value, str) else list(value),
    ),
]
"""A text, or several after one option; a single one is stored as a text, not as a list."""


class Workers(int):
    """A number of workers, or the most of a range such as 1..4, whose least is `least`."""

    least: int

    def __new__(cls, most: int, least: int | None = None) -> Workers:
        """A range; one number where `least` is not given."""
        number = super().__new__(cls, most)
        number.least = most if least is None else least
        return number

    def __str__(self) -> str:
        return str(int(self)) if self.least == self else f"{self.least}..{int(self)}"

    def __getnewargs__(self) -> tuple[int, int]:  # for pickle
        return int(self), self.least


def _workers(words: Sequence[str]) -> int:
    least, dots, most = words[0].partition("..")
    if not dots:
        return int(least)
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise ValueError(f"{words[0]}: a range goes from 1 or more to as many or more, as 1..4")
    return Workers(int(most), int(least))


WorkerCount = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|N..N",
        instance_from_str=_workers,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
    Ge(1),
]
"""A number of workers, or a range of them (`Workers`)."""


def least_workers(workers: int) -> int:
    """The fewest workers of `train.workers`."""
    return workers.least if isinstance(workers, Workers) else workers


Repeated = tyro.conf.UseAppendAction
"""`changes: Repeated[tuple[str, ...]]` is an option that may be given several times."""

RUN_NAME_LENGTH = 100
"""The most characters of a run's name: trials add theirs, and filesystems take 255."""

RUN_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{RUN_NAME_LENGTH - 1}}}", re.ASCII)
"""Names of runs, sweeps and studies; no blanks, as names stand in URIs and in commands to be copied."""

RESERVED = re.compile(
    r"shards|pretrained|evaluations|evaluated|studies|leases|mlruns|mlartifacts|mlflow\.db.*|scenes-.*", re.IGNORECASE
)
"""Folders and files of `storage` that are no run's."""

UNRANKED = -1e9
"""Rank of a checkpoint without a figure."""

UNVALIDATED = 2 * UNRANKED
"""Rank of a checkpoint between validations, which goes before any that was validated."""


@dataclass(frozen=True)
class Split(ReaderOptions):
    """One split of a data set: what the jobs read that do not train."""

    root: str
    """A folder that `reader` reads, or a folder of prepared shards; local or s3://."""
    split: str = "val"
    """Name of the split."""
    reader: str = AUTO
    """Format of `root` where it is not prepared: coco, cityscapes, mapillary … (the README lists them), or
    auto: its files tell it."""
    shards: str = "runs/shards"
    """Folder in which shards are written, and found again, when `root` is not prepared."""
    class_map: str = ""
    """Class map on the classes of the data set: a JSON (infra/REFERENCE.md), or the name of one of
    `pipelines.data.class_maps`."""
    limit: NonNegativeInt = 0
    """Read this many images only: the first ones of a shuffle of the split by --data.limit-seed. 0 = all."""
    skip: NonNegativeInt = 0
    """Leave out this many images from the start of that shuffle: those that --data.limit-val validated on."""
    limit_seed: NonNegativeInt = 0
    """Seed of that shuffle."""

    def part_of(self, manifest: Manifest) -> Manifest:
        """The images that `limit` and `skip` leave.

        Raises:
            ValueError: there are not so many.
        """
        from pipelines.data.sampler import chosen_rows

        rows = chosen_rows(manifest.rows, self.limit, self.skip, self.limit_seed, "--data.limit")
        return manifest.part(rows)


@dataclass(frozen=True)
class Store:
    """The store in which models are registered and runs recorded."""

    uri: str = ""
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else the SQLite file in `runs`."""


@dataclass(frozen=True)
class Scenes:
    """The drawn data set that stands in where no data is given."""

    train: Annotated[int, Interval(ge=1, le=10**6)] = 800
    """Number of training scenes."""
    val: Annotated[int, Interval(ge=1, le=10**6)] = 96
    """Number of validation scenes (other seeds than any training scene)."""
    seed: NonNegativeInt = 0
    """Seed of the drawing."""


@dataclass(frozen=True)
class Data(ReaderOptions):
    """The images of an experiment, and the place of their shards."""

    root: OneOrMore = "scenes"
    """A folder in the form of `reader`, a folder of prepared shards, or "scenes" for the drawn data set. Local or s3://.
    Several folders of either kind, each alone or as NAME=FOLDER, are joined."""
    train: OneOrMore = "train"
    """Name of the training split, or one for each of several roots."""
    val: OneOrMore = "val"
    """Name of the validation split, or one for each of several roots."""
    reader: OneOrMore = AUTO
    """Format of `root`, or of each: coco, cityscapes, mapillary … (the README lists them), or auto: its files
    tell it."""
    class_map: str = ""
    """Class map on the classes of the data sets: a JSON (infra/REFERENCE.md), or the name of one of
    `pipelines.data.class_maps`."""
    shards: str = ""
    """Folder in which shards are written, or found when already prepared; empty = `<storage>/shards`."""
    on_invalid: OnInvalid = "stop"
    """An image that fails validation stops the preparation, or is left out and listed."""
    classes_of: Literal["both", "train", "val"] = "both"
    """The split whose classes count where they differ: images of the other split may use no class beside them. With
    "both", they must be the same, or one split's contain the other's; their colours, ids and order may differ."""
    limit: NonNegativeInt = 0
    """Train on this many images only: the first ones of a shuffle by --data.limit-seed, so a smaller limit keeps a part
    of what a larger one keeps. 0 = all."""
    limit_seed: NonNegativeInt = 0
    """Seed of that shuffle; not train.seed, so that runs of several seeds see the same images."""
    limit_val: NonNegativeInt = 0
    """Validate on this many images only: the first ones of a shuffle of the validation split by limit_seed. 0 = all.
    jobs/evaluate.py has an option to skip this many, and so evaluates images that no validation saw."""
    balance: UnitFloat = 0.0
    """Class-balanced sampling (repeat factors of LVIS): a class that fewer than this share of the training images have
    comes more often, sqrt(balance / its share) times as often, and with it the images that have it. 0 = off, all come
    equally often. Reads all training images once before the first run."""
    window: NonNegativeInt = 0
    """Rows of neighbours in the shards that are read in one request, where requests are dearer than bytes (S3). They
    come one a step in the following steps, so that the order is less random; see `pipelines.data.sampler`. Each worker
    holds its share of `train.batch` times as many rows. 0 = every row by itself, in a global permutation."""
    cache_features: Literal["no", "float32", "float16"] = "no"
    """Compute the features of a backbone that is frozen as a whole once, and train from them, stored as these numbers.
    Needs --model.backbone.freeze 5, --augment.copies N --augment.originals False and an --augment.crop; trainings that
    agree in these and in the weights share them. Where the backbone learns, images are read as ever."""
    scenes: Scenes = field(default_factory=Scenes)
    """The drawn data set."""


@dataclass(frozen=True)
class Train:
    """Length, size and machinery of a training run. The batch is global: workers only share it."""

    steps: PositiveInt = 1000
    """Optimiser updates in all."""
    batch: PositiveInt = 8
    """Images of one update over all workers; the learning rate belongs to it."""
    micro_batch: NonNegativeInt = 0
    """Most images that a worker puts through the network at once; accumulation follows. 0 = no accumulation."""
    fit_memory: bool = False
    """If memory does not suffice, activations are computed again (--engine.activation-checkpointing), and then fewer
    images go through at once, the batch staying the same: the largest is tried before the first step, and a step for
    which memory runs out later is taken again. Batch norms in training see fewer images at once."""
    workers: WorkerCount = 2
    """Data-parallel workers (one process each; one GPU each when `gpu`). A range, as 1..4, trains with as many as the
    cluster has room for and the batch can be shared by, goes on with those that are left, and takes in new ones."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Train on GPUs: `auto` when the cluster has at least one per worker."""
    cpus_per_worker: NonNegativeFloat = 0.0
    """CPUs that Ray reserves for a worker; 0 = one, or half a one on a small machine, so that Ray Data keeps room."""
    threads: ThreadCount = 0
    """Torch threads of a worker; 0 = the machine's cores divided by the workers on it."""
    sync_bn: bool = False
    """Share batch-norm statistics over workers (GPU only; ignored with a warning on CPU)."""
    compile: bool = False
    """`torch.compile` the network (losses and post-processing stay eager). After the first lines of the log none should
    say that graphs were compiled: each takes tens of seconds. Images of one size (--augment.crop) need the fewest."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, order, augmentation and dropout."""
    deterministic: bool = False
    """Only deterministic kernels; slower on GPU, where an operation that has none stops the run by its name."""
    log_every: PositiveInt = 20
    """Steps between console lines and logged losses."""
    validate_every: PositiveInt = 250
    """Steps between validations; the last step always validates. A checkpoint is written at each."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints, beside those at validations; 0 = no such number. A thread writes them, and training
    waits for a copy in memory only. A checkpoint that is due while the one before is written comes after it."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """Minutes between checkpoints, beside those at validations; 0 = no such time. A run that is stopped without notice
    repeats this much at the most."""
    validation_batch: PositiveInt = 4
    """Images that a worker validates at once."""
    overlays: NonNegativeInt = 4
    """Validation images whose overlay is logged at every validation (always the same ones)."""
    keep: PositiveInt = 2
    """Checkpoints kept: this many validated ones, the best by --train.score, and the last of all."""
    score: str = "val/pq"
    """Metric of the validation that says which checkpoint is best."""
    score_mode: Literal["max", "min"] = "max"
    """max where a larger value of the metric is better, else min."""
    max_failures: NonNegativeInt = 2
    """Failures of workers, of Ray Train's controller or of machines after which the run gives up; each restarts from
    the last checkpoint. Machines that are taken back on notice do not count."""
    freeze: tuple[str, ...] = ()
    """Freeze every parameter whose name matches one of these patterns (`backbone.*` `transformer.encoder.*`); batch
    norms whose parameters are all frozen keep their statistics."""
    frozen_dropout: bool = False
    """Dropout stays on inside parts that are frozen as a whole (DETR's published second stage); else it is off, and so
    are skipped paths of a frozen backbone."""
    weights: str = ""
    """Start a new run from the weights of this checkpoint (folder, file or s3://), or of a published model (hub:NAME;
    the list of presets ends with the names); fresh optimiser and step 0."""
    stop_after: NonNegativeInt = 0
    """End after this many steps of the schedule (0 = at its end), to be continued under the same name."""

    def rank(self, values: Mapping[str, float]) -> float:
        """The rank of a checkpoint with these metrics, more is better; NaN cannot be ranked."""
        value = values.get(self.score, math.nan)
        if value != value:
            return UNRANKED
        return value if self.score_mode == "max" else -value


@dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on."""

    model: Architecture
    """The architecture; another one is another preset."""
    name: str = ""
    """Name of the run (letters, digits, . _ -): the same name continues where it ended; empty = preset and time."""
    storage: str = "runs"
    """Folder or s3:// prefix of shards, checkpoints and the local MLflow store."""
    data: Data = field(default_factory=Data)
    """The images."""
    augment: Augment = field(default_factory=Augment)
    """The training view."""
    resize: Resize = field(default_factory=Resize)
    """The evaluation view."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """The way of the data to the workers."""
    optim: Optim = field(default_factory=Optim)
    """Optimiser and schedule."""
    engine: Engine = field(default_factory=Engine)
    """Precision and memory format."""
    train: Train = field(default_factory=Train)
    """Length, size, machinery."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def parse(
    argv: Sequence[str], presets: Mapping[str, Any], default: str = "demo", others: Sequence[str] = ()
) -> tuple[str, Experiment]:
    """`[PRESET] --path value …` to the preset's name and its experiment.

    Prints help and exits as command-line programs do.

    Args:
        argv: the arguments.
        presets: by name.
        default: the preset where none is named.
        others: options of the job that are none of an experiment, to be named beside mistyped ones.

    Raises:
        ValueError: no such preset or option, or a value of the wrong type or outside of its range.
    """
    arguments = list(argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in presets:
        raise ValueError(unknown_presets([name], presets))
    preset = presets[name]()
    if asked := [word for word in HELP if word in arguments]:
        usage = f"usage: {Path(sys.argv[0]).name} {name} [--option value ...]"
        about = f"{usage}\n\nPreset {name}: {inspect.cleandoc(str(presets[name].__doc__))}"
        print(option_help(preset, about, everything=ALL in asked), flush=True)
        sys.exit(0)
    experiment = _cli(preset, arguments, others)
    check_ranges(experiment)
    return name, keep_given(experiment, typed_paths(arguments))


def unknown_presets(names: Sequence[str], presets: Collection[str]) -> str:
    """The message for presets that do not exist: near names of each, and where all of them are shown."""
    near = dict.fromkeys(other for name in names for other in get_close_matches(name, presets, 4, 0.5))
    hint = f"near: {', '.join(near)}; " if near else ""
    return f"unknown preset {', '.join(map(repr, names))}; {hint}jobs/train.py --list shows all"


def typed_paths(arguments: Sequence[str]) -> frozenset[str]:
    """The paths of the options on a command line: `--train.validate-every 5` is `train.validate_every`."""
    words = (word for word in arguments if word.startswith("--"))
    return frozenset(word.removeprefix("--").split("=")[0].replace("-", "_") for word in words)


ALL = "--help-all"

HELP = (ALL, "--help", "-h")
"""The flags that ask a training for its options: all of them, or the usual ones."""

PIXELS = frozenset({"model.pixel_mean", "model.pixel_std", "model.bgr"})
"""Options of which naming one keeps all three as they are given, whatever the weights were trained with."""


def keep_given(experiment: Experiment, named: Collection[str]) -> Experiment:
    """An experiment that keeps its own pixels if the user named some of their options.

    Args:
        named: dotted paths of the options that were given.
    """
    if PIXELS.isdisjoint(named):
        return experiment
    backbone = replace(experiment.model.backbone, own_pixels=True)
    return replace(experiment, model=replace(experiment.model, backbone=backbone))  # pyright: ignore


def parse_options(
    options: type[Any],
    argv: Sequence[str],
    description: str,
    spellings: Mapping[str, str],
    usual: Sequence[str] = (),
) -> Any:
    """The options of a job that does not train, from a command line.

    Prints help and exits as command-line programs do.

    Args:
        options: a dataclass with defaults for whatever may be left out.
        argv: the arguments.
        description: stands above the help.
        spellings: options under their former names; each is accepted with a line that says the new one.
        usual: paths of the options that --help shows, where --help-all shows all; () = it shows all, too.

    Raises:
        ValueError: no such option, one that is missing, or a value of the wrong type or outside of its range.
    """
    arguments = [_respelt(argument, spellings) for argument in argv]
    _show_help(options, arguments, description, usual)
    parsed = parse_words(options, arguments, description)
    check_ranges(parsed)
    return parsed


def parse_words(options: type[Any], words: Sequence[str], description: str) -> Any:
    """The options of a job from the words of its command line, whatever their ranges.

    Raises:
        ValueError: no such option, one that is missing, or a value of the wrong type.
    """
    return _parse_all(options, words, _flags(options), config=JOB_SETTINGS, description=description)


def _respelt(argument: str, spellings: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    if name not in spellings:
        return argument
    print(f"{name} is now {spellings[name]}; the former name will go", file=sys.stderr)
    return f"{spellings[name]}{equals}{value}"


def _show_help(options: type[Any], arguments: Sequence[str], description: str, usual: Sequence[str]) -> None:
    """Print the help of a job and exit, where the arguments ask for it."""
    if asked := [word for word in HELP if word in arguments]:
        print(job_help(options, description, usual, ALL in asked, _positional(options)), flush=True)
        sys.exit(0)


def _positional(options: type[Any]) -> list[str]:
    """The fields that a command line gives without a name."""
    hints = get_type_hints(options, include_extras=True).items()
    return [name for name, hint in hints if tyro.conf.Positional in getattr(hint, "__metadata__", ())]


def _flags(options: Any) -> list[str]:
    """The options of an object, or of a job's class, as they are typed; a job switches off by --no-NAME."""
    if not isinstance(options, type):
        return [_flag(path) for path, _ in walk(options)]
    without = _positional(options)
    return [_flag(path, value is True) for path, (value, _, _) in walk(options) if path not in without]


def _flag(path: str, off: bool = False) -> str:
    group, dot, name = path.replace("_", "-").rpartition(".")
    return f"--{group}{dot}{'no-' * off}{name}"


def parse_known(
    options: type[Any], argv: Sequence[str], description: str, usual: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """The fields of a dataclass from a command line, and the arguments that are not its own, in their order.

    Raises:
        ValueError: an option that is missing, of the wrong type or outside of its range, or one of no group that is
            neither here nor in an experiment.
    """
    _show_help(options, argv, description, usual)
    parsed, rest = _tyro(options, argv, config=JOB_SETTINGS, description=description)
    check_ranges(parsed)
    known = [*_flags(options), *_flags(Experiment)]
    if unknown := [word for word in _unknown_flags(rest, known) if "." not in word]:
        raise ValueError(unknown_options(unknown, known))
    return parsed, rest


def override(config: Any, changes: Mapping[str, Any], ranges: bool = True) -> Any:
    """A config with some dotted paths changed, parsed as the command line would be.

    Args:
        config: a dataclass.
        changes: value by dotted path.
        ranges: refuse values outside of their ranges; False for what a run stored before there were any.

    Raises:
        ValueError: a path that does not exist, a value of the wrong type or outside of its range; the message names it.
    """
    for path in changes:
        check_path(config, path)
    changed, problems = config, []
    for path, value in changes.items():
        *groups, name = path.split(".")
        owners = [changed]
        for group in groups:
            owners.append(getattr(owners[-1], group))
        try:
            parsed = _parse_field(type(owners[-1]), name, tuple(_words(value)))
        except ValueError:
            problems.append(_problem(config, path, value))
            continue
        for owner, part in zip(reversed(owners), [name, *reversed(groups)], strict=True):
            parsed = replace(owner, **{part: parsed})
        changed = parsed
    if problems:
        raise ValueError("; ".join(problems))
    if ranges:
        check_ranges(changed)
    return changed


def _problem(config: Any, path: str, value: Any) -> str:
    """The message of the parser of all options for a value that an option cannot have: its whole name, and its help."""
    try:
        _cli(config, [_flag(path), *_words(value)])
    except ValueError as error:
        return str(error) if str(error).startswith(_flag(path)) else f"{path}: {error}"
    return f"{path} cannot be {value!r}"


@cache
def _parse_field(owner: type[Any], name: str, words: tuple[str, ...]) -> Any:
    """The value of one field of a dataclass from the words of a command line.

    Parsed without the other options, which takes 1 ms in place of 66, and none when the same words come again (2 cores
    of an AMD EPYC): the rows of studies and the trials of sweeps change a few options each, thousands of times.

    Raises:
        ValueError: the words are no value of its type.
    """
    alone = make_dataclass(owner.__name__, [(name, get_type_hints(owner, include_extras=True)[name])])
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    flag = _flag(name)
    return getattr(_parse_all(alone, [flag, *words], [flag], config=settings), name)


def check_run_name(name: str) -> str:
    """The name of a run, a sweep or a study, if it can be one: it names a folder of `storage` and a run of MLflow.

    Raises:
        ValueError: it has other characters than letters, digits, `.`, `_` and `-`, does not begin with a letter or a
            digit, is too long, or is the name of another folder or file of `storage`.
    """
    if not RUN_NAME.fullmatch(name):
        raise ValueError(
            f"--name {name[: 2 * RUN_NAME_LENGTH]!r}: a name has 1 to {RUN_NAME_LENGTH} ASCII letters, digits and "
            ". _ -, and begins with a letter or a digit; a folder is chosen with --storage"
        )
    if RESERVED.fullmatch(name):
        raise ValueError(
            f"--name {name}: a folder or file of --storage has this name, which is no run's; choose another name"
        )
    return name


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path to value of every option; `override(preset, flatten(c)) == c` for a preset of the same model type."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        path = f"{prefix}{entry.name}"
        if is_dataclass(value):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = str(value) if isinstance(value, Workers) else value
    return flat


JOB_SETTINGS = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
"""Settings of tyro for jobs that do not train."""


def _cli(default: Any, arguments: Sequence[str], others: Sequence[str] = ()) -> Any:
    if not arguments:  # the default stays what it is, for which tyro would take 60 ms
        return default
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return _parse_all(type(default), arguments, [*_flags(default), *others], default=default, config=settings)


def _parse_all(kind: type[Any], words: Sequence[str], known: Sequence[str], **settings: Any) -> Any:
    """An object from all words of a command line, whose options are `known`.

    Raises:
        ValueError: no such option, one that is missing, or a value of the wrong type; in one line.
    """
    try:
        parsed, rest = _tyro(kind, words, **settings)
        problem = f"{shlex.join(rest)}: belongs to no option" if rest else ""
    except ValueError as error:
        problem = str(error)
    if unknown := _unknown_flags(words, known):
        problem = unknown_options(unknown, known)
    if problem:
        raise ValueError(problem)
    return parsed


def _tyro(kind: type[Any], words: Sequence[str], **settings: Any) -> tuple[Any, list[str]]:
    """An object from a command line, and the words that stand for none of its options.

    tyro prints what is wrong in a box and exits: there is no other way to learn it from its public functions.

    Raises:
        ValueError: an option is missing, or a value has the wrong type; the text of the box, in one line.
        SystemExit: help was asked for, and printed.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=list(words), return_unknown_args=True, **settings)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_unboxed(box.getvalue())) from None


def _unboxed(box: str) -> str:
    """The text of tyro's box in one line: no frame, no title, no colour, and no hint at a help that is not ours."""
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    parts = re.split(r"[─-]{9,}", " ".join(line.strip("│╰╯ ") for line in lines))
    texts = [part.replace("Argument helptext:", "").strip() for part in parts if "For full helptext" not in part]
    text = "; ".join(filter(None, texts)) or title
    return text.removeprefix("Error parsing ").replace(" (required)", ";").rstrip(";")


def _unknown_flags(words: Sequence[str], known: Collection[str]) -> list[str]:
    """The options among the words of a command line that are not known, as they were typed."""
    names = dict.fromkeys(word.split("=")[0] for word in words if word.startswith("--"))
    return [name for name in names if name.replace("_", "-") not in known]


def unknown_options(names: Sequence[str], known: Collection[str]) -> str:
    """The message for options that do not exist: near names of each, and where all of them are shown."""
    told = []
    for name in names:
        last = name.removeprefix("--").rpartition(".")[2]
        same = [flag for flag in known if flag.removeprefix("--").rpartition(".")[2] == last]  # --lr for --optim.lr
        near = [*dict.fromkeys([*same, *get_close_matches(name, known, 4, 0.8)])][:4]
        told.append(f"no option {name}" + (f"; near: {', '.join(near)}" if near else ""))
    return f"{'; '.join(told)}; {ALL} shows all"


def check_path(config: Any, path: str) -> None:
    """Check that a configuration has an option.

    Raises:
        ValueError: names what it has.
    """
    node = config
    for part in path.split("."):
        known = [entry.name for entry in fields(node)] if is_dataclass(node) else []
        if part not in known:
            raise ValueError(f"no option {path!r}: {type(node).__name__} has {', '.join(known) or 'no fields'}")
        node = getattr(node, part)
    if is_dataclass(node):
        raise ValueError(f"{path!r} is a group of options; name one of {', '.join(e.name for e in fields(node))}")


def _words(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _words(item)]
    return [str(value)]
