"""Augmentation for training and resizing for evaluation, one function a step.

Every random number is drawn first, from a generator that depends on (seed, epoch, sample) only; pixels
come later. The steps compose into one window of the scaled image, which is mapped back, so that only
the pixels that survive the crop are ever resized. Image and map sample the same grid: pixel centres
(half-pixel rule), bilinear for the image, nearest for the map.

Order: fit -> scale -> pad -> crop -> colour -> flip. Colour sees neither padding nor lost pixels.

Shapes: H x W the source image, h x w the scaled image.
Policies: Panoptic-DeepLab (arXiv 1911.10194), of which two code bases exist; "the standalone code" draws a
factor, "detectron2" draws the short side. Both resize twice where we resize once (fit and scale compose),
and the standalone code's label map follows the top-left instead of the pixel-centre rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from panoptic.segmentation import Sample, Segmentation

PIXEL_MEAN = (123, 116, 103)
"""int(255 * mean) of ImageNet, RGB: becomes about 0 once an image is normalised."""

PHASE = 1 / 128
"""How far, in source pixels, a windowed resize may sample beside the grid of the whole image."""


@dataclass(frozen=True)
class Augment:
    """What a training image goes through."""

    fit: tuple[int, int] = (0, 0)
    """First shrink or enlarge to this (short, long) side, rounded to 32k + 1 (641 641 for COCO); 0 0 = off."""
    size: tuple[int, int] = (0, 0)
    """Instead of --fit: to this height and width, whatever the shape of the image (JSIS-Net); 0 0 = off."""
    scale: Literal["none", "factor", "short"] = "none"
    """Random scale: a factor from --factors, or a short side from --sides up to --longest."""
    factors: tuple[float, float, float] = (0.5, 2.0, 0.1)
    """Smallest factor, largest factor, step; all equally likely."""
    sides: tuple[int, ...] = (320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
    """Short sides in pixels, all equally likely."""
    longest: int = 4096
    """The long side never exceeds this many pixels (scale short)."""
    crop: tuple[int, int] = (0, 0)
    """Height and width of a random crop, odd sizes too; 0 = the whole side."""
    pad: Literal["none", "random", "end"] = "random"
    """An image smaller than the crop is padded to it: on random sides, at the bottom and right, or not at all."""
    pad_value: tuple[int, int, int] = PIXEL_MEAN
    """RGB of that padding; its label is void."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    colour: Literal["none", "ssd"] = "none"
    """Colour jitter: none, or SSD's brightness, contrast, saturation and hue, each at probability 1/2."""
    antialias: bool = False
    """Average source pixels when shrinking instead of sampling bilinearly."""

    def __post_init__(self) -> None:
        low, high, step = self.factors
        if not (0 < low <= high and step > 0):
            raise ValueError(f"augment.factors {self.factors}: need 0 < smallest <= largest and a step above 0")
        if not self.sides or min(self.sides) < 1:
            raise ValueError(f"augment.sides {self.sides}: need at least one short side, each 1 pixel or more")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip {self.flip}: a probability lies between 0 and 1")
        if min(self.crop) < 0 or min(self.fit) < 0 or (0 in self.fit and any(self.fit)):
            raise ValueError(f"augment.crop {self.crop} and augment.fit {self.fit}: sides are 0 (off) or positive")
        if min(self.size) < 0 or (0 in self.size and any(self.size)):
            raise ValueError(f"augment.size {self.size}: height and width are both 0 (off) or positive")


@dataclass(frozen=True)
class Resize:
    """What an evaluation image goes through. Its truth is kept at the source's size besides."""

    short: int = 0
    """Short side in pixels; 0 keeps the source's size."""
    longest: int = 4096
    """The long side never exceeds this many pixels."""
    fit: tuple[int, int] = (0, 0)
    """Instead of --short: this (short, long) side, rounded to 32k + 1 (641 641 for COCO); 0 0 = off."""
    size: tuple[int, int] = (0, 0)
    """Instead of --short: this height and width, whatever the shape of the image (JSIS-Net); 0 0 = off."""
    canvas: tuple[int, int] = (0, 0)
    """Batches are padded to at least this height and width (1025 2049 for Cityscapes); 0 = no minimum.

    This is batch padding: it lies outside `Frame.sizes`, so nothing that is predicted there counts."""
    antialias: bool = False
    """Average source pixels when shrinking instead of sampling bilinearly."""

    def __post_init__(self) -> None:
        if min(self.size) < 0 or (0 in self.size and any(self.size)):
            raise ValueError(f"resize.size {self.size}: height and width are both 0 (off) or positive")


