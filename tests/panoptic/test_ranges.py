"""Every numeric option of panoptic/ has a range; values outside of it are named, checkpoints with them still load."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest

from panoptic.models import Architecture
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.ranges import NOT_EMPTY, OddInt, PositiveFloat, PositiveInt, UnitFloat, check_ranges, range_problems
from panoptic.training.device import Engine
from panoptic.training.optim import Optim
from panoptic.training.plain import from_plain, to_plain
from panoptic.transforms import POLICIES, Augment, Resize
from tests.support.options import without_range

ARCHITECTURES = typing.get_args(Architecture)


@dataclass(frozen=True)
class Inner:
    share: UnitFloat = 0.5


@dataclass(frozen=True)
class Outer:
    count: PositiveInt = 1
    rate: PositiveFloat = 1.0
    kernel: OddInt = 3
    sides: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (1, 2)
    levels: tuple[tuple[PositiveInt, int], ...] = ()
    most: PositiveInt | None = None
    window: tuple[PositiveInt, PositiveInt] | None = None
    noted: Annotated[int, "metadata of another library"] = 0
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    anything: Any = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: 0, but it must be 1 or more"),
        ({"rate": 0.0}, "rate: 0.0, but it must be more than 0 and finite"),
        ({"rate": math.inf}, "rate: inf, but it must be more than 0 and finite"),
        ({"rate": math.nan}, "rate: nan, but it must be more than 0 and finite"),
        ({"kernel": 4}, "kernel: 4, but it must be 1 or more and odd"),
        ({"sides": ()}, "sides: no value, but it must be at least 1 value"),
        ({"sides": (3, 0)}, "sides[1]: 0, but it must be 1 or more"),
        ({"levels": ((1, -9), (-2, 0))}, "levels[1][0]: -2, but it must be 1 or more"),
        ({"most": 0}, "most: 0, but it must be 1 or more"),
        ({"window": (0, 3)}, "window[0]: 0, but it must be 1 or more"),
        ({"inner": Inner(1.5)}, "inner.share: 1.5, but it must be 0 or more and at most 1"),
        ({"count": 2**32}, "count: 4294967296, but whole numbers go to 4294967295"),
        ({"noted": -(2**32)}, "noted: -4294967296, but whole numbers go to 4294967295"),
        ({"window": (1, 2**40)}, "window[1]: 1099511627776, but whole numbers go to 4294967295"),
        ({"anything": Inner(-1.0)}, "anything.share: -1.0, but it must be 0 or more and at most 1"),
    ],
)
def test_a_value_outside_of_its_range_is_named(change: dict[str, Any], message: str) -> None:
    assert list(range_problems(replace(Outer(), **change))) == [message]


def test_all_are_named_in_one_line() -> None:
    check_ranges(Outer(most=5, window=(2, 2), levels=((1, -9),)))
    with pytest.raises(ValueError, match=r"^count: -1, .*; kernel: 2, .*odd$"):
        check_ranges(Outer(count=-1, kernel=2))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, Optim, Engine, Augment, Resize], ids=lambda kind: kind.__name__)
def test_every_numeric_option_has_a_range_and_its_default_keeps_it(kind: type) -> None:
    assert list(without_range(kind)) == []
    check_ranges(kind())


def test_policies_keep_their_ranges() -> None:
    for policy in POLICIES.values():
        check_ranges(policy)


def test_checkpoints_with_odd_values_load() -> None:
    config = PanopticDeepLabConfig(nms_kernel=4, stuff_area=-1)
    assert from_plain(PanopticDeepLabConfig, to_plain(config)) == config
    assert len(list(range_problems(config))) == 2
