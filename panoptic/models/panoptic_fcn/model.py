"""Panoptic FCN, plain and starred (Li et al., "Fully Convolutional Networks for Panoptic Segmentation", 2012.00720).

Things and stuff are drawn alike: a position head marks centres of things and regions of stuff on each level of
a pyramid, a kernel head gives a kernel for each of them, and a kernel is a 1x1 convolution on one encoded
stride-4 feature map. Kernels that are alike are fused, so an instance that two levels find is drawn once.
The starred variant encodes with 256 channels and deformable convolutions.

Kept as published (dvlab-research/PanopticFCN, on detectron2), though odd:
- the mean of RGB channels is subtracted from BGR images (`bgr` with an RGB-ordered `pixel_mean`), scale 1;
- scores are averaged with their window's mean, in which cells beyond the border count as 0;
- the size ranges of levels include both ends, so a thing of 64 pixels is on three levels;
- the kernel of a stuff region is a mean over the whole map, not over the region (`stuff_kernel` chooses);
- the first coordinate channel is the vertical one; both are of the padded feature map;
- the bias of -2.19 is on the region maps too; offsets of deformable convolutions start from random weights;
- the Gaussian's radius is divided by 2 and not by 2a (CornerNet's first formula);
- losses are divided by this worker's own counts.

Deviations: batches of any size are merged image by image (the reference is right for 1 only); no thing, no stuff
or nothing at all are maps as well (it crashes without stuff); of more than `most_things` things on a level the
largest stay (it raises an error); a level of fewer than `points` cells uses what it has (it raises an error);
a thing that leaves no trace at stride 4 has its peak in the middle of its box (there in the image's corner);
ground-truth things come from the panoptic map and so never overlap.

The truth stands for positions, classes and masks, in this order: a class needs a position, a mask a class. With all
three PQ is 100 but for stuff that covers half of no cell of any level and for things beyond `scales` or `most_things`;
without the masks these are the network's, so PQ has no bound but 0.

Shapes: B images, H x W canvas, h x w a level, y x x the cells of stride 4, T thing and R region classes, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.layers.fpn import FPN, SemanticFPN
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.resize import resize, size_of
from panoptic.models.base import Outputs, PanopticModel, Prediction, Row, Wanted
from panoptic.models.panoptic_fcn.config import COARSEST, LEVELS, PanopticFCNConfig
from panoptic.models.panoptic_fcn.conv_stack import ConvStack, predictor
from panoptic.models.panoptic_fcn.kernel_fusion import fuse, fuse_classes, similar
from panoptic.models.panoptic_fcn.kernel_generator import (
    RegionKernels,
    ThingKernels,
    collect_regions,
    collect_things,
    embedded,
    image_levels,
)
from panoptic.models.panoptic_fcn.loss import weighted_losses
from panoptic.models.panoptic_fcn.postprocess import postprocess
from panoptic.models.panoptic_fcn.targets import (
    KernelTargets,
    kernel_targets,
    region_classes,
    true_outputs,
)
from panoptic.segmentation import IGNORE, Categories, Frame, Targets

BIAS = -2.19
"""The bias of both position predictors: a probability of 0.1 before anything is learnt."""


class PanopticFCN(PanopticModel):
    """Backbone, pyramid, position head, kernel head, feature encoder.

    Outputs: "encoded" [B, C, y, x] at stride 4, and of each level "things_p3" logits [B, T, h, w], "regions_p3" logits
    [B, R, h, w] and "kernels_p3" [B, C, h, w], up to "p7". `postprocess` also takes what `truth` gives.
    """

    truth_needs = MappingProxyType({"class": ("position",), "mask": ("class",)})
    class_layers = MappingProxyType({"thing_head": ("things",)})

    def __init__(self, config: PanopticFCNConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.regions = region_classes(categories, config.regions)
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std, config.bgr)
        self.backbone = config.backbone.build()
        self.pyramid = FPN(self.backbone.channels, config.width, top="convolutions")
        semantic = config.feature == "semantic_fpn"
        self.semantic = SemanticFPN(config.width, config.feature_channels, config.norm) if semantic else None
        channels = config.head_channels
        heads = partial(ConvStack, config.width, channels, config.head_convs, norm=config.norm)
        self.position_tower = heads(deform=config.position_deform, coordinates=config.position_coordinates)
        self.thing_head = predictor(channels, len(categories.things), 3, BIAS)
        self.region_head = predictor(channels, len(self.regions), 3, BIAS)
        self.kernel_tower = heads(deform=config.kernel_deform, coordinates=config.kernel_coordinates)
        self.kernel_head = predictor(channels, channels, 3)
        self.encoder = ConvStack(
            config.feature_channels if semantic else config.width,
            config.encoder_channels,
            config.encoder_convs,
            norm=config.norm if config.encoder_norm else None,
            deform=config.encoder_deform,
            coordinates=config.encoder_coordinates,
        )
        self.thing_embed = predictor(channels, config.encoder_channels, 1)
        self.stuff_embed = predictor(channels, config.encoder_channels, 1)

    def normalised(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 [B, 3, H, W] as the backbone takes them, the canvas padded to whole cells."""
        x = self.pixels(images, frame)
        return F.pad(x, (0, -x.shape[-1] % COARSEST, 0, -x.shape[-2] % COARSEST))

    def class_rows(self, weights: Mapping[str, Tensor]) -> dict[str, list[Row]]:
        """The rows of the layers in `class_layers`, and of the region head."""
        regions: list[Row] = [("all things" if label == IGNORE else label, 0) for label in self.regions]
        return {**super().class_rows(weights), "region_head": regions}

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes."""
        levels = self.pyramid(self.features(self.normalised(images, frame)))
        outputs = {"encoded": self.encoder(self._high_resolution(levels))}
        for level in LEVELS:
            position = self.position_tower(levels[level])
            outputs[f"things_{level}"] = self.thing_head(position)
            outputs[f"regions_{level}"] = self.region_head(position)
            outputs[f"kernels_{level}"] = self.kernel_head(self.kernel_tower(levels[level]))
        return outputs

    def _high_resolution(self, levels: dict[str, Tensor]) -> Tensor:
        """The stride-4 feature that enters the encoder."""
        if self.semantic is not None:
            return self.semantic(levels)
        finest = levels["p2"]
        if self.config.feature == "p2":
            return finest
        size = (finest.shape[-2], finest.shape[-1])
        return finest + sum(resize(levels[level], size, False) for level in ("p3", "p4", "p5"))

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "thing_position", "stuff_position", "thing_mask" and "stuff_mask"."""
        config = self.config
        return weighted_losses(
            outputs,
            self._targets(outputs, targets),
            self.thing_embed,
            self.stuff_embed,
            alpha=config.alpha,
            gamma=config.gamma,
            points=config.points,
            own_cells=config.stuff_kernel == "region",
            centres=config.stuff_positions == "centres",
            position_weight=config.position_weight,
            mask_weight=config.mask_weight,
        )

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Kernels of all levels, fused, and what they draw, merged as `merge` says."""
        config, images = self.config, range(len(frame.sizes))
        return postprocess(
            ((self._thing_kernels(outputs, b), self._region_kernels(outputs, b)) for b in images),
            outputs,
            frame,
            want,
            self.categories,
            self.regions,
            mask_threshold=config.mask_threshold,
            lowest_score=config.lowest_score,
            most_kernels=config.most_kernels,
            merged_score=config.merged_score,
            most_overlap=config.most_overlap,
            stuff_area=config.stuff_area,
            argmax=config.merge == "argmax",
        )

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """Positions of things and regions, their classes, and their masks.

        "position.things" int64 [B, 5, M], the cell of each true thing on each level, -1 where it is not on that level;
        "position.p3" float [B, R, h, w] to "p7", the share of each cell that each region covers; "class" int64 [B, M],
        the class of each thing among the T; "mask" int64 [B, H, W], k + 1 on thing k, -1 - r on region r, 0 on void.
        With true positions kernels are fused by the thing that they belong to, and every score is 1 until its mask is
        evaluated.
        """
        truth, config = self._targets(outputs, targets), self.config
        return true_outputs(targets, self.categories, config.regions, truth, config.stuff_positions)

    def _targets(self, outputs: Outputs, targets: Targets) -> KernelTargets:
        config = self.config
        return kernel_targets(
            targets,
            self.categories,
            cells=size_of(outputs["encoded"]),
            shapes=[size_of(outputs[f"kernels_{level}"]) for level in LEVELS],
            scales=config.scales,
            regions=config.regions,
            stuff_positions=config.stuff_positions,
            centre=config.centre,
            overlap=config.overlap,
            most=config.most_things,
        )

    def _thing_kernels(self, outputs: Outputs, b: int) -> ThingKernels:
        """The fused kernels of the things of image b, with contiguous classes."""
        config, true = self.config, outputs.get("position.things")
        kernels, labels, scores, owners = collect_things(
            image_levels(outputs, b),
            config.pool,
            config.thing_threshold,
            config.most_kernels // 2,
            None if true is None else true[b],
        )
        kernels = embedded(self.thing_embed, kernels)
        if true is None:
            groups = similar(kernels, labels, config.fusion_threshold, config.class_aware)
        else:  # one kernel a true thing, and no doubt about it
            groups, scores = owners[:, None] == owners, torch.ones_like(scores)
        if "class" in outputs:
            labels = outputs["class"][b, owners]
        kernels, kept = fuse(kernels, groups)
        things = torch.tensor(self.categories.things, dtype=torch.int64, device=labels.device)
        return ThingKernels(kernels, things[labels[kept]], scores[kept], owners[kept])

    def _region_kernels(self, outputs: Outputs, b: int) -> RegionKernels:
        """The fused kernels of the regions of image b, by ascending region class."""
        config = self.config
        kernels, regions, scores = collect_regions(
            image_levels(outputs, b),
            config.region_threshold,
            [outputs[f"position.{level}"][b] for level in LEVELS] if "position.things" in outputs else None,
            known="class" in outputs,
            own_cells=config.stuff_kernel == "region",
            centres=config.stuff_positions == "centres",
        )
        return RegionKernels(*fuse_classes(embedded(self.stuff_embed, kernels), regions, scores))
