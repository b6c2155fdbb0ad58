"""The options of Panoptic-DeepLab, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from panoptic.backbones import Backbone
from panoptic.layers.config import Norm
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

if TYPE_CHECKING:
    from panoptic.models.panoptic_deeplab.model import PanopticDeepLab
    from panoptic.segmentation import Categories


Score = Literal["semantic", "instance", "both"]
"""Score of an instance: its mean class probability, the heatmap at its centroid, or their product."""


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
    """Depthwise-separable convolutions in the centre head, too (detectron2: always plain)."""
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
    """Weight of the pixels of things below small_area; all others weigh 1."""
    ignore_crowd: bool = False
    """Crowds are void in the semantic loss."""
    stuff_offsets: bool = False
    """Stuff counts in the offset loss, with target 0."""
    threshold: UnitFloat = 0.1
    """Centres score more than this."""
    nms_kernel: OddInt = 7
    """Side of the window in which a centre is the maximum, pixels (COCO: 41)."""
    top_k: PositiveInt | None = 200
    """If there are this many centres or more, those strictly above the score of the top_k-th stay; None keeps all."""
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
        from panoptic.models.panoptic_deeplab.model import PanopticDeepLab

        return PanopticDeepLab(self, categories)
