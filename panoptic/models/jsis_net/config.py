"""The options of JSIS-Net, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from panoptic.backbones import Backbone
from panoptic.layers.config import Norm
from panoptic.ranges import (
    NOT_EMPTY,
    FiniteFloat,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
)
from panoptic.rcnn.config import Detection, Regions

if TYPE_CHECKING:
    from panoptic.models.jsis_net.model import JSISNet
    from panoptic.segmentation import Categories


Deconvolution = Literal["double", "same", "none"]
"""The transposed convolution of `HybridUpsampling`."""


@dataclass(frozen=True)
class StageOptions:
    """Sizes and layers of a head made of a residual stage."""

    width: NonNegativeInt = 0
    """Width of the bottlenecks of a new stage, which gives 4 times as many channels; 0 = the ResNet's last stage."""
    blocks: LayerCount = 3
    """Bottlenecks of the new stage."""
    pooling: Literal["align", "crop"] = "align"
    """Aligned RoIAlign with adaptive sampling, or TensorFlow's crop_and_resize, one sample a place."""
    side: PositiveInt = 7
    """S: height and width of a region's features, which are sampled at twice this side."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The head runs outside of `network`, and so outside of the engine's autocast."""
    mask_channels: PositiveInt = 256
    """Width of the mask layers."""
    mask_side: PositiveInt = 28
    """M: height and width of an instance's predicted mask, in cells."""
    mask_upsampling: Literal["bilinear", "deconvolution"] = "bilinear"
    """Bilinear to M between two 3x3, corners aligned; or two transposed 2x2 of stride 2 instead of those."""
    across_classes: bool = True
    """Instances of different classes suppress each other too."""


@dataclass(frozen=True)
class Conflicts:
    """Rules by which instances and semantics are merged."""

    mask_threshold: UnitFloat = 0.5
    """An instance claims the pixels where its probability is at least this."""
    stuff_area: NonNegativeInt = 4096
    """Stuff of fewer pixels is replaced by other stuff."""
    stuff_share: UnitFloat = 0.0
    """Instead of stuff_area: stuff of this share of the image or less is replaced (the successor: 1/2048); 0 = off."""
    stuff_threshold: UnitFloat = 0.0
    """Pixels whose best stuff is not more probable than this become void (the successor: 0.25); 0 = none do."""
    count_after_things: bool = False
    """Stuff is counted where no instance covers it."""


REGIONS = Regions(
    negative=0.1,
    positive=0.5,
    low_quality=False,
    beta=1.0,
    divide="sampled",
    nms=0.5,
    train_before=6000,
    test_before=6000,
)
"""Region proposals as the authors' next network has them, with Mask R-CNN's anchors."""

DETECTION = Detection(samples=64, append_truth=False, beta=1.0, threshold=0.5, nms=0.4)
"""Regions and instances as the authors' next network has them."""


@dataclass(frozen=True)
class JSISNetConfig:
    """JSIS-Net: a semantic and an instance branch on one ResNet, or either of them alone."""

    backbone: Backbone = field(default_factory=Backbone)
    """The network that the features come from."""
    branches: Literal["both", "semantic", "instances"] = "both"
    """The branches that are trained: both, or one of them as in the paper's table 3."""
    trunks: Literal["shared", "separate"] = "shared"
    """separate: each branch has a backbone of its own, to merge two models that were trained apart (table 3 again)."""
    divisor: PositiveInt = 16
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    bgr: bool = False
    """Channels enter as blue, green, red; mean and std are then in that order."""
    norm: Norm = "batch"
    """Normalisation in the semantic branch, the mask layers and a stage of the head's own."""
    norm_momentum: PositiveUnitFloat = 0.1
    """Weight of the newest batch in running statistics, everywhere."""
    shared_level: Literal["res3", "res4", "res5"] = "res4"
    """The feature that both branches share."""
    bins: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (1, 2, 3, 6)
    """Cells a side of each average of the pyramid pooling."""
    bin_channels: NonNegativeInt = 0
    """Channels of each average; 0 = the shared map's, shared out."""
    semantic_channels: PositiveInt = 512
    """Width of the semantic branch behind the pyramid pooling."""
    deconvolution: Deconvolution = "double"
    """First step of the hybrid upsampling: 4x4 of stride 2, 3x3 of stride 1, or none."""
    align_corners: bool = False
    """Corners are aligned in the second, bilinear step of the hybrid upsampling."""
    regions: Regions = field(default_factory=lambda: REGIONS)
    """Anchors, how they learn, and which become proposals."""
    region_channels: PositiveInt = 512
    """Width of the region proposal network."""
    detection: Detection = field(default_factory=lambda: DETECTION)
    """Choice of the regions that the head learns from, and of the instances among them."""
    head: StageOptions = field(default_factory=StageOptions)
    """The head that looks into regions."""
    soft_masks: bool = True
    """Mask targets are the covered shares of the cells; else those of at least 1/2 count as 1, the others as 0."""
    mask_reduction: Literal["sum", "mean"] = "sum"
    """The mask loss is a sum or a mean over the images of a batch."""
    objectness_weight: NonNegativeFloat = 1.0
    """Factor of the objectness loss."""
    region_weight: NonNegativeFloat = 1.0
    """Factor of the loss of the proposals' boxes."""
    class_weight: NonNegativeFloat = 1.0
    """Factor of the loss of the regions' classes."""
    box_weight: NonNegativeFloat = 0.15
    """Factor of the loss of the regions' boxes."""
    mask_weight: NonNegativeFloat = 0.3
    """Factor of the mask loss."""
    semantic_weight: NonNegativeFloat = 1.0
    """Factor of the semantic loss."""
    regularisation: NonNegativeFloat = 5.5e-5
    """Factor of half the sum of the squared kernels; 0 leaves it to optim.weight_decay."""
    background_wins: bool = True
    """A region whose background is more probable than every thing is no instance (not for AP)."""
    conflicts: Conflicts = field(default_factory=Conflicts)
    """Rules by which instances and semantics are merged."""
    instance_threshold: UnitFloat = 0.05
    """Instances for AP score more than this (in the merged map: detection.threshold)."""

    def build(self, categories: Categories) -> JSISNet:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other or the categories; the message names them.
        """
        if self.branches != "semantic" and not categories.things:
            raise ValueError("branches: there is no thing class among the categories; train `semantic` alone")
        if self.branches != "semantic" and self.head.width == 0 and self.shared_level != "res4":
            raise ValueError(
                f"shared_level: the ResNet's last stage follows res4, not {self.shared_level}; give head.width a width"
            )
        from panoptic.models.jsis_net.model import JSISNet

        return JSISNet(self, categories)
