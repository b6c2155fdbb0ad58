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

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.distributed import world_mean
from panoptic.layers.attention import MLP, Decoder
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm
from panoptic.matcher import Matches, class_cost, dice_cost, focal_cost, hungarian
from panoptic.models.base import Outputs, PanopticModel
from panoptic.models.mask_transformer import loss as mask_classification
from panoptic.models.mask_transformer import truth as truth_module
from panoptic.models.mask_transformer.loss import class_losses, compared_masks, trained_layers
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.pixel_decoders import FPNPixelDecoder, map_positions, projection
from panoptic.models.mask_transformer.targets import coarse_masks, learnt
from panoptic.segmentation import Categories, Frame, Instances, Segmentation, Targets


@dataclass(frozen=True)
class MaskFormerConfig:
    """MaskFormer with either pixel decoder; the defaults are those of COCO panoptic with a ResNet."""

    backbone: Backbone = field(default_factory=Backbone)
    """Where the features come from; all of res2 to res5 are used."""
    divisor: int = 32
    """Batches are padded to a multiple of this (published for COCO panoptic: 1)."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    channels: int = 256
    """Of the pixel decoder and the transformer."""
    mask_channels: int = 256
    """Of the features and embeddings whose product is a mask."""
    norm: Norm = "group"
    """Normalisation in the pixel decoder (published: group; on a CPU batch norm trains much faster)."""
    encoder_layers: int = 6
    """Transformer layers on the coarsest map; 0 = the plain feature pyramid (published with Swin)."""
    decoder_layers: int = 6
    """Of the transformer that turns queries into classes and masks."""
    heads: int = 8
    """Of every attention."""
    hidden: int = 2048
    """Width of the feed-forward networks."""
    dropout: float = 0.1
    """Within the transformer."""
    queries: int = 100
    """Most segments of an image."""
    deep_supervision: bool = True
    """The losses count for every decoder layer, each with a matching of its own."""
    no_object_weight: float = 0.1
    """Weight of queries without a target in the class loss."""
    class_weight: float = 1.0
    """Factor of the class loss and cost."""
    mask_weight: float = 20.0
    """Factor of the focal loss and cost."""
    dice_weight: float = 1.0
    """Factor of the dice loss and cost."""
    loss_stride: int = 1
    """Mask losses count every so-many-th pixel of rows and columns (published: 1, all of them)."""
    threshold: float = 0.8
    """Queries less certain of their class than this are not merged."""
    overlap: float = 0.8
    """Queries that win less than this share of their own mask are dropped."""
    inside: bool = False
    """A merged query paints only where its own mask is at least 1/2, as in Mask2Former."""
    top_k: int = 100
    """Pairs of query and class that may become instances (AP)."""

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
        return MaskFormer(self, categories)


class MaskFormer(PanopticModel):
    """Backbone, pixel decoder, transformer decoder, two heads. Outputs are those of `mask_classification`."""

    def __init__(self, config: MaskFormerConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        channels = config.channels
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std)
        self.backbone = config.backbone.build()
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

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs of `mask_classification`."""
        return self.answer(self.pixels(images, frame))

    def answer(self, pixels: Tensor) -> Outputs:
        """`network` of normalised pixels, float [B, 3, H, W]."""
        decoded, coarsest = self.pixel_decoder(self.backbone(pixels))
        memory = coarsest if self.project is None else self.project(coarsest)
        states = self.decoder(self.query_positions.weight, memory.flatten(2).transpose(1, 2), map_positions(memory))
        classes, embeddings = self.class_head(states), self.mask_head(states)
        outputs = {"classes": classes[-1], "embeddings": embeddings[-1], "features": decoded.features}
        if self.config.deep_supervision:
            outputs |= {"auxiliary_classes": classes[:-1], "auxiliary_embeddings": embeddings[:-1]}
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "classes", "masks" (focal) and "dice"; of decoder layer i but the last with the suffix `_i`."""
        config = self.config
        features = outputs["features"].contiguous()  # once, instead of at every product
        wanted = learnt(targets)
        normaliser = world_mean(wanted.sum().float()).clamp(min=1)
        suffixes, classes, embeddings = trained_layers(outputs)
        layers = zip(classes.split(len(wanted)), embeddings.split(len(wanted)), strict=True)
        cost = torch.cat([self._cost(logits, vectors, features, targets, wanted) for logits, vectors in layers])
        matches = hungarian(cost, wanted, targets.names)
        named = class_losses(classes, matches, targets, config.no_object_weight)
        focal, dice = self._mask_losses(embeddings, features, targets, matches).unbind(1)
        terms = {}
        for index, suffix in enumerate(suffixes):
            terms[f"classes{suffix}"] = config.class_weight * named[index]
            terms[f"masks{suffix}"] = config.mask_weight * focal[index] / normaliser
            terms[f"dice{suffix}"] = config.dice_weight * dice[index] / normaliser
        return terms

    @torch.no_grad()
    def segment(self, outputs: Outputs, frame: Frame) -> list[Segmentation]:
        """Merged maps at `frame.output_sizes`."""
        options = {"threshold": self.config.threshold, "overlap": self.config.overlap}
        return mask_classification.segment(outputs, frame, self.categories, **options, inside=self.config.inside)

    @torch.no_grad()
    def instances(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[Instances]:
        """Things as `query_instances` scores them."""
        return mask_classification.instances(outputs, frame, self.categories, self.config.top_k)

    @torch.no_grad()
    def semantics(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[np.ndarray]:
        """Class maps as `query_semantics` makes them."""
        return mask_classification.semantics(outputs, frame)

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """ "classes" and "masks" of the ground truth, in the queries that are nearest to it."""
        return truth_module.truth(targets, outputs)

    @torch.no_grad()
    def _cost(self, classes: Tensor, embeddings: Tensor, features: Tensor, targets: Targets, wanted: Tensor) -> Tensor:
        """[B, Q, N], at the masks' own resolution."""
        config = self.config
        logits = mask_products(embeddings, features)
        masks = coarse_masks(targets, wanted, (logits.shape[-2], logits.shape[-1]))
        cost = config.class_weight * class_cost(classes, targets.labels)
        cost += config.mask_weight * focal_cost(logits.flatten(2), masks)
        return cost + config.dice_weight * dice_cost(logits.flatten(2), masks)

    def _mask_losses(self, embeddings: Tensor, features: Tensor, targets: Targets, matches: Matches) -> Tensor:
        """Sums of focal and dice losses over the matched queries of each layer, float [L, 2], at canvas resolution."""
        stride = self.config.loss_stride
        segments = targets.segments[:, stride // 2 :: stride, stride // 2 :: stride]
        images = matches.groups % len(segments)

        def compare(logits: Tensor, part: Tensor) -> Tensor:
            masks = segments[images[part]] == (matches.targets[part] + 1)[:, None, None]
            size = masks.shape[1:]
            logits = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
            return torch.stack(losses.focal_and_dice(logits.flatten(1), masks.flatten(1)), 1)

        return compared_masks(embeddings, features, matches, compare)
