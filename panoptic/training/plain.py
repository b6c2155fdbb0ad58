"""Configurations as plain values, as checkpoints and MLflow store them, and back.

A dataclass becomes a dict of its fields that says its class's name, a tuple becomes a list; so every configuration can
be written as JSON and read with `weights_only=True`. The way back is led by the annotations of the fields: nothing is
built but the dataclasses that they name.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from panoptic import models


def to_plain(value: Any) -> Any:
    """A configuration as dicts, lists, strings and numbers; a dataclass becomes {"class": name, **fields}."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"class": type(value).__name__, **own}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"to_plain: {type(value).__name__} is no plain value, dataclass, tuple, list or dict")


def from_plain(kind: Any, plain: Any, where: str = "config") -> Any:
    """The inverse of `to_plain`: a value of the annotated type `kind`.

    A dataclass's absent fields take their defaults, so that older checkpoints load. Whole numbers are read as floats
    where the annotation says float, as JSON may have written them.

    Args:
        kind: a dataclass, a union, a Literal, a tuple or dict of such types, or bool, int, float, str or None's type.
        plain: the value.
        where: the path that error messages begin with.

    Raises:
        ValueError: an unknown field, a missing one without default, or a value of another type; names the path.
    """
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if is_dataclass(kind):
        return _read_fields(kind, plain, where)
    if origin is typing.Union or origin is types.UnionType:
        return _read_union(arguments, plain, where)
    if origin is typing.Literal:
        if plain in arguments:
            return plain
        raise ValueError(f"{where}: {plain!r} is none of {', '.join(map(repr, arguments))}")
    if origin is tuple and isinstance(plain, list | tuple):
        inner = arguments[:1] * len(plain) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(plain):
            raise ValueError(f"{where}: {len(plain)} values, {len(inner)} wanted")
        return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, plain, strict=True)))
    if origin is dict and isinstance(plain, dict):
        return {k: from_plain(arguments[1], v, f"{where}.{k}") for k, v in plain.items()}
    if kind is float and type(plain) is int:
        return float(plain)
    if isinstance(kind, type) and type(plain) is kind:
        return plain
    raise ValueError(f"{where}: {plain!r} is no {getattr(kind, '__name__', kind)}")


def _read_fields(kind: Any, plain: Any, where: str) -> Any:
    """The dataclass `kind` of the values of its fields."""
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where}: {plain!r} stands where the fields of {kind.__name__} are wanted")
    if plain.get("class", kind.__name__) != kind.__name__:
        raise ValueError(f"{where}: is a {plain['class']}, wanted is a {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}
    unknown = [name for name in plain if name not in known and name != "class"]
    if unknown:
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}; {kind.__name__} has {', '.join(known)}")
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in plain]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}, which {kind.__name__} has no default for")
    return kind(**{n: from_plain(hints[n], v, f"{where}.{n}") for n, v in plain.items() if n != "class"})


def _read_union(members: tuple[Any, ...], plain: Any, where: str) -> Any:
    """Dataclass members by the name that the value carries, others by the first type that takes it."""
    named = plain.get("class") if isinstance(plain, Mapping) else None
    for member in members:
        if is_dataclass(member):
            if named == getattr(member, "__name__", ""):
                return from_plain(member, plain, where)
            continue
        try:
            return from_plain(member, plain, where)
        except ValueError:
            continue
    names = ", ".join(getattr(member, "__name__", str(member)) for member in members)
    raise ValueError(f"{where}: {named or plain!s} is none of {names}")


def architectures() -> dict[str, type]:
    """Every configuration class of the union `panoptic.models.Architecture`, by name."""
    union: Any = models.Architecture
    return {kind.__name__: kind for kind in typing.get_args(union) or (union,)}


def read_config(plain: Mapping[str, Any]) -> Any:
    """The configuration that `to_plain` wrote, of the class of `panoptic.models.Architecture` that it names.

    Raises:
        ValueError: unknown class, unknown or mistyped field.
    """
    known = architectures()
    name = plain.get("class")
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"checkpoint: architecture {name!r} is not known; known are {', '.join(sorted(known))}")
    return from_plain(known[name], plain, name)


def without_download(plain: Any) -> Any:
    """A plain configuration whose backbones ask for no weights: those of a checkpoint are about to replace them."""
    if isinstance(plain, list):
        return [without_download(value) for value in plain]
    if not isinstance(plain, Mapping):
        return plain
    changed = {key: without_download(value) for key, value in plain.items()}
    return changed | {"weights": "none"} if plain.get("class") == "Backbone" else changed
