"""The kernel generator of Panoptic FCN (Li et al., arXiv 2012.00720, section 3.1): which cells' kernels draw.

In training these are the cells inside of a thing that score best, and the mean over a region (section 3.4); at test
time the peaks of the score maps of things, and the mean over what the region maps claim. Functions of training are
about a batch, those of testing about one image.

Shapes: B images, h x w a level, y x x the cells of stride 4, T thing classes, R region classes, C channels, P things or
regions of a level, k kernels of each, M or R masks an image, K kernels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.models.base import Outputs
from panoptic.models.panoptic_fcn.config import LEVELS
from panoptic.models.panoptic_fcn.targets import LevelTargets

INSIDE = 0.1
"""A level's cell may guide a thing's kernel where the thing covers more of it than this."""


def guided_kernels(
    centres: Tensor, kernels: Tensor, target: LevelTargets, masks: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """The kernels [P, k, C] of a level's things, and their shares [P, k] in the loss.

    The k cells inside a thing whose score for its class is best, weighted by these scores; through the weights the
    dice loss reaches the position head as well. A level of fewer cells gives the missing ones no weight.

    Args:
        centres: logits [B, T, h, w].
        kernels: [B, C, h, w].
        target: of the level.
        masks: float [B, M, y, x].
        points: k.
    """
    # scores of the thing's own class, in cells of the level that the thing covers
    size = (kernels.shape[-2], kernels.shape[-1])
    planes = masks[target.image, target.thing][:, None]
    covered = F.interpolate(planes, size, mode="bilinear", align_corners=False)[:, 0]
    guidance = centres[target.image, target.label].sigmoid() * (covered > INSIDE)
    # the k best; cells that are missing get weight 0
    weights, cells = guidance.flatten(1).topk(min(points, size[0] * size[1]), dim=1)
    spare = (0, points - cells.shape[1])
    weights, cells = F.pad(weights, spare), F.pad(cells, spare)
    return _picked(kernels, target.image, cells), weights / weights.sum(1, keepdim=True).clamp(min=1e-8)


def centre_kernels(kernels: Tensor, target: LevelTargets) -> tuple[Tensor, Tensor]:
    """The kernels [P, 1, C] at the centres of a level's things, and shares of 1 [P, 1]."""
    picked = _picked(kernels, target.image, target.cell[:, None])
    return picked, torch.ones_like(picked[..., 0])


