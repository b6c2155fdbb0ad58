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
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.layers.fpn import FPN, SemanticFPN
from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import Norm
from panoptic.layers.resize import resize
from panoptic.models.base import Outputs, PanopticModel, Prediction, Row, Wanted
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
    LEVELS,
    Centre,
    KernelTargets,
    Regions,
    StuffPositions,
    kernel_targets,
    region_classes,
    true_outputs,
)
from panoptic.ranges import (
    FiniteFloat,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    OddInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
)
from panoptic.segmentation import IGNORE, Categories, Frame, Targets

STRIDE = 32
"""Stride of the deepest backbone feature: images are padded to a multiple of it."""

BIAS = -2.19
"""The bias of both position predictors: a probability of 0.1 before anything is learnt."""


@dataclass(frozen=True)
class PanopticFCNConfig:
    """Panoptic FCN; the defaults are the published ResNet-50 for COCO."""

    backbone: Backbone = field(default_factory=lambda: Backbone(stride_in_1x1=True, norm="frozen", freeze=2))
    """The network that the features come from."""
    divisor: PositiveInt = 32
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    """Divides the pixels, scale 0..255."""
    bgr: bool = True
    """Channels enter as blue, green, red; mean and std are applied in that order, as they stand."""
    width: PositiveInt = 256
    """Channels of the pyramid."""
    norm: Norm = "group"
    """Normalisation in the heads and the semantic branch (the backbone has its own, the pyramid and encoder none)."""
    feature: Literal["semantic_fpn", "p2", "summed"] = "semantic_fpn"
    """The high-resolution feature: the semantic branch, p2 alone, or p2 to p5 resized and added."""
    feature_channels: PositiveInt = 256
    """Width of the semantic branch."""
    head_convs: LayerCount = 3
    """Convolutions in the position head and in the kernel head, before their predictors."""
    head_channels: PositiveInt = 256
    """Width of both heads."""
    position_deform: bool = True
    """Modulated deformable convolutions in the position head."""
    position_coordinates: bool = False
    """Two coordinate channels enter the position head."""
    kernel_deform: bool = False
    """Modulated deformable convolutions in the kernel head."""
    kernel_coordinates: bool = True
    """Two coordinate channels enter the kernel head."""
    encoder_convs: LayerCount = 3
    """Convolutions of the feature encoder."""
    encoder_channels: PositiveInt = 64
    """Width of the encoder and size of the kernels that draw (starred: 256)."""
    encoder_deform: bool = False
    """Modulated deformable convolutions in the encoder (starred: True)."""
    encoder_coordinates: bool = True
    """Two coordinate channels enter the encoder."""
    encoder_norm: bool = False
    """Normalise in the encoder too."""
    regions: Regions = "with_things"
    """Region classes: one for all things and then stuff; stuff alone; or all classes (published for Cityscapes)."""
    stuff_kernel: Literal["map", "region"] = "map"
    """A region's kernel is a mean over the whole map (published), or over its own cells, which learns far sooner."""
    stuff_positions: StuffPositions = "regions"
    """regions: stuff is all of its cells (published); centres: stuff is one peak a level, as things are, at the covered
    cell nearest to its middle, and its kernel is the one there (the "more unified localization branch" that the slides
    name as future work)."""
    centre: Centre = "mass"
    """A thing's peak is at the centre of mass of its mask, or of its box."""
    scales: tuple[tuple[NonNegativeInt, PositiveInt], ...] = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    """Smallest and largest square root of a box's area, in pixels, of the things of each level."""
    most_things: PositiveInt = 100
    """Things of an image that a level trains on, the largest ones; bounds the memory."""
    overlap: UnitFloat = 0.7
    """Least IoU of a box shifted by the radius of its Gaussian."""
    points: NonNegativeInt = 7
    """Kernels that the weighted dice loss takes a thing; 0 = not weighted, the one at its centre."""
    alpha: UnitFloat = 0.25
    """Weight of positives in the focal loss."""
    gamma: NonNegativeFloat = 2.0
    """Exponent of the focal loss."""
    position_weight: NonNegativeFloat = 1.0
    """Factor of both position losses."""
    mask_weight: NonNegativeFloat = 3.0
    """Factor of both mask losses (Cityscapes: 4)."""
    pool: tuple[OddInt, ...] = (3, 3, 3, 5, 5)
    """Side of the window that each level's scores are averaged over."""
    thing_threshold: UnitFloat = 0.05
    """Peaks score strictly more (fast variants: 0.2)."""
    region_threshold: UnitFloat = 0.05
    """Regions of a level score strictly more (fast variants: 0.1)."""
    most_kernels: PositiveInt = 100
    """Things that are drawn; a level gives half as many at most."""
    fusion_threshold: UnitFloat = 0.9
    """Kernels of at least this cosine are one."""
    class_aware: bool = True
    """Only kernels of one class are fused."""
    mask_threshold: UnitFloat = 0.4
    """A thing is where its probability is strictly higher."""
    lowest_score: UnitFloat = 0.05
    """Instances score at least this once their masks are evaluated."""
    merged_score: UnitFloat = 0.2
    """Things in the panoptic map score at least this."""
    most_overlap: UnitFloat = 0.5
    """Things of which a larger share is taken already are dropped."""
    stuff_area: NonNegativeInt = 4096
    """Stuff of fewer pixels becomes void."""
    merge: Literal["greedy", "argmax"] = "greedy"
    """greedy: things by score, each on what is free, then stuff (published); argmax: each pixel goes to the thing or
    stuff whose mask is the most probable there, without order or --model.most-overlap (the simpler generation that the
    slides name as future work: it "brings 1.4% PQ drop")."""

    def build(self, categories: Categories) -> PanopticFCN:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other; the message names them.
        """
        if not (len(self.scales) == len(self.pool) == len(LEVELS)):
            raise ValueError(
                f"scales and pool: {len(self.scales)} and {len(self.pool)} entries, but there are {len(LEVELS)} levels"
            )
        if self.backbone.output_stride != STRIDE:
            raise ValueError(f"backbone.output_stride: {self.backbone.output_stride}, but the pyramid needs {STRIDE}")
        if not categories.things or not region_classes(categories, self.regions):
            raise ValueError("regions: Panoptic FCN needs a thing class and a region class; without stuff: with_things")
        return PanopticFCN(self, categories)


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
        return F.pad(x, (0, -x.shape[-1] % STRIDE, 0, -x.shape[-2] % STRIDE))

    def class_rows(self, weights: Mapping[str, Tensor]) -> dict[str, list[Row]]:
        """The base class's, and the region head's classes."""
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
            cells=_size(outputs["encoded"]),
            shapes=[_size(outputs[f"kernels_{level}"]) for level in LEVELS],
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


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
