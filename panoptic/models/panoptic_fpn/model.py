"""Panoptic FPN (Kirillov, Girshick, He, Dollár, "Panoptic Feature Pyramid Networks", arXiv 1901.02446).

Mask R-CNN on a feature pyramid finds things, a light branch on the same pyramid classifies each pixel, and things lie
above stuff in the merged map.

Everything is computed as detectron2 does: anchors without an offset within their cell, aligned RoIAlign with adaptive
sampling, L1 for boxes, one class "things" in the semantic branch (class 0; stuff k is class 1 + k), and a merge that
keeps an instance however little of it is left. Its odd choices stay: both losses of the proposals are divided by the
number of anchors that should have been sampled, not by those that were, and an anchor that overlaps a thing as much as
any other does is positive, however little that is. The default configuration is the published one, which trains from
converted weights (fixed norms, a frozen stem and res2); from scratch the backbone wants norms that learn.

Deviations: true things come from the panoptic map and so never overlap; their masks are cut out of that map (as
detectron2 does with bitmaps), not rasterised from polygons. Instances of equal score keep the order of detection.
Only the predictor of a region's own class is multiplied in the mask head, which changes no result.
Canvases of any size work: the network pads them to whole cells of its coarsest level.

A class map (mIoU) is the semantic branch's where that has stuff; where it has "things" the class comes from the merged
map.

The truth in place of the outputs (`truth`) goes through masks of 28 x 28 in boxes, so that the map comes back only
nearly: PQ 99 at least in the contract tests, 97 on the same maps four times as large. "masks" of the truth lie in its
boxes and so count only with its "detections".

Shapes: B images, S stuff classes, K thing classes, H x W canvas, h x w a level, A anchors of a cell, N detections, M
side of a mask. "p2" to "p6" have strides 4 to 64.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType

import torch
from torch import Tensor, nn

from panoptic.layers.fpn import FPN, LEVELS, SemanticFPN
from panoptic.layers.image import ImageNormalisation
from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.panoptic_fpn.config import PanopticFPNConfig
from panoptic.models.panoptic_fpn.loss import weighted_losses
from panoptic.models.panoptic_fpn.postprocess import postprocess
from panoptic.models.panoptic_fpn.targets import true_semantic
from panoptic.rcnn.canvas import pad_canvas
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.rcnn.roi_heads import region_class_layers
from panoptic.segmentation import Categories, Frame, Targets


class PanopticFPN(PanopticModel):
    """Backbone, pyramid, semantic branch, region proposals, box head and mask head.

    Outputs: "semantic" logits [B, 1 + S, H / 4, W / 4] ("things", then the stuff classes), the levels "p2" to "p5"
    [B, C, h, w], and of "p2" to "p6" "objectness_p2" [B, A, h, w] and "deltas_p2" [B, 4 A, h, w].

    `postprocess` also takes "semantic" at the size of the padded canvas, and "detections" [B, N, 6] (x0 y0 x1 y1 in
    pixels of the canvas, score, class; `IGNORE` for none), with "masks" [B, N, M, M], probabilities, or without, in
    place of what it would detect.
    """

    truth_needs = MappingProxyType({"masks": ("detections",)})
    class_layers = MappingProxyType({**region_class_layers("detector."), "classifier": ("all things", "stuff")})

    def __init__(self, config: PanopticFPNConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.backbone = config.backbone.build()
        self.pyramid = FPN({name: self.backbone.channels[name] for name in LEVELS}, config.width, config.norm)
        strides = {level: self.backbone.strides[name] for name, level in LEVELS.items()}
        self.detector = Detector(
            strides | {"p6": 2 * strides["p5"]}, list(strides), config.width, categories, config.detector
        )
        self.semantic = SemanticFPN(config.width, config.semantic_width, config.semantic_norm)
        self.classifier = nn.Conv2d(config.semantic_width, 1 + len(categories.stuff), 1)
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def normalised(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 [B, 3, H, W] as the backbone takes them, the canvas padded to whole cells."""
        return pad_canvas(self.pixels(images, frame))

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes, of the canvas padded to whole cells."""
        levels = self.pyramid(self.features(self.normalised(images, frame)))
        return {"semantic": self.classifier(self.semantic(levels)), **self.detector(levels)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "semantic", "objectness", "region", "class", "box" and "mask"."""
        return weighted_losses(
            outputs,
            targets,
            self.detector,
            self.categories,
            semantic_weight=self.config.semantic_weight,
            instance_weight=self.config.instance_weight,
        )

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Detections and the semantic branch, merged greedily in the order of the scores."""
        return postprocess(
            outputs,
            frame,
            want,
            self.detector,
            self.categories,
            confidence=self.config.confidence,
            overlap=self.config.overlap,
            stuff_area=self.config.stuff_area,
        )

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "detections" and "masks" of the truth."""
        return {"semantic": true_semantic(targets, self.categories), **self.detector.truth(targets)}
