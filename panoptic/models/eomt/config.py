"""The options of EoMT, which a command line reads without torch; `build` makes the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from panoptic.backbones import Backbone
from panoptic.models.mask_transformer.config import MaskClassificationConfig
from panoptic.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitFloat,
)

if TYPE_CHECKING:
    from panoptic.models.eomt.model import EoMT
    from panoptic.segmentation import Categories


@dataclass(frozen=True, kw_only=True)
class EoMTConfig(MaskClassificationConfig):
    """EoMT; the defaults are those of COCO panoptic with DINOv2-L at 640 pixels."""

    backbone: Backbone = field(default_factory=lambda: Backbone("vit_large_patch14_reg4_dinov2"))
    """The backbone, any plain ViT of timm: vit_{small,base,large,giant}_patch14_reg4_dinov2 (Apache-2.0), or
    vit_{small,base,large}_patch16_dinov3_qkvb (Meta's DINOv3 licence). Its quarters count as res2 to res5."""
    divisor: PositiveInt = 640
    """Batches are padded to a multiple of this, black: the side of the square that the published models always see."""
    canvas: tuple[PositiveInt, PositiveInt] = (640, 640)
    """Height and width for which learned positions are kept; on another canvas they are resampled at every pass."""
    patch: PositiveInt = 16
    """Pixels along a side of a patch; weights for other patches are resampled."""
    width: NonNegativeInt = 0
    """Channels of the backbone; 0 = what its name says."""
    depth: NonNegativeInt = 0
    """Blocks of the backbone; 0 = what its name says."""
    heads: NonNegativeInt = 0
    """Heads of each block, which no file of weights tells; 0 = what the backbone's name says."""
    hidden: NonNegativeInt = 0
    """Rows of the first layer of each block's MLP (gated ones of DINOv2: both halves); 0 = what the name says."""
    rope_rescale: Annotated[float, Interval(ge=1, le=100)] = 2.0
    """In training, coordinates of rotary positions (DINOv3) are stretched or shrunk by up to this factor; 1 = never."""
    queries: PositiveInt = 200
    """The most segments of an image."""
    query_blocks: PositiveInt = 4
    """The last blocks, which the queries pass through (published: 3 in S and B, 4 in L, 5 in g)."""
    masked_attention: bool = True
    """Train with masks of attention, and a prediction before each of query_blocks; else with the last one alone."""
    anneal_starts: tuple[NonNegativeInt, ...] = ()
    """Last step at which the masks of each of query_blocks apply for certain; empty = published: from a sixth of the
    run on, evenly."""
    anneal_ends: tuple[NonNegativeInt, ...] = ()
    """First step without masks of each of query_blocks; empty = published: a sixth of the run after its start."""
    anneal_power: NonNegativeFloat = 0.9
    """Exponent of the fall of the masks' probability from a block's start to its end."""
    class_weight: NonNegativeFloat = 2.0
    """Factor of the class loss and cost."""
    mask_weight: NonNegativeFloat = 5.0
    """Factor of the cross-entropy of masks, loss and cost."""
    dice_weight: NonNegativeFloat = 5.0
    """Factor of the dice loss and cost."""
    loss_points: PositiveInt = 12544
    """Points at which masks are compared, for the cost and, others, for each matched mask."""
    oversample: Annotated[float, Interval(ge=1, le=1000)] = 3.0
    """Candidates drawn for each point of a matched mask."""
    importance: UnitFloat = 0.75
    """Share of the points of a matched mask that are the least certain candidates; the others are uniform."""
    inside: bool = True
    """A merged query paints only where its own mask is at least 1/2."""

    def build(self, categories: Categories) -> EoMT:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: an option is out of its range or does not fit another; the message names it.
        """
        from panoptic.models.eomt.model import EoMT

        return EoMT(self, categories)
