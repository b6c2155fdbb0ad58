"""The outputs of Panoptic-DeepLab that the truth can stand for; its dense targets are in `panoptic.targets.dense`.

Shapes: B images, C classes, H x W canvas.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from panoptic.models.base import CERTAIN, Outputs
from panoptic.segmentation import Categories, Targets
from panoptic.targets.dense import (
    Rounding,
    centre_heatmap,
    centre_offsets,
    class_logits,
    segment_moments,
    thing_mask,
)


def true_outputs(targets: Targets, categories: Categories, sigma: int, rounding: Rounding) -> Outputs:
    """The "semantic", "centre", "offset" and "foreground" of the truth, at canvas resolution.

    Offsets point to the rounded centres, not to the centroids, because another thing's rounded centre may lie nearer
    to a centroid. Void pixels get the first stuff class (and no foreground).

    Args:
        targets: the batch.
        categories: tell things from stuff.
        sigma: of the heatmap's Gaussians, in pixels.
        rounding: of the centres.

    Returns:
        float [B, C, H, W], [B, 1, H, W], [B, 2, H, W] and [B, 1, H, W].
    """
    moments = segment_moments(targets)
    snap = torch.round if rounding == "half_even" else torch.trunc
    snapped = replace(moments, rows=snap(moments.rows), columns=snap(moments.columns))
    foreground = thing_mask(targets, categories)[:, None]
    return {
        "semantic": class_logits(targets, categories, CERTAIN),
        "centre": centre_heatmap(targets, categories, moments, sigma, rounding),
        "offset": centre_offsets(targets, categories, snapped),
        "foreground": torch.where(foreground, CERTAIN, -CERTAIN),
    }
