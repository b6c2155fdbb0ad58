"""Kernels that draw masks on one feature map: which ones are trained for a thing or a region, and on what.

Panoptic FCN (Li et al., arXiv 2012.00720), section 3.4.

Shapes: B images, h x w a level, y x x the cells of stride 4, C channels, P things or regions of a level, k kernels
of each, M or R masks an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from panoptic.losses import squared_dice_loss
from panoptic.models.panoptic_fcn.targets import LevelTargets

INSIDE = 0.1
"""A level's cell may guide a thing's kernel where the thing covers more of it than this."""


def guided_kernels(
    centres: Tensor, kernels: Tensor, told: LevelTargets, masks: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """The kernels [P, k, C] of a level's things, and their shares [P, k] in the loss.

    The k cells inside a thing whose score for its class is best, weighted by these scores; through the weights the
    dice loss reaches the position head as well. A level of fewer cells gives the missing ones no weight.

    Args:
        centres: logits [B, T, h, w].
        kernels: [B, C, h, w].
        told: what the level learns.
        masks: float [B, M, y, x].
        points: k.
    """
    size = (kernels.shape[-2], kernels.shape[-1])
    planes = masks[told.image, told.thing][:, None]
    covered = functional.interpolate(planes, size, mode="bilinear", align_corners=False)[:, 0]
    guidance = centres[told.image, told.label].sigmoid() * (covered > INSIDE)
    weights, cells = guidance.flatten(1).topk(min(points, size[0] * size[1]), dim=1)
    spare = (0, points - cells.shape[1])
    weights, cells = functional.pad(weights, spare), functional.pad(cells, spare)
    return _picked(kernels, told.image, cells), weights / weights.sum(1, keepdim=True).clamp(min=1e-8)


def centre_kernels(kernels: Tensor, told: LevelTargets) -> tuple[Tensor, Tensor]:
    """The kernels [P, 1, C] at the centres of a level's things, and shares of 1 [P, 1]."""
    picked = _picked(kernels, told.image, told.cell[:, None])
    return picked, torch.ones_like(picked[..., 0])


def region_kernels(kernels: Tensor, covered: Tensor, own: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The regions that a level has.

    Args:
        kernels: [B, C, h, w].
        covered: float [B, R, h, w], above 0 where a region is.
        own: of `mean_kernels`.

    Returns:
        image int64 [P], region class int64 [P], and [P, C] the mean of the kernels inside.
    """
    masks = (covered > 0).flatten(2)
    image, region = masks.any(2).nonzero().unbind(1)
    means = mean_kernels(masks.to(kernels.dtype), kernels.flatten(2), own)
    return image, region, means[image, region]


def mean_kernels(masks: Tensor, kernels: Tensor, own: bool = False) -> Tensor:
    """[..., P, C], of each of the masks [..., P, h w] the mean of the kernels [..., C, h w] inside.

    With `own` over the cells of the mask, else over the whole map, as published: then the kernel of a small region
    is short, which only a long training makes up for.
    """
    total = masks @ kernels.transpose(-1, -2)
    return total / masks.sum(-1, keepdim=True).clamp(min=1) if own else total / masks.shape[-1]


def embedded(layer: nn.Conv2d, kernels: Tensor) -> Tensor:
    """[..., C] to [..., outputs] by a 1x1 convolution, as the linear map that it is."""
    return functional.linear(kernels, layer.weight.flatten(1), layer.bias)


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


def _picked(kernels: Tensor, image: Tensor, cells: Tensor) -> Tensor:
    """[P, k, C] of [B, C, h, w] at the flat cells int64 [P, k] of each image int64 [P]."""
    return kernels.flatten(2).transpose(1, 2)[image[:, None], cells]
