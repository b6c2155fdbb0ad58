"""Scores of Panoptic-DeepLab's instances, by which AP ranks them (arXiv 1911.10194, section 3.3).

Shapes: H x W pixels, C classes, h x w stride-4 maps, K instances, P pixels of things.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.layers.resize import mixed_cells
from panoptic.models.panoptic_deeplab.config import Score
from panoptic.models.panoptic_deeplab.grouping import budget
from panoptic.rle import bounding_boxes, encode_segments
from panoptic.segmentation import Categories, Instances, Segmentation


def scored_instances(
    segmentation: Segmentation,
    logits: Tensor,
    heatmap: Tensor,
    categories: Categories,
    score: Score = "both",
    *,
    upsampled: tuple[int, int] | None = None,
    align_corners: bool = False,
) -> Instances:
    """The things of a merged map as scored instances, in the order of its segments.

    Args:
        segmentation: from `merge_centres`.
        logits: float [C, h, w], the semantic logits; they are upsampled where there are things and nowhere else.
        heatmap: float [H, W].
        categories: tell things from stuff.
        score: of an instance.
        upsampled: the size to which the logits are to be upsampled bilinearly; the map is its upper left part. None
            where they have the size of the map.
        align_corners: of the upsampling.
    """
    # the map of things alone, numbered 1..K
    things = np.flatnonzero(np.array(categories.is_thing, bool)[segmentation.labels])
    labels = segmentation.labels[things]
    number = np.zeros(len(segmentation.labels) + 1, np.int32)
    number[things + 1] = np.arange(1, len(things) + 1)
    instances = torch.from_numpy(number[segmentation.segments]).to(logits.device)
    certainty = _Certainty(logits, upsampled or segmentation.size, align_corners) if score != "instance" else None
    at_centroid, certain = _instance_scores(instances, torch.from_numpy(labels).to(logits.device), certainty, heatmap)
    ranks = {"instance": at_centroid, "semantic": certain, "both": at_centroid * certain}[score]
    masks = encode_segments(segmentation.segments, things + 1)
    boxes = bounding_boxes(masks)
    return Instances(masks, labels, ranks.cpu().numpy().astype(np.float32), boxes.astype(np.float32))


class _Certainty:
    """The probability of a class at some pixels of the upsampled logits, which are never made as a whole."""

    def __init__(self, logits: Tensor, size: tuple[int, int], align_corners: bool) -> None:
        self._table = logits.flatten(1).t().contiguous()  # the classes of a place lie side by side
        self._width = logits.shape[2]
        self._axes = [
            mixed_cells(cells, pixels, None, align_corners, logits.device)
            for cells, pixels in zip(logits.shape[1:], size, strict=True)
        ]
        self.most = max(1, 4 * budget(logits.device) // len(logits))
        """Pixels at once that bound the memory."""

    def __call__(self, rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        """float [P], how probable the class of each pixel is, given rows, columns and classes, int64 [P] each."""
        # the four places of the coarse map that a pixel mixes, and their shares
        (top, bottom, down), (left, right, across) = self._axes
        lines = [(line[rows] * self._width, share) for line, share in ((top, 1 - down[rows]), (bottom, down[rows]))]
        sides = [(side[columns], share) for side, share in ((left, 1 - across[columns]), (right, across[columns]))]
        corners = torch.stack([line + side for line, _ in lines for side, _ in sides], 1)
        shares = torch.stack([a * b for _, a in lines for _, b in sides], 1)
        # gathers and mixes in one pass over the memory
        mixed = F.embedding_bag(corners, self._table, per_sample_weights=shares, mode="sum")
        return mixed.softmax(1).gather(1, labels[:, None])[:, 0]


def _instance_scores(instances: Tensor, labels: Tensor, certainty: _Certainty | None, heatmap: Tensor) -> Tensor:
    """float64 [2, K], the heatmap at the centroid and the mean certainty (0 where it is None).

    `instances` is int32 [H, W], 0 or 1..K, `labels` int64 [K].
    """
    # sums over the pixels of each instance
    width = instances.shape[1]
    sums = torch.zeros(4, len(labels) + 1, dtype=torch.float64, device=heatmap.device)  # pixels, rows, columns, p
    pixels = torch.nonzero(instances.view(-1))[:, 0]
    for part in pixels.split(budget(heatmap.device) if certainty is None else certainty.most):
        owners = instances.view(-1)[part].long()
        rows, columns = torch.div(part, width, rounding_mode="floor"), part % width
        values = [torch.ones_like(part), rows, columns]
        if certainty is not None:
            values.append(certainty(rows, columns, labels[owners - 1]))
        for total, value in zip(sums, values, strict=False):
            total.index_add_(0, owners, value.double())
    # means, and the heatmap at the centroid
    areas, rows, columns, probability = sums[:, 1:]
    areas = areas.clamp(min=1)  # a truth may list things without a pixel
    at_centroid = heatmap[(rows / areas).long(), (columns / areas).long()].double()
    return torch.stack([at_centroid, probability / areas])
