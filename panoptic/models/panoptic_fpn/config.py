"""The options of Panoptic FPN, which a command line reads without torch; `build` makes the model."""

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
    UnitFloat,
)
from panoptic.rcnn.config import DetectorConfig, check_pyramid

if TYPE_CHECKING:
    from panoptic.models.panoptic_fpn.model import PanopticFPN
    from panoptic.segmentation import Categories


CAFFE2 = Backbone(name="resnet50", stride_in_1x1=True, norm="frozen", freeze=2)
"""The backbone of the published models."""


@dataclass(frozen=True)
class PanopticFPNConfig:
    """Panoptic FPN on any backbone; the defaults are detectron2's for COCO."""

    backbone: Backbone = CAFFE2
    """The network that the features come from."""
    divisor: PositiveInt = 32
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (103.53, 116.28, 123.675)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    """Divides the pixels, scale 0..255."""
    bgr: bool = True
    """Channels enter as blue, green, red; mean and std are then in that order."""
    width: PositiveInt = 256
    """Channels of every level of the pyramid."""
    norm: Norm | None = None
    """Normalisation in the pyramid; None = a bias instead."""
    semantic_width: PositiveInt = 128
    """Channels of the semantic branch."""
    semantic_norm: Norm = "group"
    """Normalisation in the semantic branch."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    """Region proposals, box head and mask head."""
    semantic_weight: NonNegativeFloat = 0.5
    """Factor of the semantic loss."""
    instance_weight: NonNegativeFloat = 1.0
    """Factor of the losses of the box and mask heads (not of the proposals)."""
    confidence: UnitFloat = 0.5
    """Instances enter the merged map from this score on."""
    overlap: UnitFloat = 0.5
    """Share of an instance that better ones may cover."""
    stuff_area: NonNegativeInt = 4096
    """Stuff of fewer pixels becomes void."""

    def build(self, categories: Categories) -> PanopticFPN:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other, or there is no thing to detect; the message names them.
        """
        check_pyramid("Panoptic FPN", categories, self.divisor, self.backbone.output_stride)
        from panoptic.models.panoptic_fpn.model import PanopticFPN

        return PanopticFPN(self, categories)
