"""The search space of a sweep: expressions such as `optim.lr=loguniform(1e-5,1e-3)`, read without executing anything.

| expression | values |
|---|---|
| `grid(a, b, …)` | every one, crossed with the other grids |
| `choice(a, b, …)` | one of them, drawn |
| `uniform(low, high)` | any number between |
| `loguniform(low, high)` | any number between, equally likely in each decade |
| `randint(low, high)` | whole numbers from low to high - 1 |
| `quniform(low, high, step)` | multiples of step between low and high |
| a plain value | that one |

Values are numbers, true, false, none, names without quotes (`resnet50`, `panoptic-deeplab-r50-coco`), strings in
quotes and tuples of these. A path is any option of the experiment; `preset` is one too.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = {
    "grid": (1, None),
    "choice": (1, None),
    "uniform": (2, 2),
    "loguniform": (2, 2),
    "randint": (2, 2),
    "quniform": (3, 3),
}
"""Kinds of expressions, with the fewest and the most arguments of each (None = any number)."""

ENUMERATED = ("grid", "choice")
"""Kinds whose arguments are the values themselves."""

NAME = re.compile(r"[A-Za-z_][\w.-]*")

WORDS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}

PRESET = "preset"
"""The path that chooses the preset, which all other paths change."""

MOST_TRIED = 512
"""Combinations of a dry run; of larger products every value is tried once, with the first of the others."""


@dataclass(frozen=True)
class Domain:
    """The values of one path."""

    kind: str
    """A key of `KINDS`."""
    values: tuple[Any, ...]
    """The values of grid and choice, else the arguments."""

    def __str__(self) -> str:
        """The expression: `uniform(1, 8)`."""
        return f"{self.kind}({', '.join(map(str, self.values))})"

    def __contains__(self, value: object) -> bool:
        """True if a value can be drawn, steps aside."""
        if self.kind in ENUMERATED:
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    @property
    def constant(self) -> bool:
        """True if there is only one value."""
        return self.kind in ENUMERATED and len(self.values) == 1

    @property
    def whole(self) -> bool:
        """True if a range gives whole numbers only."""
        return self.kind == "randint" or (self.kind == "quniform" and all(isinstance(v, int) for v in self.values))

    def probes(self) -> tuple[Any, ...]:
        """Values that a dry run tries: all that are listed, or both ends."""
        if self.kind in ENUMERATED:
            return self.values
        low, high = self.values[:2]
        return (low, high - 1) if self.kind == "randint" else (self.cleaned(low), self.cleaned(high))

    def cleaned(self, value: Any) -> Any:
        """A drawn value as an option takes it: whole steps of whole numbers are whole numbers, too."""
        if self.kind in ENUMERATED:
            return value
        return round(value) if self.whole else float(value)

    def clipped(self, value: Any) -> Any:
        """The nearest value of the domain, for searchers that step outside."""
        if self.kind in ENUMERATED:
            return value
        low, high = self.probes()
        value = min(max(value, low), high)
        if self.kind == "quniform":
            step = self.values[2]
            value = min(round(value / step) * step, high)
        return self.cleaned(value)


Space = dict[str, Domain]


def parse(expressions: Sequence[str]) -> Space:
    """`["optim.lr=loguniform(1e-5,1e-3)", …]` to a space, in that order.

    Raises:
        ValueError: an expression that is not understood, or a path given twice; the message quotes it.
    """
    space: Space = {}
    for text in expressions:
        path, sign, expression = text.partition("=")
        path = path.strip().removeprefix("--").replace("-", "_")
        if not sign or not path:
            raise ValueError(f"--sweep {text!r}: write path=expression, such as optim.lr=loguniform(1e-5,1e-3)")
        if path in space:
            raise ValueError(f"--sweep {text!r}: {path} is given twice")
        space[path] = _domain(text, expression.strip())
    return space


def _domain(text: str, expression: str) -> Domain:
    """The values of one expression; `text` is quoted in errors."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"--sweep {text!r}: {expression!r} is not an expression; {_help()}") from error
    if not isinstance(tree, ast.Call):
        return Domain("grid", (_value(text, expression, tree),))
    kind = tree.func.id if isinstance(tree.func, ast.Name) else ast.unparse(tree.func)
    if kind not in KINDS:
        raise ValueError(f"--sweep {text!r}: {kind!r} is not known; {_help()}")
    if tree.keywords:
        raise ValueError(f"--sweep {text!r}: give the arguments by place, not by name")
    least, most = KINDS[kind]
    if len(tree.args) < least or (most is not None and len(tree.args) > most):
        count = f"{least}" if most == least else f"{least} or more"
        raise ValueError(f"--sweep {text!r}: {kind} takes {count} arguments, not {len(tree.args)}")
    domain = Domain(kind, tuple(_value(text, expression, argument) for argument in tree.args))
    _check(text, domain)
    return domain


