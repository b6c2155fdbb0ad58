"""Heads on pooled regions (He et al., "Mask R-CNN", arXiv 1703.06870) as detectron2 computes them.

Classes of regions count the things only, 0..K - 1; background is K. Each class has a box and a mask of its own.

Shapes: B images, R regions of the batch, K thing classes, D detections of an image, S side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.rcnn.boxes import clip, encode, match, sample
from panoptic.rcnn.config import Detection
from panoptic.rcnn.rpn import Matches, Proposals, box_error


@dataclass(frozen=True)
class Sampled:
    """Regions of one image that the heads learn from: those that hold a thing first."""

    boxes: Tensor
    """float [n, 4]."""
    classes: Tensor
    """int64 [n], K for background."""
    owners: Tensor
    """int64 [positives], which thing of the image (an index into its true boxes) each positive holds."""

    @property
    def positives(self) -> Tensor:
        """float [positives, 4]."""
        return self.boxes[: len(self.owners)]


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    boxes: Tensor
    """float [D, 4] in pixels of the canvas, within the image."""
    scores: Tensor
    """float [D]."""
    classes: Tensor
    """int64 [D]."""
    regions: Tensor
    """int64 [D], the proposal that each came from."""


def region_class_layers(prefix: str) -> dict[str, tuple[str, ...]]:
    """The layers of `BoxHead` and `MaskHead` that depend on the classes, as `PanopticModel.class_layers` has them.

    Args:
        prefix: of the heads' names, "detector.".
    """
    return {
        f"{prefix}boxes.classes": ("things", "background"),
        f"{prefix}boxes.deltas": ("4*things",),
        f"{prefix}masks.predictor": ("things",),
    }


class BoxHead(nn.Module):
    """Two fully connected layers on pooled features; class logits and a box code for each class.

    Args:
        inputs: channels of the features.
        side: of the pooled features.
        channels: of the hidden layers.
        classes: K.
    """

    def __init__(self, inputs: int, side: int, channels: int, classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs * side * side, channels), nn.Linear(channels, channels)
        self.classes, self.deltas = nn.Linear(channels, classes + 1), nn.Linear(channels, 4 * classes)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.classes, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[R, C, S, S] to class logits [R, K + 1] and deltas [R, 4 K], both float32."""
        hidden = F.relu(self.fc1(pooled.flatten(1)), inplace=True)
        hidden = F.relu(self.fc2(hidden), inplace=True)
        return self.classes(hidden).float(), self.deltas(hidden).float()