@dataclass(frozen=True)
class Window:
    """The part of the scaled image that survives, and where it goes."""

    scaled: tuple[int, int]
    """(h, w) of the whole scaled image."""
    start: tuple[int, int]
    """Top left corner of the part, in pixels of the scaled image."""
    stop: tuple[int, int]
    """Bottom right corner, exclusive."""
    offset: tuple[int, int]
    """Of the part's top left corner in the result."""
    result: tuple[int, int]
    """(H, W) of the result; larger than the part where there is padding."""


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The one source of randomness of a sample: the same on every worker, in every layout."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample]))


def training_view(sample: Sample, augment: Augment, rng: np.random.Generator) -> Sample:
    """The augmented sample; segments that the crop lost are dropped and `drawn` records every draw."""
    window, drawn = draw_geometry(sample.truth.size, augment, rng)
    flip = bool(rng.random() < augment.flip)
    operations = draw_ssd(rng) if augment.colour == "ssd" else []
    image = resize_image(sample.image, window, augment.antialias)
    for name, value in operations:
        image = COLOUR[name](image, value)
    image = place(image, window, augment.pad_value)
    segments = place(resize_map(narrow(sample.truth), window), window, (0,))
    if flip:
        image, segments = cv2.flip(image, 1), cv2.flip(segments, 1)
    truth = drop_vanished(replace(sample.truth, segments=segments))
    drawn |= {"flip": float(flip), **{f"colour/{name}": float(value) for name, value in operations}}
    return replace(sample, image=image, truth=truth, drawn=drawn)


def evaluation_view(sample: Sample, resize: Resize) -> Sample:
    """The resized sample; `original` becomes the incoming truth, untouched. Segments keep their numbers."""
    size = scaled = sample.truth.size
    if any(resize.size):
        scaled = resize.size
    elif any(resize.fit):
        scaled = fit_size(size, *resize.fit)
    elif resize.short:
        scaled = short_side_size(size, resize.short, resize.longest)
    window = Window(scaled, (0, 0), scaled, (0, 0), scaled)
    image = resize_image(sample.image, window, resize.antialias)
    segments = resize_map(sample.truth.segments, window)
    return replace(sample, image=image, truth=replace(sample.truth, segments=segments), original=sample.truth)


# Draws


