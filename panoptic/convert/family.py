"""What `convert` asks of each architecture whose published checkpoints it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from panoptic.models import Architecture
from panoptic.segmentation import Categories

State = Mapping[str, Tensor]
"""Names and tensors of a checkpoint."""


def unchanged(state: State) -> State:
    """Of a file whose tensors are ours but for their names."""
    return state


@dataclass(frozen=True)
class Family:
    """The checkpoints that one project wrote of one architecture."""

    recognise: Callable[[Mapping[str, object]], bool]
    """Whether a file holds this architecture, told by its names alone; the first that does is taken."""
    rename: Callable[[Mapping[str, object]], dict[str, str | None]]
    """Our name of each of the file's, None where it is not known."""
    build: Callable[[State, Categories], tuple[Architecture, State]]
    """Renamed weights to the configuration and all of its weights, buffers for a wider class space included.

    Raises ValueError where the head does not fit the categories."""
    translate: Callable[[State], State] = unchanged
    """Tensors split or joined under the file's own kind of names, before renaming (query, key and value)."""


def weight(weights: Mapping[str, Tensor], key: str) -> Tensor:
    """One of ours.

    Raises:
        ValueError: it is missing.
    """
    if key not in weights:
        raise ValueError(f"convert: the checkpoint lacks what becomes {key}; is it of the source that was named?")
    return weights[key]


def same_classes(found: int, categories: Categories) -> None:
    """The number of classes of a published head is that of the list.

    Raises:
        ValueError: it is not.
    """
    if found != len(categories):
        raise ValueError(
            f"categories: the checkpoint's head has {found} classes, the list has {len(categories)}; give the "
            "categories of the published model in its order (to train on others, fine-tune from the result)"
        )
