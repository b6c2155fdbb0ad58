"""The options of two-stage detection; its modules read them, and a command line without any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from panoptic.ranges import (
    NOT_EMPTY,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
)

if TYPE_CHECKING:
    from torch import Tensor

    from panoptic.segmentation import Categories

COARSEST = 32
"""Stride of the backbone's last feature under a pyramid; the canvas is padded to a multiple of it."""

CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16
"""A region of this side (ImageNet's) is pooled at this stride (Lin et al., "Feature Pyramid Networks", equation 1)."""


@dataclass(frozen=True)
class Regions:
    """Anchors, how they learn, and which become proposals."""

    sizes: Annotated[tuple[PositiveFloat, ...], NOT_EMPTY] = (32, 64, 128, 256, 512)
    """Side of the square of an anchor's area, in pixels: shared out over the levels, fine to coarse."""
    ratios: Annotated[tuple[PositiveFloat, ...], NOT_EMPTY] = (0.5, 1.0, 2.0)
    """Height over width, each at each size."""
    offset: UnitFloat = 0.0
    """Offset of an anchor's centre within its cell, in strides."""
    negative: UnitFloat = 0.3
    """Anchors that overlap every thing by less are background."""
    positive: UnitFloat = 0.7
    """Anchors that overlap a thing by this much or more are positive."""
    low_quality: bool = True
    """The anchors that overlap a thing most are positive, however little they do."""
    low_quality_overlap: UnitFloat = 0.0
    """Overlap with the thing that such an anchor has at least (mmdetection: 0.3)."""
    rounded: bool = False
    """Anchors have whole pixels as corners (mmdetection), where the first cell's are rounded, half to even."""
    inside: bool = False
    """Anchors that reach beyond their image take no part in the losses (mmdetection)."""
    samples: PositiveInt = 256
    """Anchors of an image that the losses see."""
    positive_fraction: UnitFloat = 0.5
    """Share of the sampled anchors that may be positive."""
    beta: NonNegativeFloat = 0.0
    """Difference below which the box loss is a parabola; 0 is L1."""
    divide: Literal["samples", "sampled", "batch"] = "samples"
    """Losses are divided by `samples`, in each image by the anchors that there were to sample, or by the sum of these
    over the batch, where an image without a positive or negative one counts as if it had one (mmdetection)."""
    nms: UnitFloat = 0.7
    """Overlap of two proposals of a level above which only the better one stays."""
    train_before: PositiveInt = 2000
    """Best boxes of each level that enter the suppression, in training."""
    train_after: PositiveInt = 1000
    """Best boxes of an image that leave the suppression, in training."""
    test_before: PositiveInt = 1000
    """Best boxes of each level that enter the suppression, at test time."""
    test_after: PositiveInt = 1000
    """Best boxes of an image that leave the suppression, at test time."""
    least_side: NonNegativeFloat = 0.0
    """Width and height of a proposal are above this, in pixels."""

    def cells(self, levels: int) -> list[Tensor]:
        """float32 [K, 4] of each level.

        Raises:
            ValueError: the sizes cannot be shared out evenly.
        """
        from panoptic.rcnn.boxes import cell_anchors

        if not self.sizes or len(self.sizes) % levels:
            raise ValueError(f"regions.sizes: {len(self.sizes)} sizes cannot be shared out over {levels} levels evenly")
        each = len(self.sizes) // levels
        return [cell_anchors(self.sizes[k * each : (k + 1) * each], self.ratios) for k in range(levels)]


@dataclass(frozen=True)
class Detection:
    """Choice of the regions that the heads learn from, and of the detections among them."""

    samples: PositiveInt = 512
    """Regions of an image that the heads learn from."""
    positive_fraction: UnitFloat = 0.25
    """Share of the sampled regions that may hold a thing."""
    overlap: UnitFloat = 0.5
    """Least overlap of a region with the thing that it holds."""
    append_truth: bool = True
    """The true boxes are regions too, in training."""
    code: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (10.0, 10.0, 5.0, 5.0)
    """Factors of dx, dy, dw and dh in the code."""
    beta: NonNegativeFloat = 0.0
    """Difference below which the box loss is a parabola; 0 is L1."""
    threshold: UnitFloat = 0.05
    """Detections score more than this, at test time."""
    nms: UnitFloat = 0.5
    """Overlap of two detections of a class above which only the better one stays."""
    most: PositiveInt = 100
    """Detections of an image."""


@dataclass(frozen=True)
class Heads:
    """Sizes of the three heads."""

    box_side: PositiveInt = 7
    """Side of the features that the box head sees."""
    box_width: PositiveInt = 1024
    """Hidden channels of the box head."""
    mask_side: PositiveInt = 14
    """Side of the features that the mask head sees; masks have twice that."""
    mask_width: PositiveInt = 256
    """Channels of the mask head."""
    mask_layers: LayerCount = 4
    """3x3 convolutions of the mask head."""
    cell_samples: NonNegativeInt = 0
    """Points that RoIAlign takes along a side of each cell; 0 = as many as the region's size asks for."""
    aligned: bool = True
    """RoIAlign's pixel centres lie half a pixel behind the coordinate; mmdetection 1 left that out."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of box and mask head: they run outside of `network` and so outside of the engine's autocast."""


@dataclass(frozen=True)
class DetectorConfig:
    """Mask R-CNN; the defaults are detectron2's."""

    regions: Regions = field(default_factory=Regions)
    """Anchors, how they learn, and which become proposals."""
    detection: Detection = field(default_factory=Detection)
    """Choice of the proposals that the heads learn from, and of those that become detections."""
    heads: Heads = field(default_factory=Heads)
    """Sizes and precision of the heads."""


def check_pyramid(architecture: str, categories: Categories, divisor: int, output_stride: int) -> None:
    """Refuse what a detector on a pyramid of doubling strides cannot be built for.

    Args:
        architecture: its name, for the message.
        categories: of which some must be things.
        divisor: of the canvas.
        output_stride: of the backbone's last feature.

    Raises:
        ValueError: there is no thing to detect, or an option does not fit the pyramid; names it.
    """
    if not categories.things:
        raise ValueError(f"categories: there is no thing class to detect; {architecture} needs one")
    if divisor % COARSEST:
        raise ValueError(f"divisor: {divisor} is no multiple of {COARSEST}, the stride of the backbone")
    if output_stride != COARSEST:
        raise ValueError(
            f"backbone.output_stride: {output_stride}; the levels of the pyramid double in stride, "
            f"so it must be {COARSEST}"
        )
