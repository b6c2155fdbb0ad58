"""Masks that kernels drew at stride 4, brought to the output and merged (Panoptic FCN, arXiv 2012.00720, section 3.3).

A resize to the canvas, a crop to the image and a resize to the output are one matrix an axis, so no plane of
canvas size is made, and of a thing only the part of the output that its mask can reach. Things are merged by
score and then stuff. Everything is about one image, so a batch is nothing but a loop over images.

Shapes: y x x the cells of stride 4, H x W the output, K kernels or things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor

from panoptic.segmentation import IGNORE, Instances, Segmentation

CERTAIN = 30.0
"""The logit of a true mask: its sigmoid is 1 in float32."""

LINES = 32
"""Output rows of all region masks that are held at once."""


@dataclass(frozen=True)
class View:
    """How the cells of stride 4 become the output, one matrix an axis."""

    down: Tensor
    """float [H, y]."""
    across: Tensor
    """float [W, x]."""

    @classmethod
    def of(
        cls, cells: tuple[int, int], size: tuple[int, int], output: tuple[int, int], like: Tensor, stride: int = 4
    ) -> View:
        """Up to the canvas, cut to the image, then to the output; bilinear, corners not aligned.

        Args:
            cells: y and x.
            size: of the image, without batch padding.
            output: H and W.
            like: gives device and type.
            stride: pixels of the canvas a cell.
        """
        down, across = (_axis(*sides, stride, like) for sides in zip(cells, size, output, strict=True))
        return cls(down, across)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.down), len(self.across)


def _axis(cells: int, side: int, output: int, stride: int, like: Tensor) -> Tensor:
    """float [output, cells]."""
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    up = F.interpolate(unit, scale_factor=stride, mode="linear", align_corners=False)[..., :side]
    return F.interpolate(up, size=output, mode="linear", align_corners=False)[0].T.contiguous()


def true_masks(numbers: Tensor, wanted: Tensor) -> Tensor:
    """Logits [K, H, W] of the masks of `wanted` [K] in a map of numbers [H, W]."""
    return torch.where(numbers == wanted[:, None, None], CERTAIN, -CERTAIN)


@dataclass(frozen=True)
class Things:
    """Scored masks of one image, best first, each within its window of the output."""

    masks: list[np.ndarray]
    """bool [h, w] each."""
    corners: list[tuple[int, int]]
    """Top and left of each window."""
    labels: np.ndarray
    """int64 [K], contiguous classes."""
    scores: np.ndarray
    """float32 [K]."""
    size: tuple[int, int]
    """H and W of the output."""

    def window(self, k: int) -> tuple[slice, slice]:
        """Rows and columns of mask k."""
        (top, left), (height, width) = self.corners[k], self.masks[k].shape
        return slice(top, top + height), slice(left, left + width)


def draw_things(
    logits: Tensor,
    labels: Tensor,
    scores: Tensor,
    view: View,
    *,
    threshold: float = 0.4,
    lowest: float = 0.05,
    most: int = 100,
) -> Things:
    """Score what kernels drew, and bring the best to the output.

    A score is multiplied by the mean probability inside the mask at stride 4.

    Args:
        logits: float [K, y, x].
        labels: int64 [K], contiguous classes.
        scores: float [K].
        view: to the output.
        threshold: a mask is where the probability is strictly higher.
        lowest: scores are at least this.
        most: things at most.
    """
    probability = logits.sigmoid()
    inside = probability > threshold
    scores = scores * ((probability * inside).sum((1, 2)) / (inside.sum((1, 2)).float() + 1e-6))
    scores, order = scores.sort(descending=True, stable=True)
    order = order[scores >= lowest][:most]
    drawn = [_window(probability[k], inside[k], view, threshold) for k in order]
    return Things(
        [mask for mask, _ in drawn],
        [corner for _, corner in drawn],
        labels[order].cpu().numpy(),
        scores[: len(order)].cpu().numpy().astype(np.float32),
        view.size,
    )


def _window(probability: Tensor, inside: Tensor, view: View, threshold: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask of one plane [y, x] within the part of the output that can exceed `threshold`, and its corner.

    An output pixel is a mean of cells, so it needs one above the threshold.
    """
    spans = [_span(lines, axis) for lines, axis in ((inside.any(1), view.down), (inside.any(0), view.across))]
    (rows, y), (columns, x) = spans
    mask = view.down[rows, y] @ probability[y, x] @ view.across[columns, x].T > threshold
    return mask.cpu().numpy(), (rows.start, columns.start)


