"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv 2112.01527).

MaskFormer whose queries, layer by layer, look only where the mask that they predict so far says that they are,
on features of three strides in turn, and whose mask losses are taken at points instead of at all pixels.

Follows facebookresearch/Mask2Former. Odd and kept: padding is never masked; a query whose mask is empty at some
resolution looks everywhere; the first prediction is made, and trained, before any layer has seen the image.

What masks attention is the product of the embeddings with resized features instead of resized products (both are
linear, the numbers are the same to rounding), so that masks at stride 4 are made of the queries that need one only.

Deviations: segments without a pixel are no targets (the reference keeps empty masks); boxes of instances are
those of their masks (the reference has none). For CPUs: `pixel_decoder="fpn"` is MaskFormer's, which the reference's
code offers as well, here with the last convolution of the deformable one; `full_precision=False` lets autocast into
the pixel decoder; `norm` may be batch norm.

Shapes: B images, Q queries, K classes, C channels, D mask channels, h x w stride-4 maps, N targets, P points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from panoptic.models.base import Outputs
from panoptic.models.mask2former.transformer_decoder import LEVELS, MaskedDecoder
from panoptic.models.mask_transformer.config import MaskTransformerConfig
from panoptic.models.mask_transformer.model import MaskTransformer
from panoptic.models.mask_transformer.pixel_decoders import Decoded, DeformablePixelDecoder, FPNPixelDecoder
from panoptic.models.mask_transformer.point_loss import point_loss
from panoptic.ranges import Decay, LayerCount, LayerCountOrZero, NonNegativeFloat, PositiveInt, UnitFloat
from panoptic.segmentation import Categories, Targets


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
        return Mask2Former(self, categories)


class Mask2Former(MaskTransformer):
    """Backbone, pixel decoder, masked-attention decoder. Outputs are those of every `MaskTransformer`."""

    config: Mask2FormerConfig
    class_layers = MappingProxyType({"decoder.class_head": ("classes", "nothing")})

    def __init__(self, config: Mask2FormerConfig, categories: Categories) -> None:
        super().__init__(config, categories)
        self.pixel_decoder = _pixel_decoder(config, self.backbone.channels)
        self.decoder = MaskedDecoder(
            len(categories),
            queries=config.queries,
            channels=config.channels,
            mask_channels=config.mask_channels,
            heads=config.heads,
            hidden=config.decoder_hidden,
            layers=config.decoder_layers,
        )

    def forward_normalised(self, pixels: Tensor) -> Outputs:
        """The network on normalised pixels, float [B, 3, H, W]."""
        features = self.features(pixels)
        if self.config.full_precision:
            with torch.autocast(pixels.device.type, enabled=False):
                decoded = self._decode({name: feature.float() for name, feature in features.items()})
        else:
            decoded = self._decode(features)
        classes, embeddings = self.decoder(decoded)
        outputs = {"classes": classes[-1], "embeddings": embeddings[-1], "features": decoded.features}
        if self.config.deep_supervision:
            outputs["auxiliary_classes"] = torch.stack(classes[:-1])
            outputs["auxiliary_embeddings"] = torch.stack(embeddings[:-1])
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """The terms of `point_loss`."""
        config = self.config
        return point_loss(
            outputs,
            targets,
            config,
            points=config.loss_points,
            oversample=config.oversample,
            importance=config.importance,
        )

    def _decode(self, features: dict[str, Tensor]) -> Decoded:
        """The pixel decoder's features and levels; MaskFormer's also gives the coarsest map, which is not used here."""
        decoded = self.pixel_decoder(features)
        return decoded if isinstance(decoded, Decoded) else decoded[0]


def _pixel_decoder(config: Mask2FormerConfig, inputs: dict[str, int]) -> DeformablePixelDecoder | FPNPixelDecoder:
    """The pixel decoder that the options name, on features of the given channels."""
    sizes = (inputs, config.channels, config.mask_channels)
    if config.pixel_decoder == "fpn":
        return FPNPixelDecoder(
            *sizes,
            norm=config.norm,
            mask_kernel=1,
            encoder_layers=config.encoder_layers,
            heads=config.heads,
            hidden=config.encoder_hidden,
            dropout=config.dropout,
        )
    return DeformablePixelDecoder(
        *sizes,
        norm=config.norm,
        layers=config.encoder_layers,
        heads=config.heads,
        points=config.points_per_level,
        hidden=config.encoder_hidden,
        dropout=config.dropout,
    )
