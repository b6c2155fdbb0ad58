"""Walks over dataclasses of options: every numeric field, and those whose type states no range."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt


def numeric_options(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and annotated type of each numeric field of a dataclass and of those inside it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        hint = hints[entry.name]
        for member in (hint, *typing.get_args(hint)):
            if isinstance(member, type) and is_dataclass(member):
                yield from numeric_options(member, f"{prefix}{entry.name}.")
        if _numbers(hint, ranged=False):
            yield f"{prefix}{entry.name}", hint


def without_range(kind: type) -> Iterator[str]:
    """Paths of numeric fields that hold a number without a range."""
    for path, hint in numeric_options(kind):
        if not all(_numbers(hint, ranged=False)):
            yield path


def _numbers(hint: Any, ranged: bool) -> list[bool]:
    """True for each number of an annotated type that stands in a range."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return []
    if typing.get_origin(hint) is Annotated:
        ranged = ranged or any(isinstance(item, Ge | Gt | Le | Lt | Interval) for item in arguments[1:])
        return _numbers(arguments[0], ranged)
    if hint in (int, float):
        return [ranged]
    return [number for argument in arguments for number in _numbers(argument, ranged)]
