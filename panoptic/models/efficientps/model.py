"""EfficientPS (Mohan and Valada, "EfficientPS: Efficient Panoptic Segmentation", IJCV 2021, arXiv 2004.02307).

One EfficientNet and a pyramid with two directions of flow feed a semantic head and a variant of Mask R-CNN; a fusion
module without parameters joins the logits of both to one map.

Where the paper and its authors' code (DeepSceneSeg/EfficientPS) differ, the default is the code's:

| | here (the code) | the paper |
|---|---|---|
| sizes of levels meet | nearest neighbour | bilinear |
| 3x3 behind the pyramid | plain (`separable_pyramid` False) | separable |
| region proposals | a plain 3x3 and ReLU | separable, with norm |
| logits of masks in the fusion | four times (`fusion.mask_factor`) | once |
| first blocks of the backbone | 1x1 activated too | EfficientNet's |

Norms are in-place activated batch norms there: batch norms that scale by |weight| + eps, behind them a leaky ReLU of
slope 0.01. Here the same is computed without the saving of memory (`norm` "absolute"); any other norm can stand there.

Deviations from the code: boxes are half-open inside, which is the same as its corners that belong to the box, but that
a box may be clipped to no area; the best anchor of a thing keeps the thing that it overlaps most itself; deltas that
shrink a box more than 64-fold are not limited; a cell of a mask's target is true from half its area on, not by a resize
of bytes; logits of batch padding are cut off before the fusion, not squeezed in; the first instance keeps its pixels
where no pixel is stuff. True things come from the panoptic map and so never overlap.

The truth in place of the outputs (`truth`) goes through masks of 28 x 28 in boxes: PQ 99 at least in the contract tests
with `fusion.inclusive` off, which draws masks where they were learnt.

Shapes: B images, K classes, T of them things, H x W canvas, h x w a level, A anchors of a cell, N detections, M side
of a mask. "p2" to "p5" have strides 4 to 32.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType

import torch
from torch import Tensor

from panoptic.layers.fpn import LEVELS
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import set_norm_momentum
from panoptic.models.base import CERTAIN, Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.efficientps.config import EfficientPSConfig
from panoptic.models.efficientps.loss import semantic_loss
from panoptic.models.efficientps.mask_head import SeparableMaskHead
from panoptic.models.efficientps.postprocess import postprocess
from panoptic.models.efficientps.semantic_head import SemanticHead
from panoptic.models.efficientps.two_way_fpn import TwoWayFPN
from panoptic.rcnn.canvas import pad_canvas
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.rcnn.roi_heads import region_class_layers
from panoptic.segmentation import Categories, Frame, Targets
from panoptic.targets.dense import class_logits


class EfficientPS(PanopticModel):
    """Backbone, two-way pyramid, semantic head, region proposals, box head and mask head.

    Outputs: "semantic" logits [B, K, H / 4, W / 4], the levels "p2" to "p5" [B, C, h, w], and of each of them
    "objectness_p2" [B, A, h, w] and "deltas_p2" [B, 4 A, h, w].

    `postprocess` also takes "semantic" at the size of the padded canvas, and "detections" [B, N, 6] (x0 y0 x1 y1 in
    pixels of the canvas, score, class; `IGNORE` for none), with "masks" [B, N, M, M], logits, or without, in place of
    what it would detect.
    """

    truth_needs = MappingProxyType({"masks": ("detections",)})
    class_layers = MappingProxyType({**region_class_layers("detector."), "semantic.classifier": ("classes",)})

    def __init__(self, config: EfficientPSConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.backbone = config.backbone.build()
        self.pyramid = TwoWayFPN(self.backbone.channels, config.width, config.norm, config.separable_pyramid)
        self.semantic = SemanticHead(config.width, config.semantic_width, len(categories), config.norm)
        strides = {level: self.backbone.strides[name] for name, level in LEVELS.items()}
        heads = config.detector.heads
        masks = SeparableMaskHead(
            config.width, heads.mask_width, heads.mask_layers, len(categories.things), config.norm
        )
        self.detector = Detector(strides, list(strides), config.width, categories, config.detector, masks)
        set_norm_momentum(self, config.norm_momentum)

    def normalised(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 [B, 3, H, W] as the backbone takes them, the canvas padded to whole cells."""
        return pad_canvas(self.pixels(images, frame))

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes, of the canvas padded to whole cells."""
        levels = self.pyramid(self.features(self.normalised(images, frame)))
        return {"semantic": self.semantic(levels), **self.detector(levels)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "semantic", "objectness", "region", "class", "box" and "mask"."""
        semantic = self.config.semantic_weight * semantic_loss(outputs["semantic"], targets)
        return {"semantic": semantic, **self.detector.losses(outputs, targets)}

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Detections and the semantic head, joined by the fusion module."""
        return postprocess(outputs, frame, want, self.detector, self.categories, self.config.fusion)

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "detections" and "masks" of the truth; void is the first class of stuff.

        Masks have logits from -1 to 1, so that a mask's fringe gives way to what the semantic head is certain of.
        """
        detections = self.detector.truth(targets)
        return {
            "semantic": class_logits(targets, self.categories, CERTAIN),
            **detections,
            "masks": 2 * detections["masks"].float() - 1,
        }
