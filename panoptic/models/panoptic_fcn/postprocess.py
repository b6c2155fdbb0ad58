"""Panoptic FCN after its kernels (Li et al., arXiv 2012.00720, section 3.4): masks drawn, at output size, and merged.

A resize to the canvas, a crop to the image and a resize to the output are one matrix an axis, so no plane of
canvas size is made, and of a thing only the part of the output that its mask can reach. Things are merged by
score and then stuff. Everything is about one image, so a batch is nothing but a loop over images.

Shapes: y x x the cells of stride 4, H x W the output, K kernels or things, R region classes, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.layers.greedy_merge import CroppedMask, class_map, merge_by_score
from panoptic.models.base import CERTAIN, Outputs, Prediction, Wanted
from panoptic.models.panoptic_fcn.kernel_generator import RegionKernels, ThingKernels
from panoptic.models.panoptic_fcn.targets import STRIDE
from panoptic.rle import bounding_boxes, encode_masks
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation

LINES = 32
"""Output rows of all region masks that are held at once."""


def postprocess(
    kernels: Iterable[tuple[ThingKernels, RegionKernels]],
    outputs: Outputs,
    frame: Frame,
    want: Collection[Wanted],
    categories: Categories,
    region_classes: Sequence[int],
    *,
    mask_threshold: float,
    lowest_score: float,
    most_kernels: int,
    merged_score: float,
    most_overlap: float,
    stuff_area: int,
    argmax: bool,
) -> Prediction:
    """Merged maps, scored things and class maps, whichever are wanted, from masks that are drawn once.

    In the maps things have the score of their mask and stuff that of its region. Class maps are what the kernels of
    regions draw, as the reference scores its mIoU; where these know things only as one, the merged map says which.

    Args:
        kernels: the fused kernels of each image; none is asked for where no mask is drawn.
        outputs: "encoded", and "mask" of the truth, which is then cut up in place of drawing.
        frame: of the batch.
        want: fields of `Prediction`.
        categories: tell things from stuff.
        region_classes: [R], the contiguous class of each, `IGNORE` for the one that stands for all things.
        mask_threshold: things are where their probability is strictly higher.
        lowest_score: of things, after their mask was evaluated.
        most_kernels: things that are drawn.
        merged_score, most_overlap, stuff_area: of `merge_by_score`.
        argmax: merge by `merge_by_probability`, which knows no `most_overlap`.
    """
    merges = bool({"maps", "semantics"} & set(want))
    # value 1 + r of a region map is region class r
    values = (IGNORE, *region_classes)
    stuff = [label if label in categories.stuff else IGNORE for label in values]
    maps: list[Segmentation] = []
    instances: list[Instances] = []
    semantics: list[np.ndarray] = []
    for b, (things, regions) in enumerate(kernels if merges or "instances" in want else ()):
        masks = thing_masks(things, outputs, frame, b)
        drawn = draw_things(*masks, threshold=mask_threshold, lowest=lowest_score, most=most_kernels)
        if "instances" in want:
            instances.append(as_instances(drawn))
        if not merges:
            continue
        areas = region_masks(regions, outputs, frame, b)
        region_map = draw_regions(*areas)
        scores = np.zeros(len(values))
        scores[regions.regions.cpu().numpy() + 1] = regions.scores.cpu().numpy()
        if argmax:
            merged = merge_by_probability(
                *masks[:3],
                *areas,
                stuff,
                scores,
                threshold=mask_threshold,
                confidence=merged_score,
                most=most_kernels,
                stuff_area=stuff_area,
            )
        else:
            merged = merge_by_score(
                drawn.masks,
                drawn.labels.tolist(),
                drawn.scores,
                region_map,
                stuff,
                scores.tolist(),
                confidence=merged_score,
                overlap=most_overlap,
                stuff_area=stuff_area,
            )
        maps.append(merged)
        if "semantics" in want:
            semantics.append(class_map(region_map, values, merged, categories.is_thing))
    return Prediction(
        maps=maps if "maps" in want else None,
        instances=instances if "instances" in want else None,
        semantics=semantics if "semantics" in want else None,
    )


def thing_masks(things: ThingKernels, outputs: Outputs, frame: Frame, b: int) -> tuple[Tensor, Tensor, Tensor, View]:
    """The arguments of `draw_things` for image b: logits, labels, scores and the way to the output."""
    if "mask" in outputs:
        logits, stride = true_masks(outputs["mask"][b], things.owners + 1), 1
    else:
        logits, stride = torch.einsum("kc,cyx->kyx", things.kernels, outputs["encoded"][b]), STRIDE
    return logits, things.labels, things.scores, View.of_image(logits, frame, b, stride)


def region_masks(regions: RegionKernels, outputs: Outputs, frame: Frame, b: int) -> tuple[Tensor, Tensor, View]:
    """The arguments of `draw_regions` for image b: logits, 1 + each region class and the way to the output."""
    labels = regions.regions + 1
    if "mask" in outputs:
        labels = F.pad(labels, (0, 1))  # and 0, nothing
        logits, stride = true_masks(outputs["mask"][b], -labels), 1
    else:
        logits, stride = torch.einsum("kc,cyx->kyx", regions.kernels, outputs["encoded"][b]), STRIDE
    return logits, labels, View.of_image(logits, frame, b, stride)


@dataclass(frozen=True)
class View:
    """The way from the cells of stride 4 to the output, one matrix an axis."""

    down: Tensor
    """float [H, y]."""
    across: Tensor
    """float [W, x]."""

    @classmethod
    def of(
        cls, cells: tuple[int, int], size: tuple[int, int], output: tuple[int, int], like: Tensor, stride: int = STRIDE
    ) -> View:
        """The way up to the canvas, cut to the image, then to the output; bilinear, corners not aligned.

        Args:
            cells: y and x.
            size: of the image, without batch padding.
            output: H and W.
            like: gives device and type.
            stride: pixels of the canvas a cell.
        """
        down, across = (_axis(*sides, stride, like) for sides in zip(cells, size, output, strict=True))
        return cls(down, across)

    @classmethod
    def of_image(cls, planes: Tensor, frame: Frame, b: int, stride: int) -> View:
        """The way from planes [K, y, x] of image b, of `stride` pixels a cell, to its output."""
        cells = (planes.shape[-2], planes.shape[-1])
        return cls.of(cells, frame.size(b), frame.output_size(b), planes, stride)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the output."""
        return len(self.down), len(self.across)


