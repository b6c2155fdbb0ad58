"""Panoptic-DeepLab (Cheng et al., "Panoptic-DeepLab", arXiv 1911.10194).

A pixel votes: one branch predicts its class, another points from each pixel to the centre of its instance
and marks the centres, and grouping pixels by the nearest centre gives the instances.

Two implementations were published and are not interchangeable. `flavour` names the one that is
followed: "standalone" (bowenc0221/panoptic-deeplab; "Panoptic-DeepLab in PyTorch") or "detectron2"
(its project). It settles what nobody would tune separately:

| | standalone | detectron2 |
|---|---|---|
| bilinear resizing | corners aligned | corners not aligned |
| concatenation in the decoder | coarse features first | low-level features first |
| image pooling branch | without bias | with bias |
| factor of offsets | (H - 1) // (h - 1), from heights | the stride, 4 |
| centre of the heatmap's peak | truncated | rounded half to even |
| offset loss divided by | both channels' weights | one channel's (twice the loss) |
| merged | at image size, then resized by nearest | at output size |
| initial decoder weights | N(0, 0.001) | Kaiming |

Deviations: batch padding is cut off before merging in both flavours (the standalone code merges its padded image);
coarse maps of a canvas that is no multiple of 4 are cut to it (detectron2 cannot train on one). `foreground` is the
branch that the technical report proposes in section 4 and nobody published: trained on all pixels, with void as
background, it keeps instances off ignored regions.

Two things with one rounded centre cannot be told apart, whatever the outputs.

Shapes: B images, C classes, H x W canvas, h x w stride-4 maps.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from torch import Tensor

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm, set_norm_momentum
from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.panoptic_deeplab.decoder import ASPP, Decoder, Head, initialise_decoder, pool_window
from panoptic.models.panoptic_deeplab.instance_scores import Score
from panoptic.models.panoptic_deeplab.loss import weighted_losses
from panoptic.models.panoptic_deeplab.postprocess import postprocess
from panoptic.models.panoptic_deeplab.targets import true_outputs
from panoptic.models.panoptic_deeplab.upsampling import Upsampling
from panoptic.ranges import (
    NOT_EMPTY,
    Decay,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    OddInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
)
from panoptic.segmentation import Categories, Frame, Targets
from panoptic.targets.dense import Rounding, centre_targets


@dataclass(frozen=True)
class PanopticDeepLabConfig:
    """Panoptic-DeepLab: both published flavours and everything between."""

    flavour: Literal["standalone", "detectron2"] = "standalone"
    """The published implementation that is followed in everything that is no option of its own."""
    backbone: Backbone = field(default_factory=Backbone)
    """The network that the features come from."""
    divisor: PositiveInt = 1
    """Batches are padded to a multiple of this (detectron2's COCO configuration: 640)."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    bgr: bool = False
    """Channels enter as blue, green, red; mean and std are then in that order."""
    norm: Norm = "batch"
    """Normalisation in decoders and heads (the backbone has its own)."""
    norm_momentum: PositiveUnitFloat = 0.1
    """Weight of the newest batch in running statistics, everywhere (standalone: 0.01)."""
    low_level: tuple[str, ...] = ("res4", "res3", "res2")
    """Features that the decoders add, coarse to fine; the last one's stride is the output's."""
    semantic_projections: tuple[PositiveInt, ...] = (128, 64, 32)
    """Channels to which the semantic decoder projects each low-level feature."""
    instance_projections: tuple[PositiveInt, ...] = (64, 32, 16)
    """Channels to which the instance decoder projects each low-level feature."""
    rates: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (3, 6, 9)
    """Dilations of the pyramid pooling (published: 3 6 9 at output stride 32, 6 12 18 at 16)."""
    aspp_channels: PositiveInt = 256
    """Channels of each branch of the pyramid pooling and of its output."""
    shared_aspp: bool = False
    """One pyramid pooling for both decoders instead of one each."""
    image_pool: tuple[PositiveInt, PositiveInt] | None = None
    """Training crop (height, width) whose extent the image pooling keeps on larger images; None pools globally."""
    dropout: Decay = 0.1
    """Dropout after the pyramid pooling (standalone: 0.5)."""
    separable: bool = True
    """Depthwise-separable convolutions in decoders and heads, else two plain 3x3."""
    kernel: OddInt = 5
    """Side of the depthwise ones (on CPU a 3x3 trains several times faster)."""
    aspp_separable: bool = False
    """Depthwise-separable dilated convolutions in the pyramid pooling."""
    centre_separable: bool = True
    """The same as `separable`, for the centre head (detectron2: always plain)."""
    semantic_channels: PositiveInt = 256
    """Width of the semantic decoder."""
    instance_channels: PositiveInt = 128
    """Width of the instance decoder."""
    semantic_head_channels: PositiveInt = 256
    """Width of the semantic head."""
    instance_head_channels: PositiveInt = 32
    """Width of the centre, offset and foreground heads."""
    foreground: bool = False
    """Add the branch that keeps instances off ignored regions; void is trained as background."""
    semantic_loss: Literal["top_k", "cross_entropy", "ohem"] = "top_k"
    """top_k: mean of the hardest pixels; cross_entropy: over labelled pixels; ohem: pixels below a probability."""
    top_k_fraction: PositiveUnitFloat = 0.2
    """Share of all pixels that top_k keeps; 1 is the mean over all of them, void included."""
    ohem_threshold: UnitFloat = 0.7
    """ohem keeps pixels whose class is less probable than this."""
    ohem_min_kept: PositiveInt = 100_000
    """ohem keeps about this many pixels at least."""
    semantic_weight: NonNegativeFloat = 1.0
    """Factor of the semantic loss."""
    centre_weight: NonNegativeFloat = 200.0
    """Factor of the heatmap loss."""
    offset_weight: NonNegativeFloat = 0.01
    """Factor of the offset loss."""
    foreground_weight: NonNegativeFloat = 1.0
    """Factor of the foreground loss."""
    sigma: PositiveInt = 8
    """Standard deviation of the heatmap's Gaussians, in pixels (detectron2 on Cityscapes: 10)."""
    small_area: NonNegativeInt = 4096
    """Things of fewer pixels weigh more in the semantic loss."""
    small_weight: NonNegativeFloat = 3.0
    """Weight of the pixels of these small things; all others weigh 1."""
    ignore_crowd: bool = False
    """Crowds are void in the semantic loss."""
    stuff_offsets: bool = False
    """Stuff counts in the offset loss, with target 0."""
    threshold: UnitFloat = 0.1
    """Centres score strictly more."""
    nms_kernel: OddInt = 7
    """Side of the window in which a centre is the maximum, pixels (COCO: 41)."""
    top_k: PositiveInt | None = 200
    """If there are so many centres or more, those strictly above the score of the top_k-th stay; None keeps all."""
    stuff_area: NonNegativeInt = 2048
    """Stuff of fewer pixels becomes void (COCO: 4096)."""
    rescale_offset: bool = True
    """detectron2 flavour: offsets grow with the resize to output size; False repeats its published behaviour."""
    instance_score: Score = "both"
    """For AP: mean class probability (semantic), heatmap at the centroid (instance), or their product."""

    def build(self, categories: Categories) -> PanopticDeepLab:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other; the message names them.
        """
        if self.foreground and not categories.things:
            raise ValueError("foreground: there is no thing class among the categories; leave the branch off")
        counts = {len(self.low_level), len(self.semantic_projections), len(self.instance_projections)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"low_level: {self.low_level}, semantic_projections {self.semantic_projections} and "
                f"instance_projections {self.instance_projections} must name as many widths as features, at least one"
            )
        return PanopticDeepLab(self, categories)


class PanopticDeepLab(PanopticModel):
    """Backbone, two decoders, three or four heads.

    Outputs, all stride-4 maps: "semantic" logits [B, C, h, w], "centre" [B, 1, h, w] without activation,
    "offset" [B, 2, h, w] (dy, dx) in pixels of the canvas, and "foreground" logits [B, 1, h, w] where the
    config asks for them. `postprocess` also takes maps of canvas size, and a "foreground" in any case.
    """

    class_layers = MappingProxyType({"semantic_head.predictor": ("classes",)})

    def __init__(self, config: PanopticDeepLabConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.standalone = config.flavour == "standalone"
        self.rounding: Rounding = "truncate" if self.standalone else "half_even"
        self.semantic_loss = {
            "top_k": partial(losses.top_k_cross_entropy, fraction=config.top_k_fraction),
            "ohem": partial(losses.ohem_cross_entropy, threshold=config.ohem_threshold, min_kept=config.ohem_min_kept),
            "cross_entropy": losses.cross_entropy,
        }[config.semantic_loss]
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.levels = (*config.low_level, "res5")
        self.backbone = config.backbone.build(self.levels)
        channels, strides = self.backbone.channels, self.backbone.strides
        unknown = [name for name in config.low_level if name not in channels or name == "res5"]
        if unknown:
            raise ValueError(f"low_level: {unknown} are no features of {config.backbone.name}; it has {list(channels)}")
        self.stride = strides[config.low_level[-1]]
        self.upsampling = Upsampling(self.standalone, self.stride)
        aspp = partial(
            ASPP,
            channels["res5"],
            config.aspp_channels,
            config.rates,
            config.norm,
            separable=config.aspp_separable,
            pool_bias=not self.standalone,
            pool_window=pool_window(config.image_pool, strides["res5"]),
            align_corners=self.standalone,
            dropout=config.dropout,
        )
        self.semantic_aspp = aspp()
        self.instance_aspp = None if config.shared_aspp else aspp()
        decoder = partial(
            Decoder,
            config.aspp_channels,
            [channels[name] for name in config.low_level],
            norm=config.norm,
            separable=config.separable,
            kernel=config.kernel,
            low_first=not self.standalone,
            align_corners=self.standalone,
        )
        self.semantic_decoder = decoder(config.semantic_projections, config.semantic_channels)
        self.instance_decoder = decoder(config.instance_projections, config.instance_channels)
        head = partial(Head, separable=config.separable, norm=config.norm, kernel=config.kernel)
        self.semantic_head = head(config.semantic_channels, config.semantic_head_channels, len(categories))
        instance = (config.instance_channels, config.instance_head_channels)
        self.centre_head = head(*instance, 1, separable=config.centre_separable)
        self.offset_head = head(*instance, 2)
        self.foreground_head = head(*instance, 1) if config.foreground else None
        set_norm_momentum(self, config.norm_momentum)
        for name, part in self.named_children():
            if name != "backbone":
                initialise_decoder(part, kaiming=not self.standalone)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the stride-4 outputs that the class describes."""
        features = self.features(self.normalised(images, frame))
        low = [features[name] for name in self.config.low_level]
        semantic = self.semantic_aspp(features["res5"])
        instance = semantic if self.instance_aspp is None else self.instance_aspp(features["res5"])
        semantic = self.semantic_decoder(semantic, low)
        instance = self.instance_decoder(instance, low)
        outputs = {"semantic": self.semantic_head(semantic), "centre": self.centre_head(instance)}
        # the standalone code takes the factor of both axes from heights; a map one pixel high would divide by 0
        scale = max(1, images.shape[-2] - 1) // max(1, instance.shape[-2] - 1) if self.standalone else self.stride
        outputs["offset"] = self.offset_head(instance) * scale
        if self.foreground_head is not None:
            outputs["foreground"] = self.foreground_head(instance)
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "semantic", "centre", "offset" (and "foreground"), on the maps upsampled to the canvas."""
        config = self.config
        truth = centre_targets(
            targets,
            self.categories,
            sigma=config.sigma,
            rounding=self.rounding,
            small_area=config.small_area,
            small_weight=config.small_weight,
            ignore_crowd=config.ignore_crowd,
            stuff_offsets=config.stuff_offsets,
        )
        return weighted_losses(
            outputs,
            targets,
            truth,
            self.upsampling,
            semantic_loss=self.semantic_loss,
            semantic_weight=config.semantic_weight,
            centre_weight=config.centre_weight,
            offset_weight=config.offset_weight,
            foreground_weight=config.foreground_weight,
        )

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Things grouped by the centres to which their pixels point, and stuff by class."""
        config = self.config
        return postprocess(
            outputs,
            frame,
            want,
            self.categories,
            self.upsampling,
            threshold=config.threshold,
            kernel=config.nms_kernel,
            top_k=config.top_k,
            stuff_area=config.stuff_area,
            rescale_offset=config.rescale_offset,
            score=config.instance_score,
        )

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "centre", "offset" and "foreground" of the truth, at canvas resolution.

        Void pixels get the first stuff class (and no foreground).
        """
        return true_outputs(targets, self.categories, self.config.sigma, self.rounding)