def draw_geometry(size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> tuple[Window, dict[str, float]]:
    """Scale, padding and crop of an image of `size` (H, W) as one window, and the numbers drawn."""
    fitted = fit_size(size, *augment.fit) if any(augment.fit) else size
    fitted = augment.size if any(augment.size) else fitted
    scaled = draw_scale(fitted, augment, rng)
    before, padded = draw_padding(scaled, augment, rng)
    corner, result = draw_crop(padded, augment.crop, rng)
    starts, stops, offsets = zip(
        *(_overlap(*axis) for axis in zip(scaled, before, corner, result, strict=True)), strict=True
    )
    drawn = {
        "height": scaled[0],
        "width": scaled[1],
        "pad_top": before[0],
        "pad_left": before[1],
        "top": corner[0],
        "left": corner[1],
    }
    return Window(scaled, starts, stops, offsets, result), {name: float(value) for name, value in drawn.items()}


def _overlap(scaled: int, before: int, corner: int, result: int) -> tuple[int, int, int]:
    """Along one axis: start and stop of the part in the scaled image, and its offset in the result."""
    start = max(corner - before, 0)
    return start, min(corner - before + result, scaled), start + before - corner


def draw_scale(size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> tuple[int, int]:
    """The size (h, w) after the random scale."""
    if augment.scale == "factor":
        low, high, step = augment.factors
        count = int((high - low) / step + 1.5)
        factor = float(rng.choice(np.linspace(low, high, count)))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    if augment.scale == "short":
        return short_side_size(size, int(rng.choice(augment.sides)), augment.longest)
    return size


def draw_padding(
    size: tuple[int, int], augment: Augment, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows above and columns left of the image, and the padded size (h, w)."""
    if augment.pad == "none":
        return (0, 0), size
    missing = [max(0, wanted - side) for wanted, side in zip(augment.crop, size, strict=True)]
    top, left = (int(rng.integers(0, m + 1)) if augment.pad == "random" else 0 for m in missing)
    return (top, left), (size[0] + missing[0], size[1] + missing[1])


def draw_crop(
    size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top left corner, uniform over all that fit, and size of the crop; a side never exceeds the image's."""
    height, width = (min(wanted or side, side) for wanted, side in zip(crop, size, strict=True))
    top, left = int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1))
    return (top, left), (height, width)


def short_side_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(h, w) with the short side at `short`, less where the long side would exceed `longest`.

    detectron2's rule: scale in floating point, cap, both sides int(x + 0.5).
    """
    factor = short / min(size)
    height, width = size[0] * factor, size[1] * factor
    cap = min(1.0, longest / max(height, width))
    return max(1, int(height * cap + 0.5)), max(1, int(width * cap + 0.5))


def fit_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """(h, w) of the standalone Panoptic-DeepLab's COCO rule: fit, round down, then up to 32k + 1 below `longest`."""
    factor = min(short / min(size), longest / max(size))

    def stride(side: int) -> int:
        up = -(-(max(1, int(side * factor + 1e-9)) - 1) // 32) * 32 + 1
        return up - 32 if up > longest and up > 32 else up

    return stride(size[0]), stride(size[1])


# Pixels


def resize_image(image: np.ndarray, window: Window, antialias: bool = False) -> np.ndarray:
    """uint8 [H, W, 3] to the window's part of the scaled image, bilinear.

    Equal to resizing everything and cropping, but for sampling up to `PHASE` source pixels aside: `cv2.resize`
    knows no sub-pixel origin, so the part is widened to the nearest row and column where both grids meet.
    """
    size = image.shape[:2]
    if window.scaled == size:
        return image[window.start[0] : window.stop[0], window.start[1] : window.stop[1]]
    shrinks = antialias and window.scaled[0] < size[0] and window.scaled[1] < size[1]
    rows, columns = (_source_span(size[k], window.scaled[k], window.start[k], window.stop[k]) for k in (0, 1))
    part = image[rows[0] : rows[1], columns[0] : columns[1]]
    scaled = cv2.resize(
        part,
        None,
        fx=window.scaled[1] / size[1],
        fy=window.scaled[0] / size[0],
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    top, left = window.start[0] - rows[2], window.start[1] - columns[2]
    return scaled[top : top + window.stop[0] - window.start[0], left : left + window.stop[1] - window.start[1]]


def _source_span(source: int, scaled: int, start: int, stop: int) -> tuple[int, int, int]:
    """Along one axis: the source pixels [first, last) to resize, and the scaled pixel at which `first` lies.

    Three source pixels of margin keep the border rule of the part away from what is kept.
    """
    candidates = np.arange(max(0, start - -(-scaled // source)), -1, -1)
    exact = candidates * (source / scaled)
    meets = int(np.argmax(np.abs(exact - np.round(exact)) <= PHASE))  # 0 always meets
    first = round(exact[meets])
    last = min(source, -(-stop * source // scaled) + 3)
    return first, last, int(candidates[meets])


def resize_map(segments: np.ndarray, window: Window) -> np.ndarray:
    """int [H, W] to the window's part of the scaled map, nearest (pixel centres), in integer arithmetic."""
    if window.scaled == segments.shape:
        return segments[window.start[0] : window.stop[0], window.start[1] : window.stop[1]]
    rows, columns = (
        (2 * np.arange(window.start[k], window.stop[k]) + 1) * segments.shape[k] // (2 * window.scaled[k])
        for k in (0, 1)
    )
    if len(rows) <= rows[-1] - rows[0]:
        return np.take(segments[rows], columns, axis=1, mode="clip")
    # when enlarging, rows repeat: pick columns on the source's few rows first
    return np.take(segments[rows[0] : rows[-1] + 1], columns, axis=1, mode="clip")[rows - rows[0]]


def narrow(truth: Segmentation) -> np.ndarray:
    """The map as uint8 or uint16 where N allows: a quarter or half of the bytes to move."""
    count = len(truth.labels)
    return truth.segments.astype(np.uint8 if count < 256 else np.uint16 if count < 65536 else np.int32)


def drop_vanished(truth: Segmentation) -> Segmentation:
    """`truth.compact()` of a narrow map, as int32: four times faster for uint8, where tables do the work."""
    if truth.segments.dtype != np.uint8:
        return replace(truth, segments=truth.segments.astype(np.int32)).compact()
    alive = cv2.calcHist([truth.segments], [0], None, [256], [0, 256]).ravel()[1 : len(truth.labels) + 1] > 0
    table = np.zeros((1, 256), np.int32)
    table[0, 1 : len(alive) + 1] = np.where(alive, np.cumsum(alive), 0)
    crowd = None if truth.crowd is None else truth.crowd[alive]
    scores = None if truth.scores is None else truth.scores[alive]
    return Segmentation(cv2.LUT(truth.segments, table), truth.labels[alive], crowd, scores)


def place(part: np.ndarray, window: Window, value: tuple[int, ...]) -> np.ndarray:
    """The part at its offset in a canvas of the result's size, filled with `value`; the part itself if they agree."""
    if part.shape[:2] == window.result:
        return part
    top, left = window.offset
    bottom, right = window.result[0] - top - part.shape[0], window.result[1] - left - part.shape[1]
    return cv2.copyMakeBorder(part, top, bottom, left, right, cv2.BORDER_CONSTANT, value=value)


# Colour: every function takes and gives uint8 [H, W, 3] RGB


def draw_ssd(rng: np.random.Generator) -> list[tuple[str, float]]:
    """SSD's policy (Mask2Former's COLOR_AUG_SSD): operations in order, with their values.

    Brightness first; then contrast before or after saturation and hue; each with probability 1/2.
    """
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    chosen = {name: float(rng.uniform(*limits)) for name, limits in ranges.items() if rng.integers(2)}
    if rng.integers(2):
        chosen["hue"] = float(rng.integers(-18, 19))
    late = ["contrast", "saturation", "hue"] if rng.integers(2) else ["saturation", "hue", "contrast"]
    return [(name, chosen[name]) for name in ["brightness", *late] if name in chosen]


def _table(scale: float, shift: float) -> np.ndarray:
    """uint8 [256] of x * scale + shift, clipped, then truncated as the reference does."""
    return np.clip(np.arange(256) * scale + shift, 0, 255).astype(np.uint8)


def shift_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """x + delta, delta in grey levels."""
    return cv2.LUT(image, _table(1, delta))


def scale_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """x * factor."""
    return cv2.LUT(image, _table(factor, 0))


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """S * factor in OpenCV's 8-bit HSV."""
    same = np.arange(256, dtype=np.uint8)
    return _through_hsv(image, np.stack([same, _table(factor, 0), same], -1))


def rotate_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """H + degrees modulo 180 in OpenCV's 8-bit HSV, where one step is two degrees of the colour circle."""
    same = np.arange(256, dtype=np.uint8)
    turned = ((np.arange(256) + int(degrees)) % 180).astype(np.uint8)
    return _through_hsv(image, np.stack([turned, same, same], -1))


def _through_hsv(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2RGB)


COLOUR = {
    "brightness": shift_brightness,
    "contrast": scale_contrast,
    "saturation": scale_saturation,
    "hue": rotate_hue,
}
