"""Stages of a backbone and the names of their feature maps."""

from __future__ import annotations

from torch import nn

STAGES: tuple[str, ...] = ("res2", "res3", "res4", "res5")
"""The four stages, fine to coarse, as detectron2 names them: strides 4, 8, 16 and 32 where nothing is dilated."""

STEM_AND_STAGES: tuple[str, ...] = ("stem", *STAGES)
"""The stages and the layers before them, whose feature map most backbones give, too; `freeze` counts these."""


def stage_of(backbone: nn.Module, name: str) -> int:
    """The stage of a parameter of a backbone: 0 = the stem, 1 to 4 = res2 to res5.

    Args:
        backbone: any of `Backbone.build`.
        name: of the parameter, in the backbone.

    Raises:
        ValueError: the stages of a timm model cannot be told apart.
    """
    if not hasattr(backbone, "stage_names"):
        return backbone.stage_of(name)  # type: ignore[operator]
    stages: list[list[str]] = backbone.stage_names()  # type: ignore[operator]
    found = (k for k, modules in enumerate(stages) if name.startswith(tuple(f"{module}." for module in modules)))
    return next(found, len(stages) - 1)
