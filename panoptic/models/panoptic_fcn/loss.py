"""What kernels draw against the masks of things and regions: the mask loss of Panoptic FCN."""

from __future__ import annotations

from torch import Tensor

from panoptic.losses import squared_dice_loss


def kernel_dice_loss(
    features: Tensor, masks: Tensor, kernels: Tensor, image: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Summed, weighted dice loss of what kernels draw.

    Args:
        features: [B, C, y, x].
        masks: float [B, M, y, x].
        kernels: [P, k, C].
        image, index: int64 [P], the mask that belongs to each.
        weights: [P, k].
    """
    total = features.new_zeros(())
    for b, feature in enumerate(features.flatten(2)):
        here = image == b
        losses = squared_dice_loss(kernels[here] @ feature, masks[b, index[here]].flatten(1))
        total = total + (losses * weights[here]).sum()
    return total
