"""The options that mask-classification models have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from panoptic.backbones import Backbone
from panoptic.layers.config import Norm
from panoptic.ranges import Decay, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat


@dataclass(frozen=True, kw_only=True)
class MaskClassificationConfig:
    """Options of every model whose queries have a class and a mask each. Those without a default have another one in
    each model."""

    backbone: Backbone = field(default_factory=Backbone)
    """The backbone; all of res2 to res5 are used."""
    divisor: PositiveInt
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    queries: PositiveInt = 100
    """The most segments of an image."""
    no_object_weight: NonNegativeFloat = 0.1
    """Weight of queries without a target in the class loss."""
    class_weight: NonNegativeFloat
    """Factor of the class loss and cost."""
    mask_weight: NonNegativeFloat
    """Factor of the mask loss and cost other than dice."""
    dice_weight: NonNegativeFloat
    """Factor of the dice loss and cost."""
    threshold: UnitFloat = 0.8
    """Queries less certain of their class than this are not merged."""
    overlap: UnitFloat = 0.8
    """Queries that win less than this share of their own mask are dropped."""
    inside: bool
    """A merged query paints only where its own mask is at least 1/2."""
    top_k: PositiveInt = 100
    """Pairs of query and class that may become instances (AP)."""


@dataclass(frozen=True, kw_only=True)
class MaskTransformerConfig(MaskClassificationConfig):
    """The options that MaskFormer and Mask2Former, which decode a pyramid, have besides."""

    channels: PositiveInt = 256
    """Width of the pixel decoder and the transformer."""
    mask_channels: PositiveInt = 256
    """Channels of the features and embeddings whose product is a mask."""
    norm: Norm = "group"
    """Normalisation in the pixel decoder (published: group; on a CPU batch norm trains much faster)."""
    encoder_layers: NonNegativeInt = 6
    """Transformer layers of the pixel decoder."""
    decoder_layers: PositiveInt
    """Layers of the transformer decoder, which turns queries into classes and masks."""
    heads: PositiveInt = 8
    """Heads of every attention."""
    dropout: Decay
    """Dropout in transformer layers."""
    deep_supervision: bool = True
    """The losses count for every decoder layer, each with a matching of its own."""
