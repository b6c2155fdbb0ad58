"""Options of augmentation and of resizing for evaluation, and the policies of the references.

`views` composes the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from panoptic.ranges import (
    NOT_EMPTY,
    ByteInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    Side,
    SideOrZero,
    UnitFloat,
)

SizeRule = Literal["detectron2", "half_even", "detr", "huggingface", "huggingface32"]
"""The rule by which a short side with a capped long one becomes whole pixels; see `short_side_size`."""

Colour004 = Literal["brightness", "saturation", "contrast", "quality"]
"""Kinds of operations from which colour004 draws."""

PIXEL_MEAN = (123, 116, 103)
"""The mean colour of ImageNet, int(255 * mean), RGB: it becomes about 0 once an image is normalised."""


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images: scale, padding, crop, colours and flip."""

    fit: tuple[SideOrZero, SideOrZero] = (0, 0)
    """First shrink or upsample to this (short, long) side, rounded to 32k + 1 (641 641 for COCO); 0 0 = off."""
    size: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Instead of --augment.fit: to this height and width, whatever the shape of the image (JSIS-Net); 0 0 = off."""
    scale: Literal["none", "factor", "short", "jitter", "ratio"] = "none"
    """Random scale: a factor from --augment.factors; a short side from --augment.sides up to --augment.longest; jitter
    or ratio: as large as fits a factor times --augment.target."""
    factors: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 2.0, 0.1)
    """Smallest factor, largest factor, step; all equally likely (jitter and ratio: any between)."""
    sides: Annotated[tuple[Side, ...], NOT_EMPTY] = (320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
    """Short sides in pixels, all equally likely; a single one only resizes."""
    longest: PositiveInt = 4096
    """The long side never exceeds this many pixels (scale short)."""
    rule: SizeRule = "detectron2"
    """Rounding of such sizes: that of detectron2, half_even (EoMT), detr, huggingface, or huggingface32 (both sides
    multiples of 32)."""
    target: tuple[Side, Side] = (1024, 1024)
    """Height and width (jitter: large-scale jitter), or short and long side (ratio: mmdetection)."""
    truncate: bool = False
    """Sides after jitter are cut to whole pixels (torchvision, EoMT) instead of rounded (detectron2)."""
    early_crop: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Smallest and largest side of a crop taken before the scale, at --augment.early-sides (DETR: 384 600); 0 0 is
    off."""
    early_sides: Annotated[tuple[Side, ...], NOT_EMPTY] = (400, 500, 600)
    """Short sides, all equally likely, to which the image is scaled for it."""
    early_chance: UnitFloat = 0.5
    """Probability of that crop."""
    crop: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Height and width of a random crop, odd sizes too; 0 = the whole side."""
    crop_corner: Literal["free", "diagonal"] = "free"
    """free: any corner; diagonal: the same share of what is left over on both axes (large-scale jitter)."""
    crop_share: PositiveUnitFloat = 1.0
    """Largest share of a crop's labelled pixels that one class may fill, in at most ten tries; 1 = any."""
    pad: Literal["none", "random", "end"] = "random"
    """An image smaller than the crop is padded to it: on random sides, at the bottom and right, or not at all."""
    pad_value: tuple[ByteInt, ByteInt, ByteInt] = PIXEL_MEAN
    """Colour (RGB) of that padding; its label is void."""
    rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0
    """Largest angle in degrees by which an image is turned about its middle, either way and all equally likely, before
    everything else. What comes in at its corners has --augment.pad-value and is void. 0 = off."""
    flip: UnitFloat = 0.5
    """Probability of a horizontal flip."""
    flip_first: bool = False
    """Flip before everything else, so that padding keeps its side (large-scale jitter)."""
    colour: Literal["none", "ssd", "colour004", "eomt"] = "none"
    """none; SSD's brightness, contrast, saturation and hue, each at probability 1/2; one to four of
    --augment.colour-operations at probability --augment.colour-chance; or SSD's as EoMT does them, by torchvision on
    the whole image before it is scaled."""
    colour_chance: UnitFloat = 0.5
    """Probability that colour004 changes an image at all."""
    colour_operations: Annotated[tuple[Colour004, ...], NOT_EMPTY] = ("brightness", "saturation", "contrast", "quality")
    """Operations from which colour004 draws; quality is JPEG, blur, shrinking and upsampling, or noise."""
    colour_strength: NonNegativeFloat = 1.0
    """Factor on how far colour004's values lie from those that change nothing."""
    doubled: bool = False
    """Twice the data set: each image as it is and once more with colours changed, always in the same way ("offline").
    Compare such runs by steps, not epochs."""
    antialias: bool = False
    """Average source pixels when shrinking instead of sampling bilinearly."""
    copies: NonNegativeInt = 0
    """Augmented copies of each training image that are written into the shards; training then augments them no second
    time. 0 = none: every image is augmented while training."""
    originals: bool = True
    """The images themselves stay beside their --augment.copies; else the copies take their place."""
    stored: Literal["raw", "png", "jpeg"] = "raw"
    """Form of the pixels of --augment.copies: raw (no decoding at all, 3 bytes a pixel), png (smaller, slow to decode),
    or jpeg of quality 95 (a few grey levels aside)."""

    def __post_init__(self) -> None:
        low, high, _ = self.factors
        if low > high:
            raise ValueError(f"augment.factors {self.factors}: the smallest factor is above the largest")
        for name in ("fit", "size"):
            _check_both("augment", name, getattr(self, name))
        self._check_crops()
        if self.doubled and self.colour == "none":
            raise ValueError("augment.doubled: the second copy has other colours, so augment.colour must not be none")
        if self.doubled and self.copies:
            raise ValueError("augment.doubled: cannot be combined with augment.copies, which are more than it does")

    def _check_crops(self) -> None:
        low, high = self.early_crop
        _check_both("augment", "early_crop", self.early_crop)
        if low > high:
            raise ValueError(f"augment.early_crop {self.early_crop}: the smallest side is above the largest")
        if high and any(self.crop):
            raise ValueError("augment.early_crop: cannot be combined with augment.crop; set one of them to 0 0")


