"""JSIS-Net (de Geus, Meletis, Dubbelman, "Panoptic Segmentation with a Joint Semantic and Instance Segmentation
Network", arXiv 1809.02110).

One ResNet feeds two branches: pyramid pooling classifies each pixel, things and stuff alike; a Mask R-CNN whose
head is the last stage of the ResNet finds things. Seven weighted losses train both, and `postprocess` makes one map of
both. Neither code nor weights were published. What the paper leaves open is an option, and its default is this:

| open in the paper | here | the authors' next network |
|---|---|---|
| shared map | res4, stride 16 (`shared_level`, `backbone.output_stride`) | the whole ResNet, stride 8, reduced to 512 |
| last layers | the ResNet's own last stage, at stride 1 (`head.width` 0) | a new stage, base width 256, 3 units |
| averages | 1, 2, 3, 6 cells a side, a quarter of the channels each | 512 channels each, with a bias |
| hybrid upsampling | 4x4 of stride 2, corners not aligned | 3x3 of stride 1, corners aligned |
| anchors | 32 to 512 pixels, ratios 1/2, 1, 2 | 8 to 256 pixels, ratios 1/4 to 4 |
| pooling of regions | aligned RoIAlign (`head.pooling`) | crop_and_resize |
| mask loss | summed over images (`mask_reduction`), soft targets | the same |
| stuff of few pixels | `conflicts` | counted before things, 1/2048 of the image |

Matching, sampling and the divisors of the losses are that network's: anchors from 0.5 overlap on are positive and below
0.1 background, 256 an image; proposals overlap by 0.5 at most; 64 regions an image learn, at most a quarter of them
positive (0.5 overlap), without the true boxes. L2 regularisation is half the sum of the squared kernels, without biases
and norms; with SGD it is a weight decay of that size, and `regularisation` 0 leaves it to the optimiser.

Background is the last class of a region, not the first. A class's box code has no entry for the background, which
nothing would train. Things that are crowds are background to the detector. Masks are sampled at the centres of cells,
when they are learnt as when they are pasted. True things come from the panoptic map and so never overlap.

The truth in place of the outputs (`truth`) goes through masks of 28 x 28: PQ 99 at least in the contract tests.

Shapes: B images, C classes, H x W canvas, h x w shared map of D channels, A anchors of a cell, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType

import torch
from torch import Tensor, nn

from panoptic import losses
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.vit_pyramid import ViTPyramid
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import set_norm_momentum
from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.jsis_net.c4_head import C4Head, cut_backbone
from panoptic.models.jsis_net.config import JSISNetConfig
from panoptic.models.jsis_net.instance_branch import InstanceBranch
from panoptic.models.jsis_net.loss import instance_losses, semantic_loss
from panoptic.models.jsis_net.postprocess import postprocess
from panoptic.models.jsis_net.semantic_branch import SemanticBranch
from panoptic.models.jsis_net.targets import true_outputs
from panoptic.rcnn.roi_heads import region_class_layers
from panoptic.rcnn.rpn import RegionHead
from panoptic.segmentation import Categories, Frame, Targets


class JSISNet(PanopticModel):
    """A shared backbone, a semantic branch, region proposals and a head.

    Outputs: "semantic" logits [B, C, 2 h, 2 w]; "features" [B, D, h, w], the shared map; "objectness"
    [B, 2 A, h, w] (background, thing of each anchor) and "deltas" [B, 4 A, h, w]. A branch alone has its own only.

    `postprocess` also takes "semantic" of any size up to the canvas, from another model too, and "detections"
    [B, N, 6] (x0 y0 x1 y1 in pixels of the canvas, score, class, `IGNORE` for none), with "masks" [B, N, M, M],
    probabilities, or without, in place of what it would detect.
    """

    truth_needs = MappingProxyType({"masks": ("detections",)})
    class_layers = MappingProxyType(
        {
            **region_class_layers("head."),
            "semantic.classifier": ("classes",),
            "semantic.upsample.deconvolution": ("classes",),
        }
    )
    class_inputs = ("semantic.upsample.deconvolution",)

    def __init__(self, config: JSISNetConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.background = len(categories.things)
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.levels = (config.shared_level,)
        self.backbone = config.backbone.build(self.levels)
        shared, self.stride = self.backbone.channels[config.shared_level], self.backbone.strides[config.shared_level]
        reaches_end = config.branches != "semantic" and config.head.width == 0
        cut_backbone(self.backbone, config.shared_level, head=reaches_end)
        self.semantic = self.regions = self.head = self.semantic_backbone = None
        if config.branches == "both" and config.trunks == "separate":
            self.semantic_backbone = config.backbone.build(self.levels)
            cut_backbone(self.semantic_backbone, config.shared_level, head=False)
        if config.branches != "instances":
            pooling = (config.bins, config.bin_channels, config.norm)
            width, classes = config.semantic_channels, len(categories)
            self.semantic = SemanticBranch(shared, width, classes, config.deconvolution, *pooling)
        if config.branches != "semantic":
            anchors = len(config.regions.cells(1)[0])
            self.regions = RegionHead(shared, config.region_channels, anchors, logits=2)
            last = self.backbone.channels.get("res5", shared)  # a plain ViT has no stage to hand in
            self.head = C4Head(shared, last, self.background, config.head, config.norm)
        set_norm_momentum(self, config.norm_momentum)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes."""
        x, outputs = self.normalised(images, frame), {}
        maps = self.frozen_features(x) if self.given is None else self.given
        features = self._level(maps["shared"], x, self.backbone)
        if self.semantic is not None:
            other = self.semantic_backbone
            apart = features if other is None else self._level(maps["semantic"], x, other)
            outputs["semantic"] = self.semantic(apart)
        if self.regions is not None:
            (objectness,), (deltas,) = self.regions([features])
            outputs |= {"features": features, "objectness": objectness, "deltas": deltas}
        return outputs

    def frozen_features(self, x: Tensor) -> Outputs:
        """The map "shared" that both branches share; of separate backbones also that of the "semantic" branch."""
        maps = {"shared": self._shared(x, self.backbone)}
        if self.semantic_backbone is not None:
            maps["semantic"] = self._shared(x, self.semantic_backbone)
        return maps

    def _level(self, x: Tensor, images: Tensor, backbone: nn.Module) -> Tensor:
        """The shared level, of what `frozen_features` gives of normalised images: a plain ViT's pyramid makes it."""
        if not isinstance(backbone, ViTPyramid):
            return x
        return backbone.from_map({"map": x}, images.shape[-2:])[self.config.shared_level]

    def _shared(self, x: Tensor, backbone: nn.Module) -> Tensor:
        """Normalised images to the map that both branches share; a plain ViT's last one, from which it is made."""
        if isinstance(backbone, ViTPyramid):
            return backbone.frozen_map(x)["map"]
        if self.config.shared_level == "res5" or isinstance(backbone, TimmBackbone):
            return backbone(x)[self.config.shared_level]
        x = backbone.stem(x)  # type: ignore[operator]
        for k in range(1, int(self.config.shared_level[3:])):
            x = backbone.get_submodule(f"layer{k}")(x)
        return x

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """The trained ones of "objectness", "region", "class", "box", "mask", "semantic", "regularisation"."""
        config, branch, terms = self.config, self.instance_branch, {}
        if branch is not None:
            terms |= instance_losses(
                branch,
                outputs,
                targets,
                {
                    "objectness": config.objectness_weight,
                    "region": config.region_weight,
                    "class": config.class_weight,
                    "box": config.box_weight,
                    "mask": config.mask_weight,
                },
                soft_masks=config.soft_masks,
                mask_reduction=config.mask_reduction,
            )
        if self.semantic is not None:
            semantic = semantic_loss(outputs["semantic"], targets, config.align_corners)
            terms["semantic"] = config.semantic_weight * semantic
        if config.regularisation:
            terms["regularisation"] = config.regularisation * losses.squared_kernels(self)
        return terms

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Detections and the semantic branch, merged pixel by pixel as `conflicts` says."""
        config = self.config
        return postprocess(
            outputs,
            frame,
            want,
            self.categories,
            self.instance_branch,
            merged_threshold=config.detection.threshold,
            instance_threshold=config.instance_threshold,
            background_wins=config.background_wins,
            conflicts=config.conflicts,
            mask_side=config.head.mask_side,
            align_corners=config.align_corners,
        )

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The "semantic", "detections" and "masks" of the truth, crowds included; void is the first class of stuff."""
        return true_outputs(targets, self.categories, self.config.head.mask_side)

    @property
    def instance_branch(self) -> InstanceBranch | None:
        """Proposals and head; None where the semantic branch is alone."""
        if self.head is None:
            return None
        config = self.config
        stage = None if config.head.width else self.backbone.get_submodule("layer4")
        return InstanceBranch(self.head, stage, self.stride, self.categories, config.regions, config.detection)
