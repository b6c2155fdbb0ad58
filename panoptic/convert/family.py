"""The interface between `convert` and the architectures whose published checkpoints it reads, and what these share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from panoptic.models import Architecture
from panoptic.segmentation import Categories

State = Mapping[str, Tensor]
"""Names and tensors of a checkpoint."""

Rules = tuple[tuple[str, Callable[[re.Match[str]], str | None]], ...]
"""Regular expressions of a file's names, and our name of a match."""

COCO_CLASSES = 133
"""The classes of a COCO-panoptic model; any other count is taken for Cityscapes' configuration."""


@dataclass(frozen=True)
class Hints:
    """The facts that a user adds to files that do not tell all: EoMT's, and no others."""

    base: State | None = None
    """The ViT that the file holds differences from, as `read_checkpoint` gives it."""
    whole: bool = False
    """The file holds the ViT itself, whatever its norms look like."""
    heads: int = 0
    """Heads of each block; 0 = the published number for the width."""
    query_blocks: int = 0
    """Blocks that hold queries; 0 = what the file says, or the published number for the depth."""
    canvas: tuple[int, int] = (0, 0)
    """Height and width in pixels for which the model was trained; 0 0 = the square that the file's positions make."""

    def given(self) -> list[str]:
        """The names of those that were given."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) not in (None, False, 0, (0, 0))]


def unchanged(state: State) -> State:
    """The tensors as they are, for files in which ours have other names and nothing else."""
    return state


@dataclass(frozen=True)
class Family:
    """The checkpoints that one project wrote of one architecture."""

    recognise: Callable[[Mapping[str, object]], bool]
    """True for the names of a file that holds this architecture; the first family that recognises a file reads it."""
    rename: Callable[[Mapping[str, object]], dict[str, str | None]]
    """Gives our name of each of the file's, None where it is not known."""
    build: Callable[[State, Categories], tuple[Architecture, State]]
    """Gives the configuration and all of its weights, buffers for a wider class space included, of renamed weights.

    Raises ValueError where the head does not fit the categories."""
    translate: Callable[[State], State] = unchanged
    """Splits or joins tensors under the file's own kind of names, before renaming (query, key and value)."""
    hinted: Callable[[Hints], Family] | None = None
    """Gives the family with what a user adds to its files; None where these tell all."""


def our_name(rules: Rules, key: str) -> str | None:
    """Our name of a key by the first rule that matches it as a whole, None where none does."""
    return next((name(match) for rule, name in rules if (match := re.fullmatch(rule, key))), None)


def weight(weights: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor under one of our names.

    Raises:
        ValueError: it is missing.
    """
    if key not in weights:
        raise ValueError(f"convert: the checkpoint lacks what becomes {key}; is it of the source that was named?")
    return weights[key]


def same_classes(count: int, categories: Categories) -> None:
    """Compare the number of classes of a published head with that of the list.

    Raises:
        ValueError: they differ.
    """
    if count != len(categories):
        raise ValueError(
            f"categories: the checkpoint's head has {count} classes, the list has {len(categories)}; give the "
            "categories of the published model in its order (to train on others, fine-tune from the result)"
        )