def region_kernels(
    kernels: Tensor, covered: Tensor, own_cells: bool = False, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The regions that a level has, and a kernel for each.

    Args:
        kernels: [B, C, h, w].
        covered: float [B, R, h, w], above 0 where a region is.
        own_cells: of `mean_kernels`.
        present: int64 [P, 2], image and class of the regions that have a cell; else the device is asked for them.

    Returns:
        image int64 [P], region class int64 [P], and [P, C] the mean of the kernels inside.
    """
    masks = (covered > 0).flatten(2)
    image, region = (masks.any(2).nonzero() if present is None else present).unbind(1)
    means = mean_kernels(masks.to(kernels.dtype), kernels.flatten(2), own_cells)
    return image, region, means[image, region]


def mean_kernels(masks: Tensor, kernels: Tensor, own_cells: bool = False) -> Tensor:
    """The mean of the kernels [..., C, h w] inside of each of the masks [..., P, h w], [..., P, C].

    With `own_cells` over the cells of the mask, else over the whole map, as published: then the kernel of a small
    region is short, which only a long training makes up for.
    """
    total = masks @ kernels.transpose(-1, -2)
    return total / masks.sum(-1, keepdim=True).clamp(min=1) if own_cells else total / masks.shape[-1]


def embedded(layer: nn.Conv2d, kernels: Tensor) -> Tensor:
    """[..., C] to [..., outputs] by a 1x1 convolution, computed as the linear map that it is."""
    return F.linear(kernels, layer.weight.flatten(1), layer.bias)


def _picked(kernels: Tensor, image: Tensor, cells: Tensor) -> Tensor:
    """[P, k, C] of [B, C, h, w] at the flat cells int64 [P, k] of each image int64 [P]."""
    return kernels.flatten(2).transpose(1, 2)[image[:, None], cells]


class Level(NamedTuple):
    """The outputs of one level for one image."""

    things: Tensor
    """Logits [T, h, w]."""
    regions: Tensor
    """Logits [R, h, w]."""
    kernels: Tensor
    """float [C, h, w]."""


class ThingKernels(NamedTuple):
    """Kernels of the things of one image, best first."""

    kernels: Tensor
    """float [K, C]."""
    labels: Tensor
    """int64 [K], the class of each: one of the T before fusion, contiguous behind it."""
    scores: Tensor
    """float [K]."""
    owners: Tensor
    """int64 [K], the true thing whose position was taken, -1 for a peak."""


class RegionKernels(NamedTuple):
    """Kernels of the regions of one image."""

    kernels: Tensor
    """float [K, C]."""
    regions: Tensor
    """int64 [K], classes among the R."""
    scores: Tensor
    """float [K]."""


def image_levels(outputs: Outputs, b: int) -> list[Level]:
    """The levels of image b, fine to coarse."""
    return [Level(*(outputs[f"{part}_{level}"][b] for part in Level._fields)) for level in LEVELS]


def collect_things(
    levels: Sequence[Level], pools: Sequence[int], threshold: float, most: int, true: Tensor | None = None
) -> ThingKernels:
    """The kernels of all peaks of all levels, best first.

    Args:
        levels: of one image, fine to coarse.
        pools, threshold, most: of `find_things`, a window a level.
        true: int64 [levels, M], the cells to take in place of peaks, -1 for none; each with its best class.
    """
    parts = []
    for place, (level, pool) in enumerate(zip(levels, pools, strict=True)):
        if true is None:
            cell, label, score = find_things(level.things, pool, threshold, most)
            owner = torch.full_like(cell, -1)
        else:
            owner = (true[place] >= 0).nonzero()[:, 0]
            cell = true[place, owner]
            score, label = level.things.flatten(1)[:, cell].sigmoid().max(0)
        parts.append((level.kernels.flatten(1)[:, cell].T, label, score, owner))
    things = ThingKernels(*(torch.cat(part) for part in zip(*parts, strict=True)))
    order = things.scores.argsort(descending=True, stable=True)
    return ThingKernels(*(part[order] for part in things))


def collect_regions(
    levels: Sequence[Level],
    threshold: float,
    true: Sequence[Tensor] | None = None,
    known: bool = False,
    own_cells: bool = False,
    centres: bool = False,
) -> RegionKernels:
    """The kernels of all regions of all levels, the means of those inside.

    Args:
        levels: of one image, fine to coarse.
        threshold: of `find_regions`.
        true: of each level float [R, h, w], above 0 where a region is, in place of those of `find_regions`.
        known: these regions have their classes too; else each takes the one most probable within.
        own_cells: of `mean_kernels`.
        centres: a region is the one cell of `find_centres`.
    """
    parts = []
    for place, level in enumerate(levels):
        if true is None:
            masks, label, score = (find_centres if centres else find_regions)(level.regions, threshold)
        else:
            covered = true[place].flatten(1) > 0
            label = covered.any(1).nonzero()[:, 0]
            masks = covered[label].to(level.kernels.dtype)
            score = torch.ones_like(label, dtype=masks.dtype)
            if not known:
                label = (masks @ level.regions.sigmoid().flatten(1).T).argmax(1)
        parts.append((mean_kernels(masks, level.kernels.flatten(1), own_cells or centres), label, score))
    return RegionKernels(*(torch.cat(part) for part in zip(*parts, strict=True)))


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
    # the mean of a cell's probability and its window's
    score = logits.sigmoid()[None]
    score = (score + F.avg_pool2d(score, pool, 1, (pool - 1) // 2)) / 2
    # cells that no neighbour exceeds
    highest = F.max_pool2d(score, 3, 1, 1)
    cell, label, peak = best_cells(torch.where(highest == score, score, 0.0)[0], most)
    above = peak > threshold
    return cell[above], label[above], peak[above]


def best_cells(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` highest of float [T, h, w], no more than a level has cells: cell, class and score, best first."""
    cells = scores.shape[-2] * scores.shape[-1]
    best, index = scores.flatten().topk(min(most, cells))
    return index % cells, index // cells, best


def find_regions(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The regions of a level: each cell belongs to its best class.

    Args:
        logits: float [R, h, w].
        threshold: the mean probability of a region is strictly higher.

    Returns:
        masks float [K, h * w], class int64 [K] ascending, and mean probability float [K].
    """
    probability = logits.sigmoid().flatten(1)
    # [R, h w], 1 where a class is the best of its cell
    best = F.one_hot(probability.argmax(0), len(logits)).T.to(logits.dtype)
    count = best.sum(1)
    score = (probability * best).sum(1) / count.clamp(min=1)
    label = ((count > 0) & (score > threshold)).nonzero()[:, 0]
    return best[label], label, score[label]


def find_centres(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The centres of a level's regions: of each class the most probable cell.

    Args:
        logits: float [R, h, w].
        threshold: the probability of a centre is strictly higher.

    Returns:
        masks float [K, h * w] of one cell each, class int64 [K] ascending, and probability float [K].
    """
    score, cell = logits.sigmoid().flatten(1).max(1)
    label = (score > threshold).nonzero()[:, 0]
    return F.one_hot(cell[label], logits.shape[-2] * logits.shape[-1]).to(logits.dtype), label, score[label]