def _value(text: str, expression: str, node: ast.expr) -> Any:
    """The value of a literal, of a name (as a string) or of a tuple of these; anything else is refused."""
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(text, expression, item) for item in node.elts)
    source = ast.get_source_segment(expression, node) or ""
    if source in WORDS:
        return WORDS[source]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and isinstance(node.operand.value, int | float)
    ):
        return -node.operand.value
    if NAME.fullmatch(source):
        return source
    raise ValueError(f"--sweep {text!r}: {source!r} is neither a number, a name, a quoted string nor a tuple of these")


def _check(text: str, domain: Domain) -> None:
    """Refuse values that are listed twice, and ranges that are not of numbers in order."""
    if domain.kind in ENUMERATED:
        if len(set(map(repr, domain.values))) < len(domain.values):
            raise ValueError(f"--sweep {text!r}: a value stands there twice")
        return
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in domain.values):
        raise ValueError(f"--sweep {text!r}: {domain.kind} takes numbers")
    values = domain.values
    low, high = values[:2]
    if not low < high:
        raise ValueError(f"--sweep {text!r}: the lower end {low} must lie below the upper end {high}")
    if domain.kind == "loguniform" and low <= 0:
        raise ValueError(f"--sweep {text!r}: loguniform needs a lower end above 0")
    if domain.kind == "randint" and not all(isinstance(v, int) for v in domain.values):
        raise ValueError(f"--sweep {text!r}: randint takes whole numbers; the upper one is not among the values")
    if domain.kind == "quniform" and not 0 < values[2] <= high - low:
        raise ValueError(f"--sweep {text!r}: the step must be above 0 and at most {high - low}")
    if domain.kind == "quniform" and any(not math.isclose(v / values[2], round(v / values[2])) for v in (low, high)):
        raise ValueError(f"--sweep {text!r}: both ends must be multiples of the step {values[2]}")


def _help() -> str:
    """The expressions that there are, for errors."""
    return "there are grid, choice, uniform, loguniform, randint(low, high + 1), quniform(low, high, step), or a value"


def probes(space: Space) -> Iterator[dict[str, Any]]:
    """The combinations that a dry run tries: all of them where there are few, else each value at least once."""
    columns = [domain.probes() for domain in space.values()]
    if math.prod(map(len, columns)) <= MOST_TRIED:
        rows = itertools.product(*columns)
    else:
        longest = max(map(len, columns))
        rows = (tuple(column[min(k, len(column) - 1)] for column in columns) for k in range(longest))
    for row in rows:
        yield dict(zip(space, row, strict=True))


def dry_run(space: Space, check: Callable[[dict[str, Any]], Any]) -> int:
    """Try every probe before anything is started.

    Args:
        space: parsed.
        check: turns a probe into an experiment, and raises ValueError where it cannot.

    Returns:
        the number of probes.

    Raises:
        ValueError: the first probe that fails, with its values.
    """
    count = 0
    for probe in probes(space):
        try:
            check(probe)
        except ValueError as error:
            chosen = " ".join(f"{path}={value}" for path, value in probe.items())
            raise ValueError(f"the sweep cannot take {chosen}: {error}") from error
        count += 1
    return count


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each dotted path that no other of them shares: `optim.lr` is `lr`."""
    names = {}
    for path in paths:
        parts = path.split(".")
        endings = (".".join(parts[-k:]) for k in range(1, len(parts) + 1))
        others = [other.split(".") for other in paths if other != path]
        names[path] = next(e for e in endings if all(".".join(o[-e.count(".") - 1 :]) != e for o in others))
    return names


def label(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The name of a trial: `lr=0.0003 freeze=2`."""
    return " ".join(f"{names.get(path, path)}={_text(value)}" for path, value in values.items())


def _text(value: Any) -> str:
    """A value as it stands in the name of a trial."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple | list):
        return ",".join(map(_text, value)) or "()"
    return str(value)


def to_tune(space: Space, enumerate_choices: bool = False) -> dict[str, Any]:
    """The space as Ray Tune's `param_space`; `enumerate_choices` makes grids of the choices."""
    from ray import tune

    def to_domain(domain: Domain) -> Any:
        if domain.constant:  # a grid of one value is a grid all the same, which optuna refuses
            return domain.values[0]
        if domain.kind == "grid" or (domain.kind == "choice" and enumerate_choices):
            return tune.grid_search(list(domain.values))
        if domain.kind == "choice":
            return tune.choice(list(domain.values))
        return getattr(tune, domain.kind)(*domain.values)

    return {path: to_domain(domain) for path, domain in space.items()}