@dataclass(frozen=True)
class Resize:
    """Resizing of evaluation images. Their truth is kept at the source's size besides."""

    short: SideOrZero = 0
    """Short side in pixels; 0 keeps the source's size."""
    longest: PositiveInt = 4096
    """The long side never exceeds this many pixels."""
    rule: SizeRule = "detectron2"
    """Rounding of such sizes: that of detectron2, half_even (EoMT), detr, huggingface, or huggingface32 (both sides
    multiples of 32)."""
    fit: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Instead of --resize.short: this (short, long) side, rounded to 32k + 1 (641 641 for COCO); 0 0 = off."""
    size: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Instead of --resize.short: this height and width, whatever the shape of the image (JSIS-Net); 0 0 = off."""
    canvas: tuple[SideOrZero, SideOrZero] = (0, 0)
    """Batches are padded to at least this height and width (1025 2049 for Cityscapes); 0 = no minimum.

    This is batch padding: it lies outside `Frame.sizes`, so nothing that is predicted there counts."""
    antialias: bool = False
    """Average source pixels when shrinking instead of sampling bilinearly."""

    def __post_init__(self) -> None:
        for name in ("fit", "size"):
            _check_both("resize", name, getattr(self, name))


def _check_both(group: str, name: str, sides: tuple[int, int]) -> None:
    """Refuse two sides of which one alone is 0.

    Raises:
        ValueError: names the option.
    """
    if 0 in sides and any(sides):
        raise ValueError(f"{group}.{name} {sides}: both are 0 (off), or neither is")


POLICIES: dict[str, Augment] = {
    "none": Augment(flip=0.0),
    "colour004": Augment(flip=0.0, colour="colour004"),
    "ssd": Augment(flip=0.0, colour="ssd"),
    "detr": Augment(
        scale="short",
        sides=tuple(range(480, 801, 32)),
        longest=1333,
        rule="detr",
        early_crop=(384, 600),
        antialias=True,
    ),
    "lsj": Augment(
        scale="jitter",
        factors=(0.1, 2.0, 0.1),
        crop=(1024, 1024),
        crop_corner="diagonal",
        pad="end",
        pad_value=(128, 128, 128),
        flip_first=True,
        antialias=True,
    ),
    "eomt": Augment(
        scale="jitter",
        factors=(0.1, 2.0, 0.1),
        target=(640, 640),
        truncate=True,
        crop=(640, 640),
        crop_corner="free",
        pad="end",
        pad_value=(0, 0, 0),
        flip_first=True,
        antialias=True,
    ),
    "cityscapes_m2f": Augment(
        scale="short",
        sides=tuple(int(102.4 * k) for k in range(5, 21)),
        crop=(512, 1024),
        pad="none",
        colour="ssd",
        antialias=True,
    ),
    "efficientps": Augment(scale="ratio", target=(1024, 2048), crop=(1024, 2048), pad="none"),
}
"""The training views of the references, as values to start from:

- none, colour004, ssd: no geometry at all.
- detr: short side 480 to 800 up to 1333; at probability 1/2 from a crop of sides 384 to 600 of an image of 400 to 600.
  With rule detectron2 it is MaskFormer's.
- lsj: Mask2Former on COCO. The result is always 1024 x 1024; padding is grey 128 at the bottom and right.
- eomt: EoMT on COCO. The result is always 640 x 640 (target and crop change together for 1280); padding is black, at
  the bottom and right. On ADE20K with colour eomt, on Cityscapes (semantic only) with factors from 0.5 as well.
- cityscapes_m2f: MaskFormer and Mask2Former on Cityscapes; a smaller image keeps its size.
- efficientps: scaled to within 0.5 to 2 times 2048 x 1024, cropped to it; a smaller image keeps its size.
"""
