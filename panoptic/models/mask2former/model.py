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

from types import MappingProxyType

import torch
from torch import Tensor

from panoptic.models.base import Outputs
from panoptic.models.mask2former.config import Mask2FormerConfig
from panoptic.models.mask2former.transformer_decoder import MaskedDecoder
from panoptic.models.mask_transformer.model import MaskTransformer
from panoptic.models.mask_transformer.pixel_decoders import Decoded, DeformablePixelDecoder, FPNPixelDecoder
from panoptic.models.mask_transformer.point_loss import point_loss
from panoptic.segmentation import Categories, Targets


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
