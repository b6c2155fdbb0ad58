"""Boxes: anchors, their code, their overlap, and the truth that each of them learns from.

Rules and rounding are detectron2's. Boxes are float [..., 4], x0 y0 x1 y1, without any "+ 1".

Shapes: N true boxes, P boxes (anchors or proposals), K anchors of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

LARGEST_STRETCH = math.log(1000 / 16)
"""Width and height change by no more than this, in logarithms, when deltas are applied."""

PAIRS = 1 << 24
"""Overlaps that are held at once."""

Weights = tuple[float, float, float, float]
"""Factors of dx, dy, dw and dh in the code."""

UNIT: Weights = (1.0, 1.0, 1.0, 1.0)


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """float32 [K, 4], anchors around the origin: for each size (root of the area) each ratio of height to width."""
    anchors = []
    for size in sizes:
        for ratio in ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(anchors)


def grid_anchors(cells: Tensor, height: int, width: int, stride: int, offset: float = 0.0) -> Tensor:
    """float32 [height * width * K, 4]: `cells` at each place of a feature map, rows first, then columns, then K.

    Args:
        cells: float [K, 4] of `cell_anchors`.
        height, width: of the feature map.
        stride: of the feature map.
        offset: of the centre within its cell, in strides (detectron2: 0, the top left corner).
    """
    down = torch.arange(height, dtype=torch.float32, device=cells.device).add_(offset).mul_(stride)
    across = torch.arange(width, dtype=torch.float32, device=cells.device).add_(offset).mul_(stride)
    shift = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).view(-1, 1, 2)
    return (shift.repeat(1, 1, 2) + cells).view(-1, 4)


def encode(boxes: Tensor, truth: Tensor, weights: Weights = UNIT) -> Tensor:
    """The deltas [P, 4] (dx, dy, dw, dh) that lead from `boxes` [P, 4] to `truth` [P, 4]."""
    sizes, true_sizes = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    centres, true_centres = boxes[:, :2] + 0.5 * sizes, truth[:, :2] + 0.5 * true_sizes
    shift, stretch = constants(boxes, weights).view(2, 2)
    return torch.cat([shift * (true_centres - centres) / sizes, stretch * torch.log(true_sizes / sizes)], 1)


def decode(boxes: Tensor, deltas: Tensor, weights: Weights = UNIT) -> Tensor:
    """`boxes` [..., 4] moved by `deltas` [..., 4 C] (C boxes for each), as [..., 4 C]."""
    code = deltas.unflatten(-1, (-1, 4))
    sizes = (boxes[..., 2:] - boxes[..., :2])[..., None, :]
    centres = boxes[..., None, :2] + 0.5 * sizes
    shift, stretch = constants(deltas, weights).view(2, 2)
    middles = code[..., :2] / shift * sizes + centres
    halves = 0.5 * (torch.exp((code[..., 2:] / stretch).clamp(max=LARGEST_STRETCH)) * sizes)
    return torch.cat([middles - halves, middles + halves], -1).flatten(-2)


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """`boxes` [..., 4] cut to the image."""
    limits = constants(boxes, [width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def constants(like: Tensor, values: Sequence[float]) -> Tensor:
    """Values [n] on the device of `like` and of its type; the copy waits for nothing that the device has yet to do."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def is_empty(boxes: Tensor, least: float = 0.0) -> Tensor:
    """bool [...], boxes [..., 4] whose width or height is not above `least`."""
    return ((boxes[..., 2:] - boxes[..., :2]) <= least).any(-1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """float [N, P], intersection over union of each pair; 0 where they do not intersect."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.T[..., None], second.T
    across = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)
    down = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    shared = across.mul_(down)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared
    return torch.where(shared > 0, shared / union, 0.0)


@torch.no_grad()
def match(
    truth: Tensor,
    boxes: Tensor,
    negative: float,
    positive: float,
    low_quality: bool = False,
    least: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The true box that each box overlaps most, in memory that does not grow with their numbers.

    Args:
        truth: float [N, 4].
        boxes: float [P, 4].
        negative: below this overlap a box is background.
        positive: from this overlap on a box is positive; what lies between does not count.
        low_quality: for each truth, the boxes that overlap it as much as any does are positive too
            (they keep the truth that they overlap most).
        least: overlap that `low_quality` asks for.

    Returns:
        int64 [P], the truth of the largest overlap (0 without any truth), and int64 [P], 1 positive,
        0 background, -1 neither.
    """
    labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if not len(truth):
        return torch.zeros_like(labels), labels
    # all overlaps at once where they fit, else computed twice, some boxes at a time
    parts = boxes.split(max(1, PAIRS // len(truth)))
    whole = overlaps(truth, boxes) if len(parts) == 1 else None

    def blocks() -> Iterator[Tensor]:
        return (overlaps(truth, part) if whole is None else whole for part in parts)

    maxima = [block.max(0) for block in blocks()]
    highest, index = torch.cat([best for best, _ in maxima]), torch.cat([place for _, place in maxima])
    labels[highest >= negative] = -1
    labels[highest >= positive] = 1
    if low_quality:
        # the largest overlap of each truth, and every box that reaches it
        peaks = torch.stack([block.amax(1) for block in blocks()]).amax(0)[:, None]
        labels[torch.cat([((block == peaks) & (peaks >= least)).any(0) for block in blocks()])] = 1
    return index, labels


def count_labels(*groups: Sequence[Tensor]) -> list[list[list[int]]]:
    """Numbers of positives and negatives that `sample` draws from, all of them in one read of the device.

    Args:
        groups: each the labels int64 [P] of every image.

    Returns:
        for each group the positives of each image, and the negatives.
    """
    counts = [torch.stack([torch.stack([(part > 0).sum(), (part == 0).sum()]) for part in group]) for group in groups]
    return [[list(kind) for kind in zip(*group, strict=True)] for group in torch.stack(counts).tolist()]


def sample(
    labels: Sequence[Tensor], count: int, fraction: float, amounts: Sequence[Sequence[int]] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Random positives (label 1 or more) and negatives (label 0) of each image, the positives drawn first.

    A permutation is as long as there are positives or negatives, so that the host has to know these numbers.

    Args:
        labels: for each image int64 [P].
        count: of both, for each image; fewer where there are not enough negatives.
        fraction: share that positives may have.
        amounts: of `count_labels`, where they are known already; else one read of the device for all images.

    Returns:
        for each image the indices of the positives and of the negatives.
    """
    every = torch.cat(list(labels))
    sizes = [len(part) for part in labels]
    masks = torch.stack([every > 0, every == 0])  # positives, negatives
    if amounts is None:
        (amounts,) = count_labels(labels)
    # their places among the boxes of all images
    kinds = [
        torch.nonzero_static(mask, size=sum(amount))[:, 0].split(list(amount))
        for mask, amount in zip(masks, amounts, strict=True)
    ]
    starts = [0, *accumulate(sizes)]
    drawn = []
    for positive, negative, start in zip(*kinds, starts, strict=False):
        first = torch.randperm(len(positive), device=every.device)[: int(count * fraction)]
        second = torch.randperm(len(negative), device=every.device)[: count - len(first)]
        drawn.append((positive[first] - start, negative[second] - start))
    return drawn
