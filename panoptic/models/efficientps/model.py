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
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.layers.fpn import LEVELS
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm, set_norm_momentum
from panoptic.models.base import CERTAIN, Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.efficientps.loss import COARSEST, semantic_loss
from panoptic.models.efficientps.mask_head import SeparableMaskHead
from panoptic.models.efficientps.postprocess import Fusion, postprocess
from panoptic.models.efficientps.semantic_head import SemanticHead
from panoptic.models.efficientps.two_way_fpn import TwoWayFPN
from panoptic.ranges import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, PositiveUnitFloat
from panoptic.rcnn.mask_rcnn import Detector, DetectorConfig, Heads
from panoptic.rcnn.roi_heads import Detection, region_class_layers
from panoptic.rcnn.rpn import Regions
from panoptic.segmentation import Categories, Frame, Targets
from panoptic.targets.dense import class_logits

DETECTOR = DetectorConfig(
    Regions(
        sizes=(32, 64, 128, 256),
        offset=0.5,
        low_quality_overlap=0.3,
        rounded=True,
        inside=True,
        beta=1 / 9,
        divide="batch",
        train_before=2000,
        train_after=2000,
    ),
    Detection(samples=256, beta=1.0, threshold=0.5),
    Heads(cell_samples=2, aligned=False),
)
"""Region proposals and heads as the authors' code has them (mmdetection 1)."""


@dataclass(frozen=True)
class EfficientPSConfig:
    """EfficientPS on any backbone; the defaults are the published ones for Cityscapes."""

    backbone: Backbone = field(default_factory=lambda: Backbone(name="efficientps_b5", norm="absolute"))
    """The network that the features come from."""
    divisor: PositiveInt = 32
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (106.433, 116.617, 119.559)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (65.496, 67.6, 74.123)
    """Divides the pixels, scale 0..255."""
    bgr: bool = False
    """Channels enter as blue, green, red; mean and std are then in that order."""
    norm: Norm = "absolute"
    """Normalisation in pyramid and heads."""
    norm_momentum: PositiveUnitFloat = 0.1
    """Weight of the newest batch in running statistics, everywhere."""
    width: PositiveInt = 256
    """Channels of every level of the pyramid."""
    separable_pyramid: bool = False
    """The 3x3 convolutions behind the pyramid are depthwise separable, as in the paper."""
    semantic_width: PositiveInt = 128
    """Channels of each branch of the semantic head."""
    detector: DetectorConfig = field(default_factory=lambda: DETECTOR)
    """Region proposals, box head and mask head."""
    semantic_weight: NonNegativeFloat = 1.0
    """Factor of the semantic loss."""
    fusion: Fusion = field(default_factory=Fusion)
    """Rules by which things and stuff are merged."""

    def build(self, categories: Categories) -> EfficientPS:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other, or there is no thing to detect; the message names them.
        """
        if not categories.things:
            raise ValueError("categories: there is no thing class to detect; EfficientPS needs one")
        if self.divisor % COARSEST:
            raise ValueError(f"divisor: {self.divisor} is no multiple of {COARSEST}, the stride of the backbone")
        if self.backbone.output_stride != COARSEST:
            raise ValueError(
                f"backbone.output_stride: {self.backbone.output_stride}; the levels of the pyramid double in stride, "
                f"so it must be {COARSEST}"
            )
        return EfficientPS(self, categories)


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
        height, width = images.shape[-2:]
        return F.pad(self.pixels(images, frame), (0, -width % COARSEST, 0, -height % COARSEST))

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
