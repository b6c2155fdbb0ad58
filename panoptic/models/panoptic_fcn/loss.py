"""The losses of Panoptic FCN (Li et al., arXiv 2012.00720, section 3.4): of positions and of masks that kernels draw.

Shapes: B images, h x w a level, y x x the cells of stride 4, C channels, P things or regions of all levels, k kernels
of each, M masks an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from panoptic.losses import soft_focal_loss, squared_dice_loss
from panoptic.models.base import Outputs
from panoptic.models.panoptic_fcn.config import LEVELS
from panoptic.models.panoptic_fcn.kernel_generator import (
    centre_kernels,
    embedded,
    guided_kernels,
    region_kernels,
)
from panoptic.models.panoptic_fcn.targets import KernelTargets, at_centres


def weighted_losses(
    outputs: Outputs,
    truth: KernelTargets,
    thing_embed: nn.Conv2d,
    stuff_embed: nn.Conv2d,
    *,
    alpha: float,
    gamma: float,
    points: int,
    own_cells: bool,
    centres: bool,
    position_weight: float,
    mask_weight: float,
) -> dict[str, Tensor]:
    """Terms "thing_position", "stuff_position", "thing_mask" and "stuff_mask".

    Args:
        outputs: of `PanopticFCN.network`.
        truth: of the batch.
        thing_embed: from the kernels of things to those that draw.
        stuff_embed: from the kernels of regions to those that draw.
        alpha: of the focal loss.
        gamma: of the focal loss.
        points: kernels that the weighted dice loss takes a thing; 0 takes the one at its centre, not weighted.
        own_cells: of `mean_kernels`.
        centres: regions are where their centres are, as things are.
        position_weight: factor of both position losses.
        mask_weight: factor of both mask losses.
    """
    thing_position, stuff_position = position_losses(outputs, truth, alpha, gamma, centres)
    thing_mask, things = thing_mask_loss(outputs, truth, thing_embed, points)
    stuff_mask, regions = stuff_mask_loss(outputs, truth, stuff_embed, own_cells, centres)
    positions = max(1, regions) if centres else len(outputs["encoded"])
    return {
        "thing_position": position_weight * thing_position / max(1, things),
        "stuff_position": position_weight * stuff_position / positions,
        "thing_mask": mask_weight * thing_mask / max(1, things),
        "stuff_mask": mask_weight * stuff_mask / max(1, regions),
    }


def position_losses(
    outputs: Outputs, truth: KernelTargets, alpha: float, gamma: float, centres: bool = False
) -> tuple[Tensor, Tensor]:
    """The focal losses of things, a sum over all cells, and of regions, the mean over the cells of each, added up.

    Of the `centres` of regions it is a sum over all cells as well.
    """
    thing_position = stuff_position = outputs["encoded"].new_zeros(())
    for name, target in zip(LEVELS, truth.levels, strict=True):
        focal = soft_focal_loss(outputs[f"things_{name}"], target.things, alpha, gamma)
        thing_position = thing_position + focal.sum()
        focal = soft_focal_loss(outputs[f"regions_{name}"], target.regions, alpha, gamma)
        stuff_position = stuff_position + (focal.sum() if centres else focal.mean((2, 3)).sum())
    return thing_position, stuff_position


def thing_mask_loss(outputs: Outputs, truth: KernelTargets, embed: nn.Conv2d, points: int) -> tuple[Tensor, int]:
    """The summed dice loss of what the kernels of things draw, and P, the things of all levels."""
    parts = []
    for name, target in zip(LEVELS, truth.levels, strict=True):
        kernels = outputs[f"kernels_{name}"]
        if points:
            chosen, weights = guided_kernels(outputs[f"things_{name}"], kernels, target, truth.masks, points)
        else:
            chosen, weights = centre_kernels(kernels, target)
        parts.append((chosen, weights, target.image, target.thing))
    kernels, weights, image, thing = (torch.cat(part) for part in zip(*parts, strict=True))
    masks, kernels = truth.masks, embedded(embed, kernels)
    counts = truth.thing_counts
    return kernel_dice_loss(outputs["encoded"], masks, kernels, image, thing, weights, counts), len(weights)


def stuff_mask_loss(
    outputs: Outputs, truth: KernelTargets, embed: nn.Conv2d, own_cells: bool, centres: bool = False
) -> tuple[Tensor, int]:
    """The summed dice loss of what the kernels of regions draw, and P, the regions of all levels.

    The kernel of a region is the one at its centre with `centres`.
    """
    parts = []
    for name, target, present in zip(LEVELS, truth.levels, truth.regions, strict=True):
        cells = at_centres(target.regions) if centres else target.regions
        parts.append(region_kernels(outputs[f"kernels_{name}"], cells, own_cells or centres, present))
    image, region, means = (torch.cat(part) for part in zip(*parts, strict=True))
    masks, kernels, weights = truth.region_masks, embedded(embed, means)[:, None], torch.ones_like(means[:, :1])
    counts = truth.region_counts
    return kernel_dice_loss(outputs["encoded"], masks, kernels, image, region, weights, counts), len(means)


def kernel_dice_loss(
    features: Tensor,
    masks: Tensor,
    kernels: Tensor,
    image: Tensor,
    index: Tensor,
    weights: Tensor,
    counts: list[int],
) -> Tensor:
    """Summed, weighted dice loss of what kernels draw.

    Args:
        features: [B, C, y, x].
        masks: float [B, M, y, x].
        kernels: [P, k, C].
        image, index: int64 [P], the mask that belongs to each.
        weights: [P, k].
        counts: how many of the P each image has; the host knows it, so that the device is not asked.
    """
    total = features.new_zeros(())
    parts = image.argsort(stable=True).split(counts)
    for b, (feature, here) in enumerate(zip(features.flatten(2), parts, strict=True)):
        losses = squared_dice_loss(kernels[here] @ feature, masks[b, index[here]].flatten(1))
        total = total + (losses * weights[here]).sum()
    return total