class MaskHead(nn.Module):
    """Convolutions on pooled features, one upsampling, a mask for each class.

    Args:
        inputs: channels of the features.
        channels: of the hidden layers.
        layers: how many 3x3 convolutions.
        classes: K.
    """

    def __init__(self, inputs: int, channels: int, layers: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs if k == 0 else channels, channels, 3, padding=1) for k in range(layers)
        )
        self.deconv = nn.ConvTranspose2d(channels if layers else inputs, channels, 2, 2)
        self.predictor = nn.Conv2d(channels, classes, 1)
        for layer in (*self.convs, self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (*self.convs, self.deconv, self.predictor):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def hidden(self, pooled: Tensor) -> Tensor:
        """[R, C, s, s] through the convolutions."""
        for conv in self.convs:
            pooled = F.relu(conv(pooled), inplace=True)
        return pooled

    def forward(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """[R, C, S / 2, S / 2] and int64 [R] to the logits of each region's class, float32 [R, S, S].

        Only the row of that class is multiplied, not the predictor's every row.
        """
        pooled = F.relu(self.deconv(self.hidden(pooled)), inplace=True)
        rows = self.predictor.weight.flatten(1)[classes][:, None]
        logits = torch.bmm(rows, pooled.flatten(2)).float() + self.predictor.bias[classes][:, None, None]  # type: ignore[index]
        return logits.view(-1, *pooled.shape[-2:])


def positive_rows(sampled: Sequence[Sampled]) -> Tensor:
    """int64 [positives of all images], their places among the regions of all images."""
    starts = accumulate((len(part.boxes) for part in sampled), initial=0)
    device = sampled[0].boxes.device
    return torch.cat(
        [
            torch.arange(start, start + len(part.owners), device=device)
            for start, part in zip(starts, sampled, strict=False)
        ]
    )


@torch.no_grad()
def match_regions(
    proposals: Sequence[Proposals], truth: Sequence[Tensor], detection: Detection
) -> tuple[list[Tensor], Matches]:
    """The regions [P, 4] of each image, with the thing and the label of each; arguments as in `sample_regions`."""
    regions = [
        torch.cat([proposed.boxes, boxes.to(proposed.boxes)]) if detection.append_truth else proposed.boxes
        for proposed, boxes in zip(proposals, truth, strict=True)
    ]
    limits = detection.overlap, detection.overlap
    matched = []
    for proposed, boxes, here in zip(proposals, truth, regions, strict=True):
        index, labels = match(boxes, here, *limits)
        if proposed.usable is not None:  # what is no proposal is neither positive nor negative
            fit = F.pad(proposed.usable, (0, len(here) - len(proposed.usable)), value=True)
            labels = torch.where(fit, labels, -1)
        matched.append((index, labels))
    return regions, matched


@torch.no_grad()
def sample_regions(
    proposals: Sequence[Proposals],
    truth: Sequence[Tensor],
    classes: Sequence[Tensor],
    background: int,
    detection: Detection,
    candidates: tuple[list[Tensor], Matches] | None = None,
    amounts: Sequence[Sequence[int]] | None = None,
    drawn: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Sampled]:
    """Regions to learn from, drawn image by image.

    Args:
        proposals: for each image.
        truth: for each image the boxes [N, 4] of its things.
        classes: for each image int64 [N].
        background: K.
        detection: thresholds and numbers.
        candidates: of `match_regions`, where they are known already.
        amounts: of `boxes.sample`, of their labels.
        drawn: of `boxes.sample`, where that is done already, on the CPU too.
    """
    sampled = []
    every, matched = candidates or match_regions(proposals, truth, detection)
    if drawn is None:
        drawn = sample([labels for _, labels in matched], detection.samples, detection.positive_fraction, amounts)
    for regions, (index, _), (positive, negative), labels in zip(every, matched, drawn, classes, strict=True):
        chosen = torch.cat([positive, negative]).to(regions.device, non_blocking=True)
        owners = index[chosen[: len(positive)]]
        targets = torch.full((len(chosen),), background, device=labels.device)
        targets[: len(positive)] = labels[owners]
        sampled.append(Sampled(regions[chosen], targets, owners))
    return sampled


def box_losses(
    logits: Tensor, deltas: Tensor, sampled: Sequence[Sampled], truth: Sequence[Tensor], detection: Detection
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all sampled regions, and the L1 distance of the true class's deltas over those with a thing.

    Both are sums divided by the number of all sampled regions; 0, with their graph, where there is none.

    Args:
        logits: float [R, K + 1].
        deltas: float [R, 4 K].
        sampled: for each image; R regions in all.
        truth: for each image the boxes [N, 4] of its things.
        detection: the code and `beta`.
    """
    classes = torch.cat([part.classes for part in sampled])
    total = max(1, len(classes))
    holds = positive_rows(sampled)
    codes = deltas.unflatten(1, (-1, 4))[holds, classes[holds]]
    true_codes = torch.cat(
        [
            encode(part.positives, boxes.to(part.boxes)[part.owners], detection.code)
            for part, boxes in zip(sampled, truth, strict=True)
        ]
    )
    entropy = F.cross_entropy(logits, classes, reduction="sum") / total
    return entropy, box_error(codes, true_codes, detection.beta) / total


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over all pixels of all regions; 0, with its graph, where there is no region.

    Args:
        logits: float [R, S, S], of the true classes.
        targets: bool, or the share of each cell, float [R, S, S].
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return losses / max(1, targets.numel())


@torch.no_grad()
def detect(boxes: Tensor, probabilities: Tensor, size: tuple[int, int], detection: Detection) -> Detections:
    """Detections of one image: each class of each region on its own, suppressed class by class.

    Args:
        boxes: float [P, 4 K], decoded, a box for each class.
        probabilities: float [P, K + 1], background last.
        size: height and width of the image.
        detection: thresholds and numbers.
    """
    from torchvision.ops import batched_nms  # torchvision takes seconds, and most processes need nothing of it

    finite = (boxes.isfinite().all(1) & probabilities.isfinite().all(1)).nonzero()[:, 0]
    boxes = clip(boxes[finite].unflatten(1, (-1, 4)), *size)
    scores = probabilities[finite, :-1]
    region, label = (scores > detection.threshold).nonzero(as_tuple=True)
    boxes, scores = boxes[region, label], scores[region, label]
    best = batched_nms(boxes, scores, label, detection.nms)[: detection.most]
    return Detections(boxes[best], scores[best], label[best], finite[region[best]])
