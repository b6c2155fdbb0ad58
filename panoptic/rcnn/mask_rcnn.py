"""Mask R-CNN on a feature pyramid, without the pyramid: region proposals, a box head, a mask head.

He et al., "Mask R-CNN", arXiv 1703.06870, as detectron2 computes it. The convolutions on whole levels run inside a
model's `network`; everything that depends on which regions were chosen runs afterwards, on the outputs.

Outputs that it reads: the pooled levels [B, C, h, w] by their names, and "objectness_<level>" [B, A, h, w] and
"deltas_<level>" [B, 4 A, h, w] of every level. Outputs that it adds: "detections" [B, N, 6] (x0 y0 x1 y1 in pixels of
the canvas, score, class; `IGNORE` for none) and "masks" [B, N, M, M], probabilities. Where these are among the outputs
already they stay.

Shapes: B images, C channels, A anchors of a cell, R regions of the batch, K thing classes, N detections, M side of a
mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.greedy_merge import CroppedMask
from panoptic.layers.precision import autocast
from panoptic.rcnn.boxes import clip, decode, is_empty, sample
from panoptic.rcnn.config import DetectorConfig
from panoptic.rcnn.paste_masks import paste
from panoptic.rcnn.roi_align import assign_levels, level_order, pool
from panoptic.rcnn.roi_heads import BoxHead, MaskHead, box_losses, detect, mask_loss, match_regions, sample_regions
from panoptic.rcnn.rpn import (
    Matches,
    Proposals,
    RegionHead,
    anchors_of,
    candidate_boxes,
    choose,
    flatten,
    match_anchors,
    propose,
    region_losses,
)
from panoptic.rle import encode_window
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Targets
from panoptic.targets.instances import boxes, instance_lists, is_instance, region_masks


@dataclass(frozen=True)
class _Known:
    """The values that the host (the CPU) has to know to draw anchors and regions and to pool the regions."""

    anchors: list[list[int]]
    """Numbers of positive anchors of each image, and of negative ones: `amounts` of `boxes.sample`."""
    regions: list[list[int]]
    """Numbers of positive regions of each image, and of negative ones, likewise."""
    labels: list[Tensor]
    """For each image int64 [P] on the CPU, the label of each region: 1 or more positive, 0 negative."""
    levels: list[Tensor]
    """For each image int64 [P] on the CPU, the pyramid level of its regions."""
    pooled: int
    """Number of levels."""
    device: torch.device
    """Device on which regions are pooled."""

    def order(self, drawn: Sequence[Tensor]) -> list[Tensor]:
        """`roi_align.level_order` of the regions of all images that were drawn, int64 [n] on the CPU of each image."""
        levels = torch.cat([part[chosen] for part, chosen in zip(self.levels, drawn, strict=True)])
        counts = np.bincount(levels.numpy(), minlength=self.pooled).tolist()
        return [part.to(self.device, non_blocking=True) for part in level_order(levels, counts)]


@torch.no_grad()
def _read(
    anchors: Matches, regions: Sequence[Tensor], matched: Matches, dtype: torch.dtype, strides: Sequence[int]
) -> _Known:
    """All that the host has to know, in one read of the device.

    Args:
        anchors: of `rpn.match_anchors`.
        regions, matched: of `roi_heads.match_regions`.
        dtype: of the boxes that are pooled.
        strides: of the levels that regions are pooled from.
    """
    every, sizes = torch.cat(list(regions)), [len(part) for part in regions]
    levels = assign_levels(every.to(dtype), strides)
    kinds = torch.stack([torch.stack([(part > 0).sum(), (part == 0).sum()]) for _, part in anchors], 1)
    values = torch.cat([kinds.flatten(), *[part for _, part in matched], levels]).cpu()
    counts, labels, places = values.split([kinds.numel(), len(every), len(every)])
    parts = labels.split(sizes)
    return _Known(
        counts.view(kinds.shape).numpy().tolist(),
        [
            [int(np.count_nonzero(part.numpy() > 0)) for part in parts],
            [int(np.count_nonzero(part.numpy() == 0)) for part in parts],
        ],
        list(parts),
        list(places.split(sizes)),
        len(strides),
        every.device,
    )


class Detector(nn.Module):
    """Region proposal network, box head and mask head, with their losses and detections.

    Args:
        strides: of each level by its name, fine to coarse; proposals come from all of them.
        pooled: names of the levels from which regions take their features.
        width: C of every level.
        categories: K are things.
        config: sizes and thresholds.
        mask_head: in place of the usual one; called with pooled features [R, C, S, S] and classes int64 [R].
    """

    def __init__(
        self,
        strides: Mapping[str, int],
        pooled: Sequence[str],
        width: int,
        categories: Categories,
        config: DetectorConfig,
        mask_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.strides, self.pooled, self.categories, self.config = dict(strides), list(pooled), categories, config
        self.background = len(categories.things)
        anchors = config.regions.cells(len(strides))
        heads = config.heads
        self.regions = RegionHead(width, width, len(anchors[0]))
        self.boxes = BoxHead(width, heads.box_side, heads.box_width, self.background)
        self.masks = mask_head or MaskHead(width, heads.mask_width, heads.mask_layers, self.background)

    def forward(self, levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All levels to the outputs that the module describes."""
        logits, deltas = self.regions([levels[name] for name in self.strides])
        outputs = {name: levels[name] for name in self.pooled}
        for name, level_logits, level_deltas in zip(self.strides, logits, deltas, strict=True):
            outputs |= {f"objectness_{name}": level_logits, f"deltas_{name}": level_deltas}
        return outputs

    def losses(self, outputs: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Terms "objectness", "region", "class", "box" and "mask"; draws anchors first, then regions.

        The device is read once, whatever the number of images, and a GPU by torchvision's suppression once for each.
        """
        logits, deltas, anchors = self._anchor_outputs(outputs)
        sizes, regions, detection = targets.frame.sizes, self.config.regions, self.config.detection
        entries, true_boxes, true_classes = instance_lists(targets, self.categories)
        found = candidate_boxes(logits, deltas, anchors, sizes, regions, training=True)
        proposals = choose(found, regions, training=True, mark=True)
        matched = match_anchors(anchors, true_boxes, regions, sizes)
        candidates = match_regions(proposals, true_boxes, detection)
        dtype, strides = outputs[self.pooled[0]].dtype, [self.strides[name] for name in self.pooled]
        known = _read(matched, *candidates, dtype, strides)
        objectness, region = region_losses(
            logits, deltas, anchors, true_boxes, regions, sizes, matched, amounts=known.anchors
        )
        # regions are drawn on the host, which has to know their levels
        drawn = sample(known.labels, detection.samples, detection.positive_fraction, known.regions)
        sampled = sample_regions(
            proposals, true_boxes, true_classes, self.background, detection, candidates, drawn=drawn
        )
        orders = [known.order([torch.cat(kinds[:most]) for kinds in drawn]) for most in (2, 1)]  # all; with a thing
        boxes, positives = [part.boxes for part in sampled], [part.positives for part in sampled]
        class_logits, codes = self._run_box_head(outputs, boxes, orders[0])
        entropy, box = box_losses(class_logits, codes, sampled, true_boxes, detection)
        classes = torch.cat([part.classes[: len(part.owners)] for part in sampled])
        mask_logits = self._run_mask_head(outputs, positives, classes, orders[1])
        owners = [part.owners for part in sampled]
        mask = mask_loss(mask_logits, region_masks(targets, entries, positives, owners, mask_logits.shape[-1]) >= 0.5)
        return {"objectness": objectness, "region": region, "class": entropy, "box": box, "mask": mask}

    @torch.no_grad()
    def propose(self, outputs: Mapping[str, Tensor], frame: Frame) -> list[Proposals]:
        """The proposals of each image with the limits of testing, in pixels of the canvas."""
        return propose(*self._anchor_outputs(outputs), frame.sizes, self.config.regions, training=False)

    @torch.no_grad()
    def detect(
        self,
        outputs: dict[str, Tensor],
        frame: Frame,
        proposals: Sequence[Proposals] | None = None,
        logits: bool = False,
    ) -> dict[str, Tensor]:
        """`outputs` with "detections" and "masks", unless they are there.

        Args:
            outputs: as the module describes them.
            frame: of the batch.
            proposals: of `propose`; made here where they are needed and not given.
            logits: "masks" are logits in place of probabilities.
        """
        if "detections" in outputs and "masks" in outputs:
            return outputs
        if "detections" in outputs:
            detections = list(outputs["detections"])
        else:
            detections = self._detections(outputs, frame, proposals or self.propose(outputs, frame))
        # one row count for all images, filled up with rows of no class
        most = max([1, *(len(part) for part in detections)])
        rows = torch.stack([F.pad(part, (0, 0, 0, most - len(part)), value=IGNORE) for part in detections])
        # the mask head runs once, over the detections of all images
        kept = [part[part[:, 5] != IGNORE] for part in detections]
        things = torch.tensor(self.categories.things, device=rows.device)
        classes = torch.searchsorted(things, torch.cat([part[:, 5].long() for part in kept]))
        values = self._run_mask_head(outputs, [part[:, :4] for part in kept], classes)
        masks = values.new_zeros(*rows.shape[:2], *values.shape[1:])
        masks[rows[:, :, 5] != IGNORE] = values if logits else values.sigmoid()
        return outputs | {"detections": rows, "masks": masks}

    @torch.no_grad()
    def truth(self, targets: Targets) -> dict[str, Tensor]:
        """The "detections" and "masks" of the true things that are no crowd."""
        return true_detections(targets, is_instance(targets, self.categories), 2 * self.config.heads.mask_side)

    def _anchor_outputs(self, outputs: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits, deltas and anchors of each level, all in the order of `grid_anchors`."""
        logits = [outputs[f"objectness_{name}"] for name in self.strides]
        anchors = anchors_of(logits, list(self.strides.values()), self.config.regions)
        return *flatten(logits, [outputs[f"deltas_{name}"] for name in self.strides]), anchors

    def _run_box_head(
        self, outputs: Mapping[str, Tensor], regions: Sequence[Tensor], order: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class logits [R, K + 1] and deltas [R, 4 K] of the regions of all images; `order` as in `pool`."""
        with self._autocast(outputs):
            return self.boxes(self._pool(outputs, regions, self.config.heads.box_side, order))

    def _run_mask_head(
        self,
        outputs: Mapping[str, Tensor],
        regions: Sequence[Tensor],
        classes: Tensor,
        order: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Mask logits [R, M, M] of the regions of all images, each of its class int64 [R]; `order` as in `pool`."""
        with self._autocast(outputs):
            return self.masks(self._pool(outputs, regions, self.config.heads.mask_side, order), classes)

    def _pool(
        self, outputs: Mapping[str, Tensor], regions: Sequence[Tensor], side: int, order: Sequence[Tensor] | None
    ) -> Tensor:
        levels, strides = [outputs[name] for name in self.pooled], [self.strides[name] for name in self.pooled]
        return pool(levels, strides, regions, side, self.config.heads.cell_samples, self.config.heads.aligned, order)

    def _autocast(self, outputs: Mapping[str, Tensor]) -> torch.autocast:
        return autocast(outputs[self.pooled[0]].device, self.config.heads.precision)

    def _detections(self, outputs: Mapping[str, Tensor], frame: Frame, proposals: Sequence[Proposals]) -> list[Tensor]:
        """For each image float [N, 6], the rows of "detections"."""
        logits, codes = self._run_box_head(outputs, [part.boxes for part in proposals])
        counts = [len(part.boxes) for part in proposals]
        things = torch.tensor(self.categories.things, device=logits.device)
        parts = zip(proposals, logits.softmax(1).split(counts), codes.split(counts), frame.sizes.tolist(), strict=True)
        rows = []
        for regions, probabilities, code, (height, width) in parts:
            moved = decode(regions.boxes, code, self.config.detection.code)
            best = detect(moved, probabilities, (height, width), self.config.detection)
            rows.append(torch.cat([best.boxes, best.scores[:, None], things[best.classes][:, None]], 1))
        return rows


def true_detections(targets: Targets, chosen: Tensor, side: int) -> dict[str, Tensor]:
    """The "detections" and "masks" of true segments, of score 1.

    Args:
        targets: the batch.
        chosen: bool [B, N], the segments to list; those without a pixel are left out.
        side: M.
    """
    corners = boxes(targets)
    present = chosen & (corners[:, :, 2] > corners[:, :, 0])
    labels = torch.where(present, targets.labels, IGNORE)
    entries = [torch.arange(labels.shape[1], device=labels.device)] * len(labels)
    corners = torch.where(present[:, :, None], corners, corners.new_tensor([0, 0, 1, 1]))
    masks = region_masks(targets, entries, list(corners), entries, side)
    return {
        "detections": torch.cat([corners, torch.stack([present.float(), labels.float()], 2)], 2),
        "masks": masks.view(*labels.shape, *masks.shape[1:]),
    }


def enlarge_boxes(boxes: Tensor, frame: Frame, image: int) -> Tensor:
    """Boxes [..., 4] of an image, from pixels of the canvas to pixels of its output."""
    height, width = (frame.output_sizes[image].double() / frame.sizes[image]).tolist()
    return boxes * boxes.new_tensor([width, height, width, height])


def output_boxes(proposals: Sequence[Proposals], frame: Frame) -> list[Tensor]:
    """The boxes float [P, 4] of the proposals of each image, best first, in pixels of its output."""
    return [enlarge_boxes(part.boxes, frame, b) for b, part in enumerate(proposals)]


def paste_detections(
    outputs: Mapping[str, Tensor], frame: Frame, image: int, least: float = -math.inf
) -> tuple[list[CroppedMask], Tensor]:
    """The detections of one image with their masks at output size.

    Args:
        outputs: with "detections" and "masks".
        frame: of the batch.
        image: its number in the batch.
        least: detections score at least this; those whose box has no area within the output are left out, too.

    Returns:
        D masks, and on the CPU float [D, 6], the rows of "detections" in pixels of the output.
    """
    rows = outputs["detections"][image]
    height, width = frame.output_size(image)
    corners = clip(enlarge_boxes(rows[:, :4], frame, image), height, width)
    kept = (rows[:, 5] != IGNORE) & (rows[:, 4] >= least) & ~is_empty(corners)
    listed = torch.cat([corners, rows[:, 4:]], 1)[kept].cpu()
    probabilities = outputs["masks"][image][kept].cpu().numpy()
    return paste(probabilities, listed[:, :4].numpy(), (height, width)), listed


def as_instances(masks: Sequence[CroppedMask], rows: Tensor, size: tuple[int, int]) -> Instances:
    """The detections of `paste_detections` in an image of that size (H, W) as scored instances, in their order."""
    encoded = [encode_window(part.mask, part.top, part.left, size) for part in masks]
    return Instances(encoded, rows[:, 5].long().numpy(), rows[:, 4].numpy(), rows[:, :4].numpy())