def _axis(cells: int, side: int, output: int, stride: int, like: Tensor) -> Tensor:
    """float [output, cells]."""
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    up = F.interpolate(unit, scale_factor=stride, mode="linear", align_corners=False)[..., :side]
    return F.interpolate(up, size=output, mode="linear", align_corners=False)[0].T.contiguous()


def true_masks(numbers: Tensor, chosen: Tensor) -> Tensor:
    """Logits [K, H, W] of the masks of some numbers `chosen` [K] in a map of numbers [H, W]."""
    return torch.where(numbers == chosen[:, None, None], CERTAIN, -CERTAIN)


@dataclass(frozen=True)
class Things:
    """Scored masks of one image, best first, each within its window of the output."""

    masks: list[CroppedMask]
    """K masks."""
    labels: np.ndarray
    """int64 [K], contiguous classes."""
    scores: np.ndarray
    """float32 [K]."""
    size: tuple[int, int]
    """H and W of the output."""


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
    """Score the masks that kernels drew, and bring the best to the output.

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
    scores = evaluated_scores(probability, inside, scores)
    # only those that count are brought to the output
    scores, order = scores.sort(descending=True, stable=True)
    order = order[scores >= lowest][:most]
    return Things(
        [_cropped(probability[k], inside[k], view, threshold) for k in order],
        labels[order].cpu().numpy(),
        scores[: len(order)].cpu().numpy().astype(np.float32),
        view.size,
    )


def evaluated_scores(probability: Tensor, inside: Tensor, scores: Tensor) -> Tensor:
    """Scores [K] times the mean probability inside of each mask.

    Args:
        probability: float [K, y, x].
        inside: bool [K, y, x], the masks.
        scores: float [K].
    """
    return scores * ((probability * inside).sum((1, 2)) / (inside.sum((1, 2)).float() + 1e-6))


def merge_by_probability(
    things: Tensor,
    thing_labels: Tensor,
    thing_scores: Tensor,
    regions: Tensor,
    region_labels: Tensor,
    view: View,
    stuff_labels: Sequence[int],
    stuff_scores: np.ndarray,
    *,
    threshold: float,
    confidence: float,
    most: int,
    stuff_area: int,
) -> Segmentation:
    """Each pixel goes to the thing or stuff whose mask is the most probable there, the first of equal ones.

    Things come first, by score. A thing without a pixel is none; the pixels of stuff that is too small become void.

    Args:
        things, thing_labels, thing_scores: of `thing_masks`, K things.
        regions, region_labels, view: of `region_masks`.
        stuff_labels: [1 + R], the contiguous class of each region label, `IGNORE` for those that are no stuff.
        stuff_scores: float [1 + R].
        threshold: of `draw_things`, by which things are scored.
        confidence: things score at least this.
        most: things at most.
        stuff_area: stuff of fewer pixels becomes void.

    Returns:
        things by descending score, then stuff in the order of its region classes.
    """
    probability = things.sigmoid()
    ranking, order = evaluated_scores(probability, probability > threshold, thing_scores).sort(
        descending=True, stable=True
    )
    kept = order[ranking >= confidence][:most]
    named = torch.tensor(stuff_labels, device=regions.device) != IGNORE
    named[0] = True  # nothing, which a true mask has as a plane
    chosen = named[region_labels].nonzero()[:, 0]
    # 1 to K are things, K + 1 is nothing, as region label 0 is, and K + 1 + r is region label r
    first = len(kept) + 1
    numbers = torch.cat([torch.arange(1, first, device=things.device), region_labels[chosen] + first])
    owners = draw_regions(torch.cat([things[kept], regions[chosen]]), numbers, view)
    labels = np.array([IGNORE, *thing_labels[kept].tolist(), *stuff_labels], np.int64)
    scores = np.concatenate([[0.0], ranking[: len(kept)].cpu().numpy(), stuff_scores]).astype(np.float32)
    least = np.where(np.arange(len(labels)) < first, 1, max(1, stuff_area))
    alive = (np.bincount(owners.reshape(-1), minlength=len(labels)) >= least) & (labels != IGNORE)
    table = np.where(alive, np.cumsum(alive), 0).astype(np.int32)
    return Segmentation(table[owners], labels[alive], scores=scores[alive])


def _cropped(probability: Tensor, inside: Tensor, view: View, threshold: float) -> CroppedMask:
    """The mask of one plane [y, x] within the part of the output that can exceed `threshold`.

    An output pixel is a mean of cells, so it needs one above the threshold.
    """
    spans = [_span(lines, axis) for lines, axis in ((inside.any(1), view.down), (inside.any(0), view.across))]
    (rows, y), (columns, x) = spans
    mask = view.down[rows, y] @ probability[y, x] @ view.across[columns, x].T > threshold
    return CroppedMask(rows.start, columns.start, mask.cpu().numpy())


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
    # all columns at once; rows follow some at a time, each with the cells that it reads
    wide = logits.sigmoid() @ view.across.T  # [K, y, W]
    labels = F.pad(labels, (1, 0))  # 0 where no plane is higher than 0
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


def as_instances(things: Things) -> Instances:
    """All things, overlaps included; those without a pixel at the output are left out."""
    kept = [k for k, part in enumerate(things.masks) if part.mask.any()]
    masks: list[dict] = []
    for k in kept:
        plane = np.zeros(things.size, np.uint8, order="F")
        plane[things.masks[k].window] = things.masks[k].mask
        masks += encode_masks(plane[None])
    boxes = bounding_boxes(masks).astype(np.float32)
    return Instances(masks, things.labels[kept], things.scores[kept], boxes)
