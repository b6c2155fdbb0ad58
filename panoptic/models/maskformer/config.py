"""The options of MaskFormer, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from panoptic.models.mask_transformer.config import MaskTransformerConfig
from panoptic.ranges import (
    Decay,
    LayerCount,
    LayerCountOrZero,
    NonNegativeFloat,
    PositiveInt,
)

if TYPE_CHECKING:
    from panoptic.models.maskformer.model import MaskFormer
    from panoptic.segmentation import Categories


@dataclass(frozen=True)
class MaskFormerConfig(MaskTransformerConfig):
    """MaskFormer with either pixel decoder; the defaults are those of COCO panoptic with a ResNet."""

    divisor: PositiveInt = 1
    """Batches are padded to a multiple of this (published: 1 for COCO panoptic, 32 for the other datasets)."""
    encoder_layers: LayerCountOrZero = 6
    """Transformer layers on the coarsest map; 0 = the plain feature pyramid (published with Swin)."""
    decoder_layers: LayerCount = 6
    """Layers of the transformer decoder, which turns queries into classes and masks."""
    hidden: PositiveInt = 2048
    """Width of the feed-forward networks."""
    dropout: Decay = 0.1
    """Dropout in all transformer layers."""
    class_weight: NonNegativeFloat = 1.0
    """Factor of the class loss and cost."""
    mask_weight: NonNegativeFloat = 20.0
    """Factor of the focal loss and cost."""
    dice_weight: NonNegativeFloat = 1.0
    """Factor of the dice loss and cost."""
    loss_stride: PositiveInt = 1
    """Step, along rows and columns, between the pixels that mask losses count (published: 1, all pixels)."""
    inside: bool = False
    """A merged query paints only where its own mask is at least 1/2, as in Mask2Former."""

    def build(self, categories: Categories) -> MaskFormer:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: an option is out of its range; the message names it.
        """
        if self.queries < 1 or self.decoder_layers < 1 or self.loss_stride < 1:
            raise ValueError(
                f"queries {self.queries}, decoder_layers {self.decoder_layers}, loss_stride {self.loss_stride}: "
                "each must be at least 1"
            )
        from panoptic.models.maskformer.model import MaskFormer

        return MaskFormer(self, categories)