def _span(lines: Tensor, axis: Tensor) -> tuple[slice, slice]:
    """The output positions that read any of `lines` (bool [cells]), and all cells that they read."""
    reads = axis[:, lines].sum(1).nonzero()[:, 0]
    if not len(reads):
        return slice(0, 0), slice(0, 0)
    rows = slice(int(reads[0]), int(reads[-1]) + 1)
    cells = axis[rows].sum(0).nonzero()[:, 0]
    return rows, slice(int(cells[0]), int(cells[-1]) + 1)


def draw_regions(logits: Tensor, labels: Tensor, view: View) -> np.ndarray:
    """int32 [H, W], the most probable region class of each pixel, the first of equal ones.

    0 where there is none, or none that is more probable than 0 in float32.

    Args:
        logits: float [K, y, x], one plane a class.
        labels: int64 [K], 1 + each region class.
        view: to the output.
    """
    height, width = view.size
    if not len(labels):
        return np.zeros((height, width), np.int32)
    wide = logits.sigmoid() @ view.across.T  # [K, y, W]
    labels = F.pad(labels, (1, 0))
    best = torch.zeros(height, width, dtype=torch.uint8 if len(labels) <= 256 else torch.int32, device=logits.device)
    for first in range(0, height, LINES):
        down = view.down[first : first + LINES]
        cells = down.sum(0).nonzero()[:, 0]
        y = slice(int(cells[0]), int(cells[-1]) + 1)
        planes = down[:, y] @ wide[:, y]
        highest = torch.zeros_like(planes[0])
        for k in range(len(planes)):  # ten times faster on a CPU than argmax over the first axis
            best[first : first + LINES].masked_fill_(planes[k] > highest, k + 1)
            highest = torch.maximum(highest, planes[k])
    return labels.int()[best.int()].cpu().numpy()


def combine(
    things: Things,
    regions: np.ndarray,
    stuff: dict[int, tuple[int, float]],
    *,
    lowest: float = 0.2,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> Segmentation:
    """Things by score, each on what is free, then stuff on what is left.

    Args:
        things: best first.
        regions: int [H, W], of `draw_regions`.
        stuff: the contiguous class and the score of each value of `regions` that may become a segment.
        lowest: a thing scores at least this.
        overlap: a thing of which a larger share is taken already is dropped.
        stuff_area: stuff of fewer pixels becomes void.
    """
    segments = np.zeros(things.size, np.int32)
    labels: list[int] = []
    scores: list[float] = []
    for k in np.flatnonzero(things.scores >= lowest).tolist():
        mask, part = things.masks[k], segments[things.window(k)]
        area, free = int(mask.sum()), mask & (part == 0)
        if area == 0 or (area - int(free.sum())) / area > overlap:
            continue
        labels.append(int(things.labels[k]))
        scores.append(float(things.scores[k]))
        part[free] = len(labels)
    left = np.where(segments == 0, regions, 0)
    counts = np.bincount(left.ravel(), minlength=1)
    table = np.zeros(len(counts), np.int32)
    for region in np.flatnonzero(counts >= max(1, stuff_area)):
        if int(region) in stuff:
            label, score = stuff[int(region)]
            labels.append(label)
            scores.append(score)
            table[region] = len(labels)
    segments += table[left]
    return Segmentation(segments, np.array(labels, np.int64), scores=np.array(scores, np.float32))


def as_instances(things: Things) -> Instances:
    """All things, overlaps included; those without a pixel at the output are left out."""
    kept = [k for k, mask in enumerate(things.masks) if mask.any()]
    masks = []
    for k in kept:
        plane = np.zeros(things.size, np.uint8, order="F")
        plane[things.window(k)] = things.masks[k]
        masks.append(rle.encode(plane))
    boxes = np.zeros((0, 4))
    if masks:
        boxes = rle.toBbox(masks)  # pyright: ignore[reportArgumentType]  (its stub knows one mask only)
        boxes[:, 2:] += boxes[:, :2]
    return Instances(masks, things.labels[kept], things.scores[kept], boxes.astype(np.float32))


def class_map(regions: np.ndarray, merged: Segmentation, classes: tuple[int, ...], is_thing: np.ndarray) -> np.ndarray:
    """int32 [H, W] classes: stuff by the regions, things by the merged map where the regions leave a pixel to them.

    Args:
        regions: int [H, W], of `draw_regions`.
        merged: of `combine`.
        classes: of each region class.
        is_thing: bool [C].
    """
    found = np.array([IGNORE, *classes], np.int32)[regions]
    whole = merged.semantic()
    return np.where((found == IGNORE) & np.append(is_thing, False)[whole], whole, found)
