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

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.distributed import world_mean
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm
from panoptic.matcher import Matches, class_cost, cross_entropy_cost, dice_cost, hungarian, stacked
from panoptic.models.base import Outputs, PanopticModel
from panoptic.models.mask2former.transformer_decoder import LEVELS, MaskedDecoder
from panoptic.models.mask_transformer import loss as mask_classification
from panoptic.models.mask_transformer import point_sampling
from panoptic.models.mask_transformer import truth as truth_module
from panoptic.models.mask_transformer.loss import class_losses, compared_masks, trained_layers
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.pixel_decoders import (
    Decoded,
    DeformablePixelDecoder,
    FPNPixelDecoder,
)
from panoptic.models.mask_transformer.targets import learnt
from panoptic.segmentation import Categories, Frame, Instances, Segmentation, Targets


@dataclass(frozen=True)
class Mask2FormerConfig:
    """Mask2Former; the defaults are those of COCO panoptic with a ResNet."""

    backbone: Backbone = field(default_factory=Backbone)
    """Where the features come from; all of res2 to res5 are used."""
    divisor: int = 32
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    channels: int = 256
    """Of the pixel decoder and the transformer."""
    mask_channels: int = 256
    """Of the features and embeddings whose product is a mask."""
    pixel_decoder: Literal["deformable", "fpn"] = "deformable"
    """deformable: attention over three strides; fpn: MaskFormer's pyramid, twice as fast on a CPU."""
    norm: Norm = "group"
    """Normalisation in the pixel decoder (published: group; on a CPU batch norm trains much faster)."""
    encoder_layers: int = 6
    """Transformer layers of the pixel decoder (fpn: on the coarsest map, 0 for none)."""
    encoder_hidden: int = 1024
    """Width of their feed-forward networks."""
    points_per_level: int = 4
    """Where each head of deformable attention looks on each stride."""
    full_precision: bool = True
    """The pixel decoder computes in float32 even under autocast, as published."""
    decoder_layers: int = 9
    """Of the transformer that turns queries into classes and masks; layer i looks at stride 32, 16, 8 in turn."""
    decoder_hidden: int = 2048
    """Width of their feed-forward networks."""
    heads: int = 8
    """Of every attention."""
    dropout: float = 0.0
    """Within the pixel decoder's transformer."""
    queries: int = 100
    """Most segments of an image (published with Swin-L: 200)."""
    deep_supervision: bool = True
    """The losses count for every decoder layer and for the initial queries, each with a matching of its own."""
    no_object_weight: float = 0.1
    """Weight of queries without a target in the class loss."""
    class_weight: float = 2.0
    """Factor of the class loss and cost."""
    mask_weight: float = 5.0
    """Factor of the cross-entropy of masks, loss and cost."""
    dice_weight: float = 5.0
    """Factor of the dice loss and cost."""
    loss_points: int = 12544
    """Points at which masks are compared, for the cost and, others, for each matched mask."""
    oversample: float = 3.0
    """Candidates drawn for each of those points."""
    importance: float = 0.75
    """Share of the points that are the least certain candidates; the others are uniform."""
    threshold: float = 0.8
    """Queries less certain of their class than this are not merged."""
    overlap: float = 0.8
    """Queries that win less than this share of their own mask are dropped."""
    inside: bool = True
    """A merged query paints only where its own mask is at least 1/2; otherwise as in MaskFormer."""
    top_k: int = 100
    """Pairs of query and class that may become instances (AP)."""

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


class Mask2Former(PanopticModel):
    """Backbone, pixel decoder, masked-attention decoder. Outputs are those of `mask_classification`."""

    def __init__(self, config: Mask2FormerConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std)
        self.backbone = config.backbone.build()
        self.pixel_decoder = _pixel_decoder(config, self.backbone.channels)
        self.decoder = MaskedDecoder(
            len(categories),
            config.queries,
            config.channels,
            config.mask_channels,
            config.heads,
            config.decoder_hidden,
            config.decoder_layers,
        )

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs of `mask_classification`."""
        return self.answer(self.pixels(images, frame))

    def answer(self, pixels: Tensor) -> Outputs:
        """`network` of normalised pixels, float [B, 3, H, W]."""
        features = self.backbone(pixels)
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
        """Terms "classes", "masks" (cross-entropy) and "dice"; of prediction i but the last with the suffix `_i`.

        Prediction 0 is that of the initial queries. Random numbers are drawn prediction by prediction, the last
        one first: points for the cost of each image, candidates, points that may be anywhere.
        """
        config, images = self.config, len(outputs["classes"])
        features = outputs["features"].contiguous()  # once, instead of at every product
        wanted = learnt(targets)
        normaliser = world_mean(wanted.sum().float()).clamp(min=1)
        suffixes, classes, embeddings = trained_layers(outputs)
        found, where = [], []
        with torch.no_grad():
            for logits, vectors in zip(classes.split(images), embeddings.split(images), strict=True):
                masks = mask_products(vectors, features)
                matches = hungarian(self._cost(logits, masks, targets), wanted, targets.names)
                matched = masks[matches.groups, matches.queries]
                where.append(
                    point_sampling.uncertain_points(matched, config.loss_points, config.oversample, config.importance)
                )
                found.append(matches)
        matches = stacked(found, images)
        named = class_losses(classes, matches, targets, config.no_object_weight)
        entropy, dice = self._mask_losses(embeddings, features, torch.cat(where), targets, matches).unbind(1)
        terms = {}
        for index, suffix in enumerate(suffixes):
            terms[f"classes{suffix}"] = config.class_weight * named[index]
            terms[f"masks{suffix}"] = config.mask_weight * entropy[index] / normaliser
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

    def _decode(self, features: dict[str, Tensor]) -> Decoded:
        found = self.pixel_decoder(features)
        return found if isinstance(found, Decoded) else found[0]

    @torch.no_grad()
    def _cost(self, classes: Tensor, masks: Tensor, targets: Targets) -> Tensor:
        """[B, Q, N], at points that all queries and targets of an image share."""
        config, images = self.config, len(classes)
        # image by image, in the order in which the reference draws them
        drawn = [torch.rand(1, config.loss_points, 2, device=masks.device) for _ in range(images)]
        where = torch.cat(drawn)
        logits = point_sampling.sample(masks, where)
        truths = point_sampling.every_mask_at(targets.segments, where, targets.labels.shape[1])
        cost = config.class_weight * class_cost(classes, targets.labels)
        cost += config.mask_weight * cross_entropy_cost(logits, truths)
        return cost + config.dice_weight * dice_cost(logits, truths)

    def _mask_losses(
        self, embeddings: Tensor, features: Tensor, where: Tensor, targets: Targets, matches: Matches
    ) -> Tensor:
        """Sums of cross-entropy and dice losses over the matched queries of each layer, float [L, 2].

        `where` is [M, P, 2], the points at which each pair of `matches` is compared.
        """
        images = matches.groups % len(features)

        def compare(logits: Tensor, part: Tensor) -> Tensor:
            truths = point_sampling.masks_at(targets.segments, images[part], matches.targets[part], where[part])
            sampled = point_sampling.sample(logits[:, None], where[part])[:, 0]
            return torch.stack(losses.cross_entropy_and_dice(sampled, truths), 1)

        return compared_masks(embeddings, features, matches, compare)


def _pixel_decoder(config: Mask2FormerConfig, inputs: dict[str, int]) -> DeformablePixelDecoder | FPNPixelDecoder:
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
