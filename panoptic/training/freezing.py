"""Freezing parts of any model by the names of their parameters.

A frozen parameter gets no gradient and is left out of the optimiser. A batch norm whose own parameters are all
frozen keeps its statistics too: it becomes a `FrozenBatchNorm`, under the same keys. Dropout and stochastic depth
inside parts of which every parameter is frozen are off, as in evaluation, or stay on (`training_mode`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from panoptic.layers.norm import BATCH_NORMS, freeze

SHOWN = 8
"""Near names that an error lists."""


class FrozenWithoutWeights(ValueError):
    """A part is frozen though no weights were loaded into it: frozen noise learns nothing and measures nothing."""


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters whose names match any of the patterns (`backbone.*`, `transformer.encoder.*`).

    `*` stands for any letters, dots included, `?` for one, `[ab]` for one of these; case counts.

    Returns:
        the names of the parameters frozen by this, in the model's order.

    Raises:
        ValueError: a pattern matches no parameter; lists near names.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise ValueError(
                f"train.freeze: {pattern!r} matches no parameter; near: {', '.join(_near(pattern, names))}"
            )
    frozen = matching(names, patterns)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if frozen:
        norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
        freeze(model, [name for name in norms if _is_frozen(model.get_submodule(name))])
    return frozen


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns of `freeze_parameters`, in their order."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def refuse_frozen(model: nn.Module, fresh: Iterable[str]) -> None:
    """Refuse frozen parameters that got no weights: frozen noise measures nothing.

    Args:
        model: with all that is frozen.
        fresh: keys that no weights were loaded into.

    Raises:
        FrozenWithoutWeights: names the parameters and the remedies.
    """
    untrained = set(fresh)
    noise = [name for name, p in model.named_parameters() if not p.requires_grad and name in untrained]
    if noise:
        more = f" and {len(noise) - SHOWN} more" if len(noise) > SHOWN else ""
        raise FrozenWithoutWeights(
            f"{', '.join(noise[:SHOWN])}{more}: frozen, but the weights have nothing for them, and frozen noise "
            "measures nothing. Take weights that have them, or freeze less: fewer stages (--model.backbone.freeze), "
            "patterns that leave them out (--train.freeze)"
        )


def training_mode(model: nn.Module, frozen_dropout: bool = False) -> None:
    """Put a model into training mode, but for the parts of which every parameter is frozen.

    A module without parameters (a dropout) belongs to the smallest part around it that has some.

    Args:
        frozen_dropout: frozen parts go into training mode, too. DETR's published second stage leaves the dropout of its
            frozen transformer on.
    """
    model.train()
    if not frozen_dropout:
        _rest(model)


def _rest(module: nn.Module) -> None:
    """Put the largest frozen parts into evaluation mode."""
    if _is_frozen(module):
        module.eval()
        return
    for child in module.children():
        _rest(child)


def _is_frozen(module: nn.Module) -> bool:
    """A module that has parameters, none of which learns."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _near(pattern: str, names: list[str]) -> list[str]:
    """Names, and parts of the model as patterns, that resemble a pattern."""
    parts = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    inside = [part for part in sorted(parts) if pattern.strip("*.") in part] if pattern.strip("*.") else []
    near = get_close_matches(pattern, [*sorted(parts), *names], SHOWN, 0.5)
    return list(dict.fromkeys([*inside, *near]))[:SHOWN] or sorted({part for part in parts if part.count(".") == 1})
