"""MaskFormer (Cheng, Schwing and Kirillov, "Per-Pixel Classification is Not All You Need", arXiv 2107.06278).

Every segment, thing or stuff, is one query's class and mask: a transformer decoder turns queries into classes
and embeddings, and the product of an embedding with the features of every pixel is the mask.

Follows facebookresearch/MaskFormer: both of its pixel decoders (a plain feature pyramid, or six transformer
layers on the coarsest map first, which the published COCO-panoptic models with ResNets have), DETR's decoder,
deep supervision of every layer. Odd and kept: padding is never masked, it is background to losses and matching
and its cells are attended to; a merged query paints every pixel that it wins, even where its mask says no
(`inside=False`); the first decoder layer attends to itself while all queries are zeros.

Deviations: segments without a pixel are no targets (the reference trains empty masks); instances for AP, which
the reference does not have, are scored as in Mask2Former; `loss_stride` compares masks at fewer pixels, for CPUs.

Shapes: B images, Q queries, K classes, C channels, D mask channels, h x w stride-4 maps, L layers, N targets.
"""

from __future__ import annotations

from torch import Tensor, nn

from panoptic.layers.attention import MLP, Decoder
from panoptic.models.base import Outputs
from panoptic.models.mask_transformer.model import MaskTransformer
from panoptic.models.mask_transformer.pixel_decoders import FPNPixelDecoder, map_positions, projection
from panoptic.models.maskformer.config import MaskFormerConfig
from panoptic.models.maskformer.loss import maskformer_loss
from panoptic.segmentation import Categories, Targets


class MaskFormer(MaskTransformer):
    """Backbone, pixel decoder, transformer decoder, two heads. Outputs are those of every `MaskTransformer`."""

    config: MaskFormerConfig

    def __init__(self, config: MaskFormerConfig, categories: Categories) -> None:
        super().__init__(config, categories)
        channels = config.channels
        self.pixel_decoder = FPNPixelDecoder(
            self.backbone.channels,
            channels,
            config.mask_channels,
            norm=config.norm,
            encoder_layers=config.encoder_layers,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
        )
        # what the encoder made of res5 has the transformer's width already
        self.project = None if config.encoder_layers else projection(self.backbone.channels["res5"], channels)
        self.decoder = Decoder(channels, config.heads, config.hidden, config.decoder_layers, config.dropout)
        self.query_positions = nn.Embedding(config.queries, channels)
        self.class_head = nn.Linear(channels, len(categories) + 1)
        self.mask_head = MLP((channels, channels, channels, config.mask_channels))

    def forward_normalised(self, pixels: Tensor) -> Outputs:
        """The network on normalised pixels, float [B, 3, H, W]."""
        decoded, coarsest = self.pixel_decoder(self.features(pixels))
        memory = coarsest if self.project is None else self.project(coarsest)
        states = self.decoder(self.query_positions.weight, memory.flatten(2).transpose(1, 2), map_positions(memory))
        classes, embeddings = self.class_head(states), self.mask_head(states)
        outputs = {"classes": classes[-1], "embeddings": embeddings[-1], "features": decoded.features}
        if self.config.deep_supervision:
            outputs |= {"auxiliary_classes": classes[:-1], "auxiliary_embeddings": embeddings[:-1]}
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """The terms of `maskformer_loss`."""
        return maskformer_loss(outputs, targets, self.config, self.config.loss_stride)
