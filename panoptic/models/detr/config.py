"""The options of DETR, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from panoptic.backbones import Backbone
from panoptic.ranges import (
    Decay,
    FiniteFloat,
    LayerCount,
    LayerCountOrZero,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
)

if TYPE_CHECKING:
    from panoptic.models.detr.model import DETR
    from panoptic.segmentation import Categories


@dataclass(frozen=True)
class DETRConfig:
    """DETR: detection alone or with masks, any depth and width; the defaults are those of COCO panoptic."""

    backbone: Backbone = field(default_factory=lambda: Backbone(norm="frozen", freeze=2))
    """The backbone (DC5: output_stride 16)."""
    divisor: PositiveInt = 1
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    channels: PositiveInt = 256
    """Width of the transformer, a multiple of 4 and of the heads."""
    heads: PositiveInt = 8
    """Attention heads."""
    hidden: PositiveInt = 2048
    """Width of the feed-forward networks."""
    encoder_layers: LayerCountOrZero = 6
    """Transformer layers in which the image's cells attend to each other."""
    decoder_layers: LayerCount = 6
    """Transformer layers in which the queries attend to the image."""
    queries: PositiveInt = 100
    """The most segments of an image; of more in the truth the rest is not learnt."""
    dropout: Decay = 0.1
    """Dropout in the transformer, attention included."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward network instead of after."""
    positions: Literal["sine", "learned"] = "sine"
    """Position embeddings of the image's cells; learned ones know 50 rows and columns."""
    masks: bool = True
    """The panoptic head; without it the model finds boxes (first stage), which are painted as maps."""
    mask_channels: PositiveInt = 256
    """Width of the mask head after its first convolution, halved at each finer level."""
    unit_mean_attention: bool = False
    """Attention maps have the mean 1 in the mask head instead of the sum 1 (published): for short trainings."""
    logits: NonNegativeInt = 0
    """Logits without "no object"; 0 = one a class. Published: 250 for COCO's panoptic, 91 for its detection ids."""
    class_hidden: tuple[PositiveInt, ...] = ()
    """Hidden units of the classification head; published: none, a linear layer."""
    class_dropout: Decay = 0.0
    """Dropout after each layer of class_hidden."""
    auxiliary: bool = True
    """Losses of classes and boxes after every decoder layer, not only the last."""
    class_weight: NonNegativeFloat = 1.0
    """Factor of the cross-entropy, and of the probability in the matching cost."""
    box_weight: NonNegativeFloat = 5.0
    """Factor of the L1 distance of boxes, in loss and cost."""
    giou_weight: NonNegativeFloat = 2.0
    """Factor of the generalised IoU, in loss and cost."""
    mask_weight: NonNegativeFloat = 1.0
    """Factor of the focal loss of masks."""
    dice_weight: NonNegativeFloat = 1.0
    """Factor of the dice loss of masks."""
    no_object_weight: NonNegativeFloat = 0.1
    """Weight of queries without a segment in the cross-entropy."""
    threshold: UnitFloat = 0.85
    """Queries are merged whose class is more probable than this."""
    min_area: NonNegativeInt = 4
    """Merged segments of this many pixels or fewer are removed."""
    mask_threshold: UnitFloat = 0.5
    """Probability above which a pixel belongs to an instance; for AP."""

    def build(self, categories: Categories) -> DETR:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other; the message names them.
        """
        if self.channels % 4 or self.channels % self.heads:
            raise ValueError(f"channels: {self.channels} is no multiple of 4 and of heads ({self.heads})")
        if self.masks and self.mask_channels % 32:
            raise ValueError(f"mask_channels: {self.mask_channels} is no multiple of 32; it is halved four times")
        from panoptic.models.detr.model import DETR

        return DETR(self, categories)
