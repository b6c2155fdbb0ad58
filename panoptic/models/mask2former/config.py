"""The options of Mask2Former, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval

from panoptic.models.mask_transformer.config import MaskTransformerConfig
from panoptic.ranges import (
    Decay,
    LayerCount,
    LayerCountOrZero,
    NonNegativeFloat,
    PositiveInt,
    UnitFloat,
)

if TYPE_CHECKING:
    from panoptic.models.mask2former.model import Mask2Former
    from panoptic.segmentation import Categories


LEVELS = 3
"""Strides 32, 16 and 8, to which the decoder layers attend in turn."""


@dataclass(frozen=True)
class Mask2FormerConfig(MaskTransformerConfig):
    """Mask2Former; the defaults are those of COCO panoptic with a ResNet."""

    divisor: PositiveInt = 32
    """Batches are padded to a multiple of this."""
    pixel_decoder: Literal["deformable", "fpn"] = "deformable"
    """deformable: attention over three strides; fpn: MaskFormer's pyramid, twice as fast on a CPU."""
    encoder_layers: LayerCountOrZero = 6
    """Transformer layers of the pixel decoder (fpn: on the coarsest map, 0 for none)."""
    encoder_hidden: PositiveInt = 1024
    """Width of the feed-forward networks in the pixel decoder."""
    points_per_level: PositiveInt = 4
    """Points at which each head of deformable attention looks on each stride."""
    full_precision: bool = True
    """The pixel decoder computes in float32 even under autocast, as published."""
    decoder_layers: LayerCount = 9
    """Layers of the transformer decoder; layer i attends to stride 32, 16, 8 in turn."""
    decoder_hidden: PositiveInt = 2048
    """Width of the feed-forward networks in the transformer decoder."""
    dropout: Decay = 0.0
    """Dropout in the pixel decoder's transformer."""
    deep_supervision: bool = True
    """The losses count for every decoder layer and for the initial queries, each with a matching of its own."""
    class_weight: NonNegativeFloat = 2.0
    """Factor of the class loss and cost."""
    mask_weight: NonNegativeFloat = 5.0
    """Factor of the cross-entropy of masks, loss and cost."""
    dice_weight: NonNegativeFloat = 5.0
    """Factor of the dice loss and cost."""
    loss_points: PositiveInt = 12544
    """Points at which masks are compared, for the cost and, others, for each matched mask."""
    oversample: Annotated[float, Interval(ge=1, lt=math.inf)] = 3.0
    """Candidates drawn for each point of a matched mask."""
    importance: UnitFloat = 0.75
    """Share of the points of a matched mask that are the least certain candidates; the others are uniform."""
    inside: bool = True
    """A merged query paints only where its own mask is at least 1/2; otherwise as in MaskFormer."""

    def build(self, categories: Categories) -> Mask2Former:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: an option is out of its range; the message names it.
        """
        if self.queries < 1 or self.loss_points < 1 or self.decoder_layers < LEVELS:
            raise ValueError(
                f"queries {self.queries} and loss_points {self.loss_points} must be at least 1, decoder_layers "
                f"{self.decoder_layers} at least {LEVELS}: one for each stride"
            )
        if not 0 <= self.importance <= 1 or self.oversample < 1:
            raise ValueError(
                f"importance {self.importance} is a share, 0 to 1; oversample {self.oversample} must be at least 1"
            )
        from panoptic.models.mask2former.model import Mask2Former

        return Mask2Former(self, categories)
