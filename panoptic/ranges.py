"""Ranges of numeric options, as part of their types, and the check of a configuration against them.

`steps: PositiveInt = 1000` is an `int` to a type checker and to `from_plain`; the range beside it is metadata of
`annotated_types`, the vocabulary of pydantic and others, from which the names here come too. Making a dataclass checks
nothing, so that checkpoints with odd but harmless values load. `check_ranges` is called where options are parsed.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, Predicate


def odd(value: int) -> bool:
    """True for a side that has a middle."""
    return value % 2 == 1


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
OddInt = Annotated[int, Ge(1), Predicate(odd)]
"""Side of a window with a middle."""
Side = Annotated[int, Interval(ge=1, le=65535)]
"""Pixels of a side of an image: what JPEG can hold."""
SideOrZero = Annotated[int, Interval(ge=0, le=65535)]
"""Pixels of a side of an image; 0 where the option is off."""
ThreadCount = Annotated[int, Interval(ge=0, le=1024)]
"""Threads of a process; 0 where that means a number of its own."""
MOST_LAYERS = 1000
LayerCount = Annotated[int, Interval(ge=1, le=MOST_LAYERS)]
LayerCountOrZero = Annotated[int, Interval(ge=0, le=MOST_LAYERS)]
"""Layers that are built one after the other, each a module: their number is time and memory, even without weights."""
ByteInt = Annotated[int, Interval(ge=0, le=255)]
FiniteFloat = Annotated[float, Interval(gt=-math.inf, lt=math.inf)]
PositiveFloat = Annotated[float, Interval(gt=0, lt=math.inf)]
NonNegativeFloat = Annotated[float, Interval(ge=0, lt=math.inf)]
UnitFloat = Annotated[float, Interval(ge=0, le=1)]
"""A probability, a share, an overlap, or a threshold of one."""
PositiveUnitFloat = Annotated[float, Interval(gt=0, le=1)]
"""A share that cannot be nothing."""
Decay = Annotated[float, Interval(ge=0, lt=1)]
"""Share that a moving average keeps, or dropout drops; with 1 nothing new would come through."""

LARGEST = 2**32 - 1
"""The largest whole number of any option: what seeds are in NumPy, and more than any size or count can be."""

NOT_EMPTY = MinLen(1)
"""`Annotated[tuple[PositiveInt, ...], NOT_EMPTY]` has one value at least."""


def check_ranges(config: Any) -> None:
    """Check every numeric option of a dataclass and of those inside it against its range.

    Raises:
        ValueError: names each option, its value and its range, in one line.
    """
    problems = list(range_problems(config))
    if problems:
        raise ValueError("; ".join(problems))


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """The annotated type of each field of a dataclass, which takes a millisecond to find out."""
    return typing.get_type_hints(kind, include_extras=True)


def check_layers(config: Any, prefix: str = "") -> None:
    """Refuse more layers than any network has, in a configuration of whose values nothing else is checked.

    Raises:
        ValueError: names the option, its value and the bound.
    """
    hints = _hints(type(config))
    for entry in fields(config):
        value, path = getattr(config, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            check_layers(value, f"{path}.")
        elif hints[entry.name] in (LayerCount, LayerCountOrZero) and value > MOST_LAYERS:
            raise ValueError(f"{path}: {value}, but it must be at most {MOST_LAYERS}")


def range_problems(config: Any, prefix: str = "") -> Iterator[str]:
    """The problem of each option outside of its range: `train.steps: -5, but it must be 1 or more`."""
    hints = _hints(type(config))
    for entry in fields(config):
        yield from _problems(hints[entry.name], getattr(config, entry.name), f"{prefix}{entry.name}")


def _problems(kind: Any, value: Any, path: str) -> Iterator[str]:
    """The problems of a value of the annotated type `kind`, and of the values inside it."""
    if is_dataclass(value):
        yield from range_problems(value, f"{path}.")
        return
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        limits = [limit for item in inner[1:] for limit in (item if isinstance(item, GroupedMetadata) else (item,))]
        if not all(_holds(limit, value) for limit in limits):
            yield f"{path}: {_shown(value)}, but it must be {_words(limits)}"
            return
        yield from _problems(inner[0], value, path)
    elif isinstance(value, tuple) and typing.get_origin(kind) is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        for i, (part, one) in enumerate(zip(kinds, value, strict=True)):
            yield from _problems(part, one, f"{path}[{i}]")
    elif value is not None and type(None) in inner:  # `X | None`
        for member in inner:
            yield from _problems(member, value, path) if member is not type(None) else ()
    elif kind is int and isinstance(value, int) and abs(value) > LARGEST:
        yield f"{path}: {_shown(value)}, but whole numbers go to {LARGEST}"


def _holds(limit: Any, value: Any) -> bool:
    """True if a value keeps one limit. NaN, of which every comparison is false, keeps none."""
    match limit:
        case Ge(low):
            return value >= low
        case Gt(low):
            return value > low
        case Le(high):
            return value <= high
        case Lt(high):
            return value < high
        case MinLen(length):
            return len(value) >= length
        case Predicate(rule):
            return rule(value)
    return True  # metadata of other libraries, such as tyro's


def _words(limits: list[Any]) -> str:
    """`1 or more and odd`."""
    words = []
    for limit in limits:
        match limit:
            case Lt(high) if high == math.inf:
                words.append("finite")
            case Gt(low) if low == -math.inf:
                pass
            case Ge(low):
                words.append(f"{low} or more")
            case Gt(low):
                words.append(f"more than {low}")
            case Le(high):
                words.append(f"at most {high}")
            case Lt(high):
                words.append(f"less than {high}")
            case MinLen(length):
                words.append(f"at least {length} value{'s' * (length > 1)}")
            case Predicate(rule):
                words.append(getattr(rule, "__name__", str(rule)))
    return " and ".join(words)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "no value" if isinstance(value, tuple) else str(value)
