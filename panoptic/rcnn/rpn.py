"""Region proposals (Ren et al., "Faster R-CNN", arXiv 1506.01497) as detectron2 computes them.

The network ends at objectness logits and box deltas. Which boxes are proposed is decided outside of it, with
the limits of training in a loss and those of testing otherwise, whatever mode the modules are in.

Shapes: B images, h x w a feature map, K anchors of a cell, A anchors of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.rcnn.boxes import clip, decode, encode, grid_anchors, is_empty, match, sample
from panoptic.rcnn.config import Regions

Matches = list[tuple[Tensor, Tensor]]
"""For each image two int64 [P] of `boxes.match`: the thing that each box overlaps most, and its label."""


@dataclass(frozen=True)
class Proposals:
    """The proposals of one image, best first, without gradient."""

    boxes: Tensor
    """float [P, 4] in pixels of the canvas, within the image."""
    logits: Tensor
    """float [P], objectness."""
    usable: Tensor | None = None
    """bool [P], those that are proposals, where others stand behind them; None = all are."""


class RegionHead(nn.Module):
    """A 3x3 convolution and two 1x1: objectness and deltas of the K anchors of each cell, on any level.

    With two `logits` an anchor (background, thing) there are 2 K maps of objectness.
    """

    def __init__(self, inputs: int, channels: int, anchors: int, logits: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, logits * anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, C, h, w] of each level to logits [B, K, h, w] and deltas [B, 4 K, h, w] of each level."""
        hidden = [F.relu(self.conv(x), inplace=True) for x in features]
        return [self.objectness(x) for x in hidden], [self.deltas(x) for x in hidden]


def anchors_of(logits: Sequence[Tensor], strides: Sequence[int], regions: Regions) -> list[Tensor]:
    """float32 [h * w * K, 4] of each level, given the logits [B, K, h, w] of each level."""
    cells, offset = cells_of(regions, strides)
    return [
        grid_anchors(cell.to(x.device, non_blocking=True), x.shape[-2], x.shape[-1], stride, offset)
        for cell, x, stride in zip(cells, logits, strides, strict=True)
    ]


def cells_of(regions: Regions, strides: Sequence[int]) -> tuple[list[Tensor], float]:
    """The anchors float32 [K, 4] of a cell of each level, and the offset in strides that is left to add to them."""
    cells, offset = regions.cells(len(strides)), regions.offset
    if regions.rounded:  # in the first cell; mmdetection's corners lie on pixels, so that the last one is one less
        places = [cell + offset * stride for cell, stride in zip(cells, strides, strict=True)]
        cells, offset = [torch.cat([p[:, :2].round(), (p[:, 2:] - 1).round() + 1], 1) for p in places], 0.0
    return cells, offset


