"""JSIS-Net's merge of instances and semantics (de Geus et al., arXiv 1809.02110, section 2.2).

(a) A pixel that several instances claim goes to the one that is most probable there, the first of equals.
(b) Things leave the semantic output: each pixel takes its most probable class of stuff; instances lie above.
(c) Stuff of few pixels in the whole image is removed; its pixels take their best class among those that stay.
(d) Every instance is a segment of its own, every class of stuff one segment, and no pixel is void.

Nothing is sorted or thrown away for overlapping. The order within (c) was not published: stuff is counted
before instances cover it, once (counts can only grow), and where no class is frequent enough the most
frequent one stays. Options give the rule of the successor's code.

Shapes: C classes, h x w network pixels, H x W output pixels, N instances, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from panoptic.layers.resize import resize
from panoptic.layers.upsampled_argmax import best_classes
from panoptic.segmentation import Categories, Segmentation


@dataclass(frozen=True)
class Conflicts:
    """How instances and semantics are merged."""

    mask_threshold: float = 0.5
    """An instance claims the pixels where it is at least so probable."""
    stuff_area: int = 4096
    """Stuff of fewer pixels is replaced by other stuff."""
    stuff_share: float = 0.0
    """Instead of stuff_area: stuff of this share of the image or less is replaced (the successor: 1/2048); 0 = off."""
    stuff_threshold: float = 0.0
    """Pixels whose best stuff is not more probable than this become void (the successor: 0.25); 0 = none do."""
    count_after_things: bool = False
    """Stuff is counted where no instance covers it."""


@dataclass(frozen=True)
class Found:
    """The instances of one image, best first."""

    boxes: Tensor
    """float [N, 4] in pixels of the output."""
    masks: Tensor
    """float [N, M, M], how probable the instance is in each cell of its box."""
    labels: Tensor
    """int64 [N], contiguous classes."""
    scores: Tensor
    """float [N]."""


def merge_conflicts(
    found: Found,
    probabilities: Tensor | None,
    size: tuple[int, int],
    categories: Categories,
    conflicts: Conflicts,
) -> Segmentation:
    """One image, merged.

    Args:
        found: the instances.
        probabilities: float [C, h, w], of things and stuff; None (no semantic branch) leaves what no instance
            claims void.
        size: H, W.
        categories: tell things from stuff.
        conflicts: thresholds.

    Returns:
        instances in the order found, then stuff in the order of classes; `scores` is that of each instance, and 1 for
        stuff.
    """
    owner = own_pixels(found, size, conflicts.mask_threshold)
    labels, scores = found.labels.cpu().numpy().astype(np.int64), found.scores.cpu().numpy().astype(np.float32)
    if probabilities is not None and categories.stuff:
        classes = stuff_map(probabilities, size, categories, conflicts, owner > 0)
        first = len(labels) + 1
        numbers = torch.zeros(len(categories) + 1, dtype=torch.int32, device=owner.device)  # the last entry is void
        numbers[list(categories.stuff)] = torch.arange(
            first, first + len(categories.stuff), dtype=torch.int32, device=owner.device
        )
        owner = torch.where(owner > 0, owner, numbers[classes])
        labels = np.concatenate([labels, np.array(categories.stuff, np.int64)])
        scores = np.concatenate([scores, np.ones(len(categories.stuff), np.float32)])
    return Segmentation(owner.cpu().numpy(), labels, scores=scores).compact()


def own_pixels(found: Found, size: tuple[int, int], threshold: float) -> Tensor:
    """int32 [H, W], 1 + the instance that is most probable at each pixel, 0 where none reaches the threshold.

    Only the windows of the boxes are ever computed, one after another.
    """
    best = torch.zeros(size, device=found.masks.device)
    owner = torch.zeros(size, dtype=torch.int32, device=found.masks.device)
    for k, (rows, columns, values) in enumerate(_windows(found, size)):
        better = (values >= threshold) & (values > best[rows, columns])
        best[rows, columns] = torch.where(better, values, best[rows, columns])
        owner[rows, columns] = torch.where(better, k + 1, owner[rows, columns])
    return owner


def _windows(found: Found, size: tuple[int, int]) -> list[tuple[slice, slice, Tensor]]:
    """For each instance the pixels whose centre lies in its box, and float [rows, columns], its mask there."""
    windows = []
    for (x0, y0, x1, y1), mask in zip(found.boxes.double().tolist(), found.masks, strict=True):
        rows, down = _axis(y0, y1, size[0], mask)
        columns, across = _axis(x0, x1, size[1], mask)
        windows.append((rows, columns, down @ mask @ across.T))
    return windows


def _axis(low: float, high: float, size: int, mask: Tensor) -> tuple[slice, Tensor]:
    """The pixels of one axis whose centre lies in [low, high), and float [pixels, M], what each takes of each cell.

    Bilinear between the centres of cells, with nothing beyond the outermost (as detectron2 pastes masks).
    """
    side = mask.shape[-1]
    first, last = (min(max(int(np.ceil(edge - 0.5)), 0), size) for edge in (low, high))
    place = torch.arange(first, last, dtype=torch.float64, device=mask.device)
    place = (place + 0.5 - low) / max(high - low, 1e-6) * side - 0.5
    cells = torch.arange(side, dtype=torch.float64, device=mask.device)
    return slice(first, max(first, last)), (1 - (place[:, None] - cells).abs()).clamp(min=0).to(mask.dtype)


def stuff_map(
    probabilities: Tensor, size: tuple[int, int], categories: Categories, conflicts: Conflicts, covered: Tensor
) -> Tensor:
    """int64 [H, W], the class of stuff of each pixel, by (b) and (c); -1 where void.

    Args:
        probabilities: float [C, h, w].
        size: H, W.
        categories: with stuff among them.
        conflicts: thresholds.
        covered: bool [H, W], pixels of instances.
    """
    best, classes = most_probable(probabilities, size, categories.stuff)
    counted = classes[~covered] if conflicts.count_after_things else classes.view(-1)
    counts = torch.bincount(counted, minlength=len(categories))[list(categories.stuff)]
    least = conflicts.stuff_area
    if conflicts.stuff_share:
        least = int(conflicts.stuff_share * size[0] * size[1]) + 1  # strictly more than the share
    allowed = [c for c, count in zip(categories.stuff, counts.tolist(), strict=True) if count >= least]
    allowed = allowed or [categories.stuff[int(counts.argmax())]]
    if set(classes.unique().tolist()) - set(allowed):
        best, classes = most_probable(probabilities, size, allowed)
    if conflicts.stuff_threshold:
        classes = torch.where(best > conflicts.stuff_threshold, classes, -1)
    return classes


def most_probable(probabilities: Tensor, size: tuple[int, int], wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The most probable of some classes at each output pixel, the first of equals.

    Args:
        probabilities: float [C, h, w], resized bilinearly.
        size: H, W.
        wanted: at least one class.

    Returns:
        its probability [H, W], and the class int64 [H, W].
    """
    table = torch.tensor(wanted, device=probabilities.device)
    best, index = best_classes(probabilities[table], lambda x: resize(x, size, False))
    return best, table[index]
