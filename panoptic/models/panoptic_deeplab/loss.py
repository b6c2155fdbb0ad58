"""The losses of Panoptic-DeepLab (arXiv 1911.10194, section 3.2), on maps that are upsampled to the canvas.

Shapes: B images, C classes, H x W canvas, h x w stride-4 maps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from panoptic import losses
from panoptic.models.base import Outputs
from panoptic.models.panoptic_deeplab.upsampling import Upsampling
from panoptic.segmentation import Targets
from panoptic.targets.dense import CentreTargets

SemanticLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [B, C, H, W], classes int64 [B, H, W] and weights float [B, H, W] to a scalar."""


def weighted_losses(
    outputs: Outputs,
    targets: Targets,
    truth: CentreTargets,
    upsampling: Upsampling,
    *,
    semantic_loss: SemanticLoss,
    semantic_weight: float,
    centre_weight: float,
    offset_weight: float,
    foreground_weight: float,
) -> dict[str, Tensor]:
    """Terms "semantic", "centre", "offset", and "foreground" where the outputs have it.

    Args:
        outputs: of `PanopticDeepLab.network`.
        targets: the batch.
        truth: its dense targets.
        upsampling: of the flavour; the standalone one divides the offset loss by the weights of both channels.
        semantic_loss: of the semantic logits.
        semantic_weight, centre_weight, offset_weight, foreground_weight: factors of the terms.
    """
    maps = {name: upsampling.canvas(value, targets.frame.canvas) for name, value in outputs.items()}
    semantic = semantic_loss(maps["semantic"], truth.semantic, truth.semantic_weights)
    centre = losses.masked_squared_error(maps["centre"], truth.centre, truth.centre_weights)
    offset = losses.masked_absolute_error(
        maps["offset"], truth.offset, truth.offset_weights, per_channel=upsampling.standalone
    )
    terms = {
        "semantic": semantic_weight * semantic,
        "centre": centre_weight * centre,
        "offset": offset_weight * offset,
    }
    if "foreground" in maps:
        valid = targets.frame.valid(targets.segments.device)
        foreground = losses.foreground_cross_entropy(maps["foreground"], truth.foreground, valid)
        terms["foreground"] = foreground_weight * foreground
    return terms
