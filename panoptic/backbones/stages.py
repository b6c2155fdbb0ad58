"""Stages of a backbone and the names of their feature maps."""

from __future__ import annotations

from torch import nn

from panoptic.backbones.config import STAGES


def stage_of(backbone: nn.Module, name: str) -> int:
    """The stage of a parameter of a backbone: 0 = the stem, 1 to 4 = res2 to res5.

    Args:
        backbone: any of `Backbone.build`.
        name: of the parameter, in the backbone.

    Raises:
        ValueError: the stages of a timm model cannot be told apart.
    """
    if hasattr(backbone, "layer_of"):  # a plain ViT
        layer = backbone.layer_of(name)  # type: ignore[operator]
        return len(STAGES) if layer is None else vit_stage(layer, backbone.depth)  # type: ignore[arg-type]
    if not hasattr(backbone, "stage_names"):
        return backbone.stage_of(name)  # type: ignore[operator]
    stages: list[list[str]] = backbone.stage_names()  # type: ignore[operator]
    found = (k for k, modules in enumerate(stages) if name.startswith(tuple(f"{module}." for module in modules)))
    return next(found, len(stages) - 1)


def vit_layer(name: str, depth: int) -> int:
    """The layer of a parameter of a plain ViT: 0 = patches, positions and tokens, 1 to `depth` = blocks, then the norm.

    Backbones that hold a plain ViT give it as `layer_of(name)` beside their `depth`, and None for parameters that are
    no part of the ViT and so have no published weights (a pyramid on top).

    Args:
        name: timm's, inside the ViT: `blocks.0.norm1.weight`.
        depth: number of blocks.
    """
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("norm.", "fc_norm.")) else 0


def vit_stage(layer: int, depth: int) -> int:
    """The stage that a layer (`vit_layer`) freezes with: the embeddings are the stem, quarters of the blocks stages.

    The final norm belongs to the last quarter. The split is ours: a plain ViT has no stages.
    """
    return 0 if layer == 0 else min(1 + len(STAGES) * (layer - 1) // depth, len(STAGES))


def freeze_vit(vit: nn.Module, depth: int, count: int) -> None:
    """Freeze the first `count` stages of a plain ViT (`vit_stage`): 0 = nothing, 1 = the embeddings, 5 = everything.

    Args:
        vit: under timm's names.
        depth: its number of blocks.
    """
    for name, parameter in vit.named_parameters():
        if vit_stage(vit_layer(name, depth), depth) < count:
            parameter.requires_grad_(False)
