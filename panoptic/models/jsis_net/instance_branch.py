"""JSIS-Net's instance branch on the outputs of the network: proposals, detections and their masks.

Shapes: B images, A anchors of a cell, h x w the shared map, N detections, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.models.base import Outputs
from panoptic.models.jsis_net.c4_head import C4Head
from panoptic.rcnn.boxes import constants
from panoptic.rcnn.config import Detection, Regions
from panoptic.rcnn.rpn import Candidates, Proposals, anchors_of, candidate_boxes, choose, flatten
from panoptic.segmentation import IGNORE, Categories, Frame


@dataclass(frozen=True)
class InstanceBranch:
    """Region proposals and the head that looks into them; the model holds the weights under names of its own."""

    head: C4Head
    """Class, box and mask of a region."""
    stage: nn.Module | None
    """The ResNet's last stage, where the head has none of its own."""
    stride: int
    """Stride of the shared map."""
    categories: Categories
    """Classes, and which of them are things."""
    regions: Regions
    """Anchors and proposals."""
    detection: Detection
    """Regions that the head learns from, and which of them are detections."""

    def anchor_outputs(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits [B, n], deltas [B, n, 4] and anchors [n, 4] of the one level, in the order of the anchors.

        The two logits of an anchor (background, thing) count by their difference: a softmax over two is its sigmoid.
        """
        pairs = outputs["objectness"].unflatten(1, (-1, 2))
        logits = pairs[:, :, 1] - pairs[:, :, 0]
        return *flatten([logits], [outputs["deltas"]]), anchors_of([logits], [self.stride], self.regions)

    def propose(self, outputs: Outputs, frame: Frame, training: bool) -> list[Proposals]:
        """The proposals of each image, one at least: the whole image, where every box vanished.

        Args:
            outputs: of `JSISNet.network`.
            frame: of the batch.
            training: the limits of training, else those of testing.
        """
        return self.choose(self.candidate_boxes(outputs, frame, training), frame, training)

    def candidate_boxes(self, outputs: Outputs, frame: Frame, training: bool) -> Candidates:
        """The candidate boxes from which `propose` chooses; arguments as there."""
        return candidate_boxes(*self.anchor_outputs(outputs), frame.sizes, self.regions, training)

    def choose(self, found: Candidates, frame: Frame, training: bool, mark: bool = False) -> list[Proposals]:
        """`propose` from its candidates; `mark` as in `suppress`."""
        proposals = choose(found, self.regions, training, mark)
        for b, (height, width) in enumerate(frame.sizes.tolist()):
            whole, part = constants(found.boxes, [0, 0, width, height])[None], proposals[b]
            if part.usable is not None:  # the first takes the place of what is missing
                none = ~part.usable[:1]
                first = torch.where(none[:, None], whole, part.boxes[:1])
                logits = torch.where(none, 0.0, part.logits[:1])
                usable = torch.cat([part.usable[:1] | none, part.usable[1:]])
                proposals[b] = Proposals(
                    torch.cat([first, part.boxes[1:]]), torch.cat([logits, part.logits[1:]]), usable
                )
            elif not len(part.boxes):
                proposals[b] = Proposals(whole, whole.new_zeros(1))
        return proposals

    def detect(
        self, outputs: Outputs, frame: Frame, proposals: Sequence[Proposals], threshold: float
    ) -> tuple[Tensor, Tensor]:
        """The detections of all images, each filled up with rows of the class `IGNORE`.

        Args:
            outputs: with "features".
            frame: of the batch.
            proposals: of each image.
            threshold: detections score more.

        Returns:
            float [B, N, 6], x0 y0 x1 y1 in pixels of the canvas, score and class, best first; and float [B, N], how
            probable the region of each is to be background.
        """
        detection = replace(self.detection, threshold=threshold)
        things = torch.tensor(self.categories.things, device=outputs["features"].device)
        rows = []
        for b, proposed in enumerate(proposals):
            features = outputs["features"][b : b + 1]
            best, background = self.head.detect(
                features, self.stride, proposed.boxes, frame.size(b), detection, self.stage
            )
            columns = torch.stack([best.scores, things[best.classes].to(best.scores), background], 1)
            rows.append(torch.cat([best.boxes, columns], 1))
        most = max([1, *(len(part) for part in rows)])
        padded = torch.stack([F.pad(part, (0, 0, 0, most - len(part)), value=IGNORE) for part in rows])
        return padded[:, :, :6], padded[:, :, 6]

    def masks(self, outputs: Outputs, detections: Tensor) -> Tensor:
        """The probability of each detection in the cells of its box, float [B, N, M, M]; 0 where there is none.

        Args:
            outputs: with "features".
            detections: float [B, N, 6], of `detect` or of the truth.
        """
        side = self.head.options.mask_side
        masks = detections.new_zeros(*detections.shape[:2], side, side)
        things = torch.tensor(self.categories.things, device=detections.device)
        for b, rows in enumerate(detections):
            kept = rows[:, 5] != IGNORE
            features, classes = outputs["features"][b : b + 1], torch.searchsorted(things, rows[kept, 5].long())
            boxes = rows[kept, :4].contiguous()
            masks[b, kept] = self.head.mask_probabilities(features, self.stride, boxes, classes, self.stage)
        return masks
