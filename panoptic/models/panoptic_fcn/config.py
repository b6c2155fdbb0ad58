"""The options of Panoptic FCN, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from panoptic.backbones import Backbone
from panoptic.layers.config import Norm
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

if TYPE_CHECKING:
    from panoptic.models.panoptic_fcn.model import PanopticFCN
    from panoptic.segmentation import Categories


Regions = Literal["with_things", "stuff", "all"]
"""Classes of the region branch: one for all things and then stuff; stuff alone; or every class."""

StuffPositions = Literal["regions", "centres"]
"""Position of a stuff class on a level: all cells that it covers, or one of them, the nearest to their middle."""

Centre = Literal["mass", "box"]
"""Position of a thing's peak: the mean cell of its mask, or the middle of its box."""

LEVELS = ("p3", "p4", "p5", "p6", "p7")
"""Levels of the pyramid on which positions and kernels are found; strides 8 to 128."""

COARSEST = 32
"""Stride of the deepest backbone feature: images are padded to a multiple of it."""


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
    """Peaks score more than this (fast variants: 0.2)."""
    region_threshold: UnitFloat = 0.05
    """Regions of a level score more than this (fast variants: 0.1)."""
    most_kernels: PositiveInt = 100
    """Things that are drawn; a level gives half as many at most."""
    fusion_threshold: UnitFloat = 0.9
    """Kernels of at least this cosine are one."""
    class_aware: bool = True
    """Only kernels of one class are fused."""
    mask_threshold: UnitFloat = 0.4
    """A thing covers the pixels where its probability is higher than this."""
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
        from panoptic.models.panoptic_fcn.targets import region_classes

        if not (len(self.scales) == len(self.pool) == len(LEVELS)):
            raise ValueError(
                f"scales and pool: {len(self.scales)} and {len(self.pool)} entries, but there are {len(LEVELS)} levels"
            )
        if self.backbone.output_stride != COARSEST:
            raise ValueError(f"backbone.output_stride: {self.backbone.output_stride}, but the pyramid needs {COARSEST}")
        if not categories.things or not region_classes(categories, self.regions):
            raise ValueError("regions: Panoptic FCN needs a thing class and a region class; without stuff: with_things")
        from panoptic.models.panoptic_fcn.model import PanopticFCN

        return PanopticFCN(self, categories)
