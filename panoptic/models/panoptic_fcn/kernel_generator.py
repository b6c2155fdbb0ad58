"""Kernels that draw masks on one feature map: which ones are trained for a thing or a region, and on what.

Panoptic FCN (Li et al., arXiv 2012.00720), section 3.4.

Shapes: B images, h x w a level, y x x the cells of stride 4, C channels, P things or regions of a level, k kernels
of each, M or R masks an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    covered = F.interpolate(planes, size, mode="bilinear", align_corners=False)[:, 0]
    guidance = centres[told.image, told.label].sigmoid() * (covered > INSIDE)
    weights, cells = guidance.flatten(1).topk(min(points, size[0] * size[1]), dim=1)
    spare = (0, points - cells.shape[1])
    weights, cells = F.pad(weights, spare), F.pad(cells, spare)
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
    return F.linear(kernels, layer.weight.flatten(1), layer.bias)


def _picked(kernels: Tensor, image: Tensor, cells: Tensor) -> Tensor:
    """[P, k, C] of [B, C, h, w] at the flat cells int64 [P, k] of each image int64 [P]."""
    return kernels.flatten(2).transpose(1, 2)[image[:, None], cells]


class Level(NamedTuple):
    """What one level says of one image."""

    things: Tensor
    """Logits [T, h, w]."""
    regions: Tensor
    """Logits [R, h, w]."""
    kernels: Tensor
    """float [C, h, w]."""


def collect_things(
    levels: Sequence[Level], pools: Sequence[int], threshold: float, most: int, true: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernels of all peaks of all levels, best first.

    Args:
        levels: of one image, fine to coarse.
        pools, threshold, most: of `find_things`, a window a level.
        true: int64 [levels, M], the cells to take in place of peaks, -1 for none; each with its best class.

    Returns:
        kernels [K, C], class int64 [K], score [K], and which of the M each is of, int64 [K], else -1.
    """
    found = []
    for place, (level, pool) in enumerate(zip(levels, pools, strict=True)):
        if true is None:
            cell, label, score = find_things(level.things, pool, threshold, most)
            owner = torch.full_like(cell, -1)
        else:
            owner = (true[place] >= 0).nonzero()[:, 0]
            cell = true[place, owner]
            score, label = level.things.flatten(1)[:, cell].sigmoid().max(0)
        found.append((level.kernels.flatten(1)[:, cell].T, label, score, owner))
    kernels, labels, scores, owners = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = scores.argsort(descending=True, stable=True)
    return kernels[order], labels[order], scores[order], owners[order]


def collect_regions(
    levels: Sequence[Level],
    threshold: float,
    true: Sequence[Tensor] | None = None,
    known: bool = False,
    own: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of all regions of all levels.

    Args:
        levels: of one image, fine to coarse.
        threshold: of `find_regions`.
        true: of each level float [R, h, w], above 0 where a region is, in place of those found.
        known: whether these regions have their classes too; else each takes the one most probable within.
        own: of `panoptic.models.panoptic_fcn.kernel_generator.mean_kernels`.

    Returns:
        kernels [K, C], the means of those inside; class int64 [K] and score [K].
    """
    found = []
    for place, level in enumerate(levels):
        if true is None:
            masks, label, score = find_regions(level.regions, threshold)
        else:
            covered = true[place].flatten(1) > 0
            label = covered.any(1).nonzero()[:, 0]
            masks = covered[label].to(level.kernels.dtype)
            score = torch.ones_like(label, dtype=masks.dtype)
            if not known:
                label = (masks @ level.regions.sigmoid().flatten(1).T).argmax(1)
        found.append((mean_kernels(masks, level.kernels.flatten(1), own), label, score))
    kernels, labels, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return kernels, labels, scores


def find_things(logits: Tensor, pool: int, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Peaks of a level's score maps, best first.

    A score is the mean of a cell's probability and of its window's; cells beyond the border count as 0 in the
    window, as in the reference. Peaks are the highest of 3 x 3.

    Args:
        logits: float [T, h, w].
        pool: odd side of the window.
        threshold: scores are strictly higher.
        most: peaks at most.

    Returns:
        row * w + column int64 [K], class int64 [K] and score float [K].
    """
    score = logits.sigmoid()[None]
    score = (score + F.avg_pool2d(score, pool, 1, (pool - 1) // 2)) / 2
    highest = F.max_pool2d(score, 3, 1, 1)
    cell, label, found = best_cells(torch.where(highest == score, score, 0.0)[0], most)
    above = found > threshold
    return cell[above], label[above], found[above]


def best_cells(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` highest of float [T, h, w], no more than a level has cells: cell, class and score, best first."""
    cells = scores.shape[-2] * scores.shape[-1]
    found, index = scores.flatten().topk(min(most, cells))
    return index % cells, index // cells, found


def find_regions(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The regions of a level: each cell belongs to its best class.

    Args:
        logits: float [R, h, w].
        threshold: the mean probability of a region is strictly higher.

    Returns:
        masks float [K, h * w], class int64 [K] ascending, and mean probability float [K].
    """
    probability = logits.sigmoid().flatten(1)
    best = F.one_hot(probability.argmax(0), len(logits)).T.to(logits.dtype)
    count = best.sum(1)
    score = (probability * best).sum(1) / count.clamp(min=1)
    label = ((count > 0) & (score > threshold)).nonzero()[:, 0]
    return best[label], label, score[label]
