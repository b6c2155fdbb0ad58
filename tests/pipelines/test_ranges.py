"""Numbers that mean nothing are refused by name: on the command line, in an override and by a sweep's dry run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jobs import evaluate, independent, oracle, predict, prepare
from panoptic.ranges import check_ranges
from pipelines.config import Experiment, flatten, override, parse, parse_known, parse_options
from pipelines.evaluation.evaluate import options_of
from pipelines.presets import PRESETS
from pipelines.studies.plan import Options
from pipelines.tuning import search_space
from pipelines.tuning.checks import TrialCheck
from pipelines.tuning.plan import Trials
from tests.support.options import numeric_options, without_range

BY_ARCHITECTURE = {type(PRESETS[name]().model).__name__: name for name in sorted(PRESETS)}
"""One preset of each architecture."""

MEANINGLESS = [
    ("train.steps", -5),
    ("train.steps", 0),
    ("train.batch", 0),
    ("train.workers", 0),
    ("train.log_every", 0),
    ("train.validate_every", 0),
    ("train.validation_batch", 0),
    ("train.micro_batch", -1),
    ("train.keep", -1),
    ("train.keep", 0),
    ("train.overlays", -1),
    ("train.seed", -1),
    ("train.stop_after", -1),
    ("optim.warmup_steps", -1),
    ("optim.clip_norm", -0.1),
    ("optim.clip_norm", math.nan),
    ("optim.ema", 2),
    ("optim.ema", 1),
    ("optim.lr", math.inf),
    ("optim.lr", -1e-3),
    ("optim.betas", (0.9, 1)),
    ("model.kernel", 4),
    ("model.nms_kernel", 6),
    ("model.image_pool", (0, 0)),
    ("model.backbone.freeze", 6),
    ("augment.sides", ()),
    ("augment.crop", (-1, 4)),
    ("augment.flip", 1.5),
    ("resize.longest", 0),
    ("feed.threads", 0),
    ("feed.cpus", 0),
    ("data.limit", -1),
    ("data.scenes.train", 0),
    ("engine.max_skipped", 0),
]


@pytest.mark.parametrize(("path", "value"), MEANINGLESS, ids=str)
def test_what_means_nothing_is_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{path}(\[\d\])?: .*, but it must be ") as refused:
        override(PRESETS["demo"](), {path: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("train.seed", 10**24), ("train.steps", 10**24), ("data.limit", 2**40), ("train.threads", 2000)),
        *(("feed.threads", 2000), ("data.scenes.train", 10**7), ("augment.crop", (70000, 70000))),
        *(("resize.canvas", (70000, 1)), ("model.aspp_channels", 2**32), ("model.top_k", 2**32)),
    ],
    ids=str,
)
def test_a_number_beyond_all_sizes_is_refused_by_name(path: str, value: Any) -> None:
    """They overflowed in a worker, or took all memory, after the shards were prepared."""
    with pytest.raises(ValueError, match=rf"^{path}(\[\d\])?: .*, but (it must be .* at most|whole numbers go to)"):
        override(PRESETS["demo"](), {path: value})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_keep_their_ranges(name: str) -> None:
    check_ranges(PRESETS[name]())


@pytest.mark.parametrize(
    "kind",
    [Experiment, Options, *(job.Options for job in (evaluate, independent, oracle, predict, prepare))],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
def test_every_numeric_option_has_a_range(kind: type) -> None:
    assert list(without_range(kind)) == []


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_no_numeric_option_takes_every_number(architecture: str) -> None:
    base = PRESETS[BY_ARCHITECTURE[architecture]]()
    numeric = {path for group, value in vars(base).items() if hasattr(value, "__dataclass_fields__")
               for path, _ in numeric_options(type(value), f"{group}.")}  # fmt: skip
    wrong = {path: _wrong(value) for path, value in flatten(base).items() if path in numeric and _wrong(value) != ()}
    excluded = {"augment.early_crop": (0, 0), "optim.stage_decay": 1.0}
    wrong |= excluded  # a crop before and one after the scale exclude each other; rates by stage and by block, too
    with pytest.raises(ValueError) as refused:
        override(base, wrong)
    named = {problem.partition(":")[0].partition("[")[0] for problem in str(refused.value).split("; ")}
    assert named == wrong.keys() - excluded.keys()
    assert len(named) > 80


def _wrong(value: Any) -> Any:
    """A number that no option takes, in the place of each number of a value; () where there is none."""
    if isinstance(value, tuple):
        return tuple(_wrong(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ()
    return -(10**9) if isinstance(value, int) else math.nan


def test_the_command_line_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"^optim\.ema: 2\.0, but .*; train\.steps: -5, but it must be 1 or more$"):
        parse(["demo", "--train.steps", "-5", "--optim.ema", "2"], PRESETS)
    with pytest.raises(ValueError, match=r"^rows_per_shard: 0, but it must be 1 or more$"):
        words = ["--data.root", "x", "--data.split", "val", "--out", "y", "--rows-per-shard", "0"]
        parse_options(prepare.Options, words, "", {})
    with pytest.raises(ValueError, match=r"^actors: -2, but it must be -1 or more$"):
        parse_options(evaluate.Options, ["m.pt", "--data.root", "x", "--actors", "-2"], "", {})
    with pytest.raises(ValueError, match=r"^reduction: 1, but it must be 2 or more$"):
        parse_known(Options, ["--reduction", "1", "demo"], "")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("train.batch=choice(8,0)", "train.batch: 0"),
        ("optim.ema=grid(0,2)", "optim.ema: 2"),
        ("optim.clip_norm=uniform(-1,1)", "optim.clip_norm: -1"),
        ("model.kernel=randint(4,5)", "model.kernel: 4"),
    ],
)
def test_a_sweep_refuses_them_before_it_starts(expression: str, message: str) -> None:
    space = search_space.parse([expression])
    check = TrialCheck(Trials({"demo": PRESETS["demo"]()}, "demo", space))
    with pytest.raises(ValueError, match=message):
        for probe in search_space.probes(space):
            check(probe)


def test_what_a_run_stored_before_is_not_refused() -> None:
    base = PRESETS["demo"]()

    class Stored:
        options = {"resize.longest": 0}  # noqa: RUF012

    assert options_of(Stored, base).resize.longest == 0  # type: ignore[arg-type]
