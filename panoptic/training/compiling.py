"""A network that is compiled, and a count of the graphs that this takes.

Each new kind of input (another number of dimensions, sizes until they have become variables, training or evaluation)
takes a graph of its own, whose compilation stops the training for tens of seconds. After the first steps there should
be none: `CompiledGraphs` tells.
"""

from __future__ import annotations

from typing import Any

import torch

from panoptic.models.base import PanopticModel


def compile_network(model: PanopticModel, **options: Any) -> None:
    """Compile `network` of a model in place; losses and post-processing stay as they are.

    Args:
        model: unwrapped.
        options: of `torch.compile`.
    """
    model.network = torch.compile(model.network, **options)  # type: ignore[method-assign]


class CompiledGraphs:
    """Counts the graphs that torch.compile makes in this process."""

    def __init__(self) -> None:
        self._seen = _compiled()

    def new(self) -> int:
        """The number of graphs made since the last call, or since this object was made."""
        before, self._seen = self._seen, _compiled()
        return self._seen - before


def _compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
