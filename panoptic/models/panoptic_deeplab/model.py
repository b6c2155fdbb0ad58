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
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from panoptic import losses
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import set_norm_momentum
from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.panoptic_deeplab.config import PanopticDeepLabConfig
from panoptic.models.panoptic_deeplab.decoder import ASPP, Decoder, Head, initialise_decoder, pool_window
from panoptic.models.panoptic_deeplab.loss import weighted_losses
from panoptic.models.panoptic_deeplab.postprocess import postprocess
from panoptic.models.panoptic_deeplab.targets import true_outputs
from panoptic.models.panoptic_deeplab.upsampling import Upsampling
from panoptic.segmentation import Categories, Frame, Targets
from panoptic.targets.dense import Rounding, centre_targets


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
