"""The options of EfficientPS, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from panoptic.backbones import Backbone
from panoptic.layers.config import Norm
from panoptic.ranges import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
)
from panoptic.rcnn.config import Detection, DetectorConfig, Heads, Regions, check_pyramid

if TYPE_CHECKING:
    from panoptic.models.efficientps.model import EfficientPS
    from panoptic.segmentation import Categories


@dataclass(frozen=True)
class Fusion:
    """Rules of the panoptic fusion module."""

    overlap: UnitFloat = 0.5
    """Share of an instance that better ones may cover."""
    stuff_area: NonNegativeInt = 2048
    """Stuff of fewer pixels becomes void."""
    mask_factor: NonNegativeFloat = 4.0
    """Factor of a mask's logits; the paper's formula has none (1)."""
    inclusive: bool = True
    """Corners of boxes are pixels that belong to them, as in the published code, which therefore draws masks one pixel
    smaller than they were learnt, and reads the semantic logits of a class one pixel inside the box."""


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
        check_pyramid("EfficientPS", categories, self.divisor, self.backbone.output_stride)
        from panoptic.models.efficientps.model import EfficientPS

        return EfficientPS(self, categories)
