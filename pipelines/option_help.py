"""The help of an experiment's options: the usual ones by default, all of them on demand, in the order of use.

The text of an option is the line under its field, as in the help of every other job. It stands beside the value that
the option has, since an experiment begins as a preset, whose values are what a user wants to see.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

ORDER = ("", "data", "train", "optim", "engine", "augment", "resize", "feed", "tracking", "model")
"""Groups of options in the order in which a user needs them; "" are those of no group."""

USUAL = (
    *("data.root", "data.train", "data.val", "name", "storage", "train.steps", "train.batch", "train.micro_batch"),
    *("train.workers", "train.gpu", "train.validate_every", "train.weights", "optim.lr", "engine.precision"),
    *("augment.crop", "resize.short", "tracking.uri", "tracking.register"),
    *("model.backbone.name", "model.backbone.weights"),
)
"""The twenty options that most trainings name, in the order of use."""

WIDTH = 100
"""The most characters of a line, on wide terminals."""


def option_help(config: Any, description: str, everything: bool) -> str:
    """The help of a configuration.

    Args:
        config: a dataclass of dataclasses; its values stand beside the options.
        description: stands above.
        everything: all options, each under its group; else the usual ones.
    """
    options = dict(walk(config))
    width = _width()
    lines = [*_paragraphs(description, width), ""]
    if not everything:
        lines += ["The usual options, with the values of this preset (--help-all shows every option):", ""]
        for path in USUAL:
            lines += _entry(path, *options[path], width)
        return "\n".join(lines)
    for group in ORDER:
        members = [path for path in options if path.rpartition(".")[0].split(".")[0] == group]
        title = f"{group} options".strip()
        lines += [title, "-" * len(title), ""]
        for path in sorted(members, key=lambda member: member not in USUAL):
            lines += _entry(path, *options[path], width)
        lines.append("")
    return "\n".join(lines)


def job_help(
    kind: type, description: str, usual: Sequence[str], everything: bool, positional: Collection[str] = ()
) -> str:
    """The help of a job that does not train.

    Args:
        kind: the dataclass of its options.
        description: stands above.
        usual: dotted paths of the options that most calls name, in the order of use; () = all of them.
        everything: all options, each under its group; else the usual ones.
        positional: fields that are given without a name.
    """
    width, options = _width(), dict(walk(kind))
    entries = {path: _job_entry(path, path in positional, *option, width) for path, option in options.items()}
    lines = [*_paragraphs(description, width), ""]
    if usual and not everything:
        lines += ["The usual options (--help-all shows every option):", ""]
        return "\n".join([*lines, *(line for path in usual for line in entries[path])])
    groups = dict.fromkeys(path.rpartition(".")[0].split(".")[0] for path in options)
    for group in sorted(groups, key=ORDER.index):
        members = [path for path in options if path.rpartition(".")[0].split(".")[0] == group]
        title = f"{group} options".strip()
        lines += [title, "-" * len(title), ""]
        lines += [line for path in sorted(members, key=lambda path: path not in usual) for line in entries[path]]
        lines.append("")
    return "\n".join(lines)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str, str]]]:
    """Each option of a configuration by its dotted path: value, its choices (or ""), documentation.

    Args:
        config: a dataclass; or its class, whose defaults are the values then, MISSING where it has none.
        prefix: of the paths.
    """
    kind = config if isinstance(config, type) else type(config)
    hints, texts = _hints(kind), documentation(kind)
    for entry in fields(kind):
        path = f"{prefix}{entry.name}"
        value = _default(entry, hints[entry.name]) if config is kind else getattr(config, entry.name)
        if is_dataclass(value):
            yield from walk(value, f"{path}.")
        else:
            yield path, (value, " | ".join(choices(hints[entry.name])), texts.get(entry.name, ""))


def choices(hint: Any) -> list[str]:
    """The words that a type takes where it takes only some, such as those of a Literal; [] where it takes any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return choices(arguments[0])
    if origin is Literal:
        return [str(word) for word in arguments]
    if hint is bool:
        return ["True", "False"]
    return [word for argument in arguments for word in choices(argument)] if origin is not None else []


@cache
def documentation(kind: type) -> Mapping[str, str]:
    """The text under each field of a dataclass and of those that it inherits from."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = node.body if isinstance(node, ast.ClassDef) else []
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                texts[statement.target.id] = " ".join(str(text.value).split()) if isinstance(text, ast.Constant) else ""
    return texts


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _default(entry: Field[Any], hint: Any) -> Any:
    """The default of a field, MISSING where it has none; of a group of options without one its class."""
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return hint if entry.default is MISSING and is_dataclass(hint) else entry.default


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def _paragraphs(text: str, width: int) -> list[str]:
    """The lines of a text, whose paragraphs are broken anew; commands and tables, which are indented, stay."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        verbatim = paragraph.startswith((" ", "|"))
        lines += ["", *(paragraph.split("\n") if verbatim else textwrap.wrap(paragraph, width, break_on_hyphens=False))]
    return lines[1:]


def _job_entry(path: str, positional: bool, value: Any, words: str, text: str, width: int) -> list[str]:
    """An option of a job that does not train: arguments without a name, and flags, which take no value."""
    group, dot, name = path.replace("_", "-").rpartition(".")
    if positional:
        head = name.upper()
    elif isinstance(value, bool):
        head = f"--{group}{dot}{'no-' * value}{name}"
    elif value is MISSING:
        head = f"--{path.replace('_', '-')} {name.upper()}   (required)"
    elif value is None or value == ():
        head = f"--{path.replace('_', '-')} {name.upper()}{' …' * (value == ())}" + (f"   ({words})" if words else "")
    else:
        return _entry(path, value, words, text, width)
    return [f"  {head}", *(f"      {line}" for line in textwrap.wrap(text, width - 6, break_on_hyphens=False))]


def _entry(path: str, value: Any, words: str, text: str, width: int) -> list[str]:
    items = value if isinstance(value, tuple) else (value,)
    shown = " ".join(str(item) for item in items) or ("''" if value == "" else "")
    head = f"  --{path.replace('_', '-')} {shown}".rstrip() + (f"   ({words})" if words else "")
    body = textwrap.wrap(text, width - 6, break_on_hyphens=False)
    heads = textwrap.wrap(head, width, subsequent_indent=" " * 8, break_on_hyphens=False)
    return [*heads, *(f"      {line}" for line in body)]
