"""Where Panoptic FCN makes its kernels, and which of them say the same (Li et al., arXiv 2012.00720, section 3.2).

A peak of a thing's score map, and every region of a class, make a kernel each; what they draw is merged by
`drawing`. Everything is about one image.

Shapes: h x w a level, T thing classes, R region classes, K kernels of C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from panoptic.models.panoptic_fcn.kernels import mean_kernels

TINY = 1e-8
"""The least norm that a kernel is divided by."""


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
        own: of `panoptic.models.panoptic_fcn.kernels.mean_kernels`.

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
    score = (score + functional.avg_pool2d(score, pool, 1, (pool - 1) // 2)) / 2
    highest = functional.max_pool2d(score, 3, 1, 1)
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
    best = functional.one_hot(probability.argmax(0), len(logits)).T.to(logits.dtype)
    count = best.sum(1)
    score = (probability * best).sum(1) / count.clamp(min=1)
    label = ((count > 0) & (score > threshold)).nonzero()[:, 0]
    return best[label], label, score[label]


def fuse(kernels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Average kernels with the later ones that say the same.

    A kernel that an earlier one says the same as is absorbed; one that two earlier ones do counts for the first.

    Args:
        kernels: float [K, C], best first.
        groups: bool [K, K], whether two kernels say the same.

    Returns:
        float [k, C] and the indices int64 [k] of those that stay, in order.
    """
    same = groups.triu()
    first = same.cumsum(0) < 2
    kept = first.diagonal().nonzero()[:, 0]
    members = (same & first)[kept].to(kernels.dtype)
    return members @ kernels / members.sum(1, keepdim=True), kept


def similar(kernels: Tensor, labels: Tensor, threshold: float, class_aware: bool) -> Tensor:
    """bool [K, K], pairs of a cosine of at least `threshold`, of one class where `class_aware`."""
    unit = kernels / kernels.norm(dim=1, keepdim=True).clamp(min=TINY)
    same = unit @ unit.T >= threshold
    same.fill_diagonal_(True)  # rounding, or a kernel of zeros, must not part a kernel from itself
    return same & (labels[:, None] == labels) if class_aware else same


def fuse_classes(kernels: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean kernel [k, C] and mean score [k] of each class, and the classes int64 [k], ascending."""
    classes = labels.unique()
    members = (labels == classes[:, None]).to(kernels.dtype)
    count = members.sum(1)
    return members @ kernels / count[:, None], classes, members @ scores / count