def flatten(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Maps in the order of the anchors: logits [B, h * w * K] and deltas [B, h * w * K, 4] of each level."""
    return (
        [x.permute(0, 2, 3, 1).flatten(1) for x in logits],
        [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas],
    )


@dataclass(frozen=True)
class Candidates:
    """The boxes of all images from which proposals are chosen, the best of each level first."""

    boxes: Tensor
    """float [B, A, 4], cut to the images."""
    logits: Tensor
    """float [B, A]."""
    levels: Tensor
    """int64 [A], the level of each."""
    usable: Tensor
    """bool [B, A], boxes that are finite and not empty."""


@torch.no_grad()
def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Tensor,
    regions: Regions,
    training: bool,
) -> list[Proposals]:
    """The best boxes of each image; arguments as of `candidate_boxes`."""
    return choose(candidate_boxes(logits, deltas, anchors, sizes, regions, training), regions, training)


@torch.no_grad()
def candidate_boxes(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Tensor,
    regions: Regions,
    training: bool,
) -> Candidates:
    """The boxes from which proposals are chosen.

    Args:
        logits: of each level [B, n], as `flatten` gives them.
        deltas: of each level [B, n, 4].
        anchors: of each level [n, 4].
        sizes: int [B, 2], height and width of each image without batch padding.
        regions: limits and thresholds.
        training: use the limits of training.
    """
    before = regions.train_before if training else regions.test_before
    best = [x.topk(min(before, x.shape[1]), 1) for x in logits]
    boxes = [
        decode(level[index], delta.gather(1, index[:, :, None].expand(-1, -1, 4)))
        for level, delta, (_, index) in zip(anchors, deltas, best, strict=True)
    ]
    return cut(boxes, [score for score, _ in best], sizes, regions.least_side)


def choose(found: Candidates, regions: Regions, training: bool, mark: bool = False) -> list[Proposals]:
    """The proposals of each image among its candidates; arguments as of `candidate_boxes` and `suppress`."""
    return suppress(found, regions.nms, regions.train_after if training else regions.test_after, mark)


def cut(boxes: Sequence[Tensor], logits: Sequence[Tensor], sizes: Tensor, least: float = 0.0) -> Candidates:
    """Boxes cut to the images.

    Args:
        boxes: of each level [B, n, 4].
        logits: of each level [B, n].
        sizes: int [B, 2].
        least: boxes whose width or height is not above are empty.
    """
    levels = torch.cat([torch.full((x.shape[1],), k, device=x.device) for k, x in enumerate(logits)])
    every, confidence = torch.cat(list(boxes), 1), torch.cat(list(logits), 1)
    every = torch.stack(
        [clip(image, height, width) for image, (height, width) in zip(every, sizes.tolist(), strict=True)]
    )
    usable = every.isfinite().all(2) & confidence.isfinite() & ~is_empty(every, least)
    return Candidates(every, confidence, levels, usable)


def suppress(found: Candidates, nms: float, after: int, mark: bool = False) -> list[Proposals]:
    """Usable boxes without overlapping ones, the best `after` of each image.

    Args:
        found: of `cut`.
        nms: two boxes of one level may overlap by this.
        after: how many stay.
        mark: boxes that are not usable may fill up what is missing to `after`, marked as such, and the device is not
            asked how many are; else it is, once for all images.

    By torchvision's suppression a GPU is read once for each image, for the number of boxes that it leaves.
    """
    from torchvision.ops import batched_nms  # torchvision takes seconds, and most processes need nothing of it

    if mark:
        usable = found.usable
        boxes = torch.where(usable[:, :, None], found.boxes, 0.0)
        logits = torch.where(usable, found.logits, -torch.inf)
        # on a level of their own, unusable boxes suppress no usable one
        levels = torch.where(usable, found.levels, found.levels[-1] + 1)
        rows = list(zip(boxes, logits, levels, usable, strict=True))
    else:
        counts = found.usable.sum(1).tolist()
        places = torch.nonzero_static(found.usable, size=sum(counts))[:, 1].split(counts)
        rows = [
            (image[kept], scores[kept], found.levels[kept], None)
            for image, scores, kept in zip(found.boxes, found.logits, places, strict=True)
        ]
    proposals = []
    for image, scores, level, fit in rows:
        best = batched_nms(image, scores, level, nms)[:after]
        proposals.append(Proposals(image[best], scores[best], None if fit is None else fit[best]))
    return proposals


@torch.no_grad()
def match_anchors(
    anchors: Sequence[Tensor], truth: Sequence[Tensor], regions: Regions, sizes: Tensor | None = None
) -> Matches:
    """The thing and the label of each anchor in each image; arguments as in `region_losses`."""
    every = torch.cat(list(anchors))
    rules = regions.negative, regions.positive, regions.low_quality, regions.low_quality_overlap
    matched = [match(boxes, every, *rules) for boxes in truth]
    if regions.inside and sizes is not None:
        for (_, labels), (height, width) in zip(matched, sizes.tolist(), strict=True):
            beyond = (every[:, :2] < 0).any(1) | (every[:, 2] > width) | (every[:, 3] > height)
            labels[beyond] = -1
    return matched


def region_losses(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    truth: Sequence[Tensor],
    regions: Regions,
    sizes: Tensor | None = None,
    matched: Matches | None = None,
    amounts: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of objectness and L1 (or smooth L1) of deltas, over sampled anchors.

    Both are sums divided by `regions.samples` times the number of images, as detectron2 has it, however
    many anchors were there to sample; with `divide` "sampled" means over images of sums divided by their number, with
    "batch" sums over the batch divided by its number.

    Args:
        logits: of each level [B, n], as `flatten` gives them.
        deltas: of each level [B, n, 4].
        anchors: of each level [n, 4].
        truth: for each image the boxes [N, 4] of its things.
        regions: thresholds and numbers.
        sizes: int [B, 2], height and width of each image without batch padding, which `regions.inside` asks for.
        matched: of `match_anchors`, where it is known already.
        amounts: of `boxes.sample`, of their labels.
    """
    every, scores, code = torch.cat(list(anchors)), torch.cat(list(logits), 1), torch.cat(list(deltas), 1)
    if matched is None:
        matched = match_anchors(anchors, truth, regions, sizes)
    drawn = sample([labels for _, labels in matched], regions.samples, regions.positive_fraction, amounts)
    # for each image: logits of sampled anchors with their targets, codes of positive anchors with the true codes
    sampled, targets, codes, true_codes = [], [], [], []
    for image, (boxes, (index, _), (positive, negative)) in enumerate(zip(truth, matched, drawn, strict=True)):
        sampled.append(scores[image, torch.cat([positive, negative])])
        targets.append((torch.arange(len(sampled[-1]), device=index.device) < len(positive)).to(scores.dtype))
        codes.append(code[image, positive])
        true_codes.append(encode(every[positive], boxes[index[positive]]) if len(boxes) else codes[-1].detach())

    def losses(images: slice, total: int) -> tuple[Tensor, Tensor]:
        objectness = F.binary_cross_entropy_with_logits(
            torch.cat(sampled[images]), torch.cat(targets[images]), reduction="sum"
        )
        box = box_error(torch.cat(codes[images]), torch.cat(true_codes[images]), regions.beta)
        return objectness / total, box / total

    if regions.divide == "samples":
        return losses(slice(None), regions.samples * len(truth))
    if regions.divide == "batch":
        return losses(slice(None), sum(max(1, len(some)) + max(1, len(other)) for some, other in drawn))
    parts = [losses(slice(b, b + 1), max(1, len(anchors_drawn))) for b, anchors_drawn in enumerate(targets)]
    objectness, box = (torch.stack(part).mean() for part in zip(*parts, strict=True))
    return objectness, box


def box_error(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Summed smooth L1 distance of deltas [P, 4], a parabola below `beta`; L1 where `beta` is 0."""
    return F.smooth_l1_loss(deltas, targets, reduction="sum", beta=beta)
