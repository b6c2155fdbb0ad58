"""Augmentation for training and resizing for evaluation, one function a step.

Every random number is drawn first, from a generator that depends on (seed, epoch, sample) only; pixels
come later. The steps compose into one window of the scaled image, which is mapped back, so that only
the pixels that survive the crop are ever resized. Image and map sample the same grid: pixel centres
(half-pixel rule), bilinear for the image, nearest for the map.

Order: rotation -> fit -> scale -> pad -> crop -> colour -> flip; with `flip_first` the flip comes before all but the
rotation. Colour sees neither padding nor lost pixels; EoMT's comes before the scale and sees the whole image. Padding
is part of the image: it lies inside `Frame.sizes`.

`POLICIES` names what the references do. Differences from them, besides resizing once where they resize twice:
bilinear sampling, or the mean of source pixels with `antialias`, stands in for PIL's filter; nearest takes pixel
centres, where the standalone Panoptic-DeepLab takes the top left; DETR's early crop is rounded to the final grid (up to
a pixel); a crop without any segment is kept, and `drawn["empty"]` says so, where mmdetection draws another image.

Shapes: H x W the source image, h x w the scaled image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from panoptic.segmentation import Sample, Segmentation
from panoptic.transforms.colour import Operations, apply, draw_colour004, draw_eomt, draw_ssd
from panoptic.transforms.geometry import (
    UNLIMITED,
    Window,
    fit_size,
    jitter_size,
    place,
    ratio_size,
    resize_image,
    resize_map,
    short_side_size,
)
from panoptic.transforms.policies import Augment, Resize

WHOLE_IMAGE = ("eomt",)
"""Colour policies that act on the whole image before it is scaled: their contrast blends with its mean grey."""

CROP_TRIES = 10
"""Crops drawn at most until one is not filled by a single class (detectron2's CategoryAreaConstraint)."""


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The one source of randomness of a sample: the same on every worker, in every layout."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample]))


def copy_generator(seed: int, sample: int) -> np.random.Generator:
    """The source of randomness of the colours of a sample's second copy (`doubled`): the same in every epoch."""
    return np.random.default_rng(np.random.SeedSequence([seed, sample]))


def training_view(
    sample: Sample, augment: Augment, rng: np.random.Generator, colours: np.random.Generator | None = None
) -> Sample:
    """The augmented sample; segments that the crop lost are dropped and `drawn` records every draw.

    Args:
        sample: decoded, with its truth.
        augment: the policy.
        rng: source of every draw.
        colours: source of the colours of a second copy (`copy_generator`), which always change.
    """
    # draw everything
    numbers, turned = narrow(sample.truth), {}
    if augment.rotation:
        turned = {"rotation": float(rng.uniform(-augment.rotation, augment.rotation))}
        pixels, numbers = rotated(sample.image, numbers, turned["rotation"], augment.pad_value)
        sample = replace(sample, image=pixels)
    accept = None if augment.crop_share == 1 else _mixed(numbers, sample.truth.labels, augment.crop_share)
    window, drawn = draw_geometry(sample.truth.size, augment, rng, accept)
    flip = bool(rng.random() < augment.flip)
    operations = draw_colours(augment, rng if colours is None else colours, always=colours is not None)
    # image and map through one window, mirrored before or after
    part = mirrored(window) if flip and augment.flip_first else window
    if augment.colour in WHOLE_IMAGE:
        image = resize_image(apply(sample.image, operations), part, augment.antialias)
    else:
        image = apply(resize_image(sample.image, part, augment.antialias), operations)
    segments = resize_map(numbers, part)
    if flip and augment.flip_first:
        image, segments = cv2.flip(image, 1), cv2.flip(segments, 1)
    image, segments = place(image, window, augment.pad_value), place(segments, window, (0,))
    if flip and not augment.flip_first:
        image, segments = cv2.flip(image, 1), cv2.flip(segments, 1)
    truth = drop_vanished(replace(sample.truth, segments=segments))
    drawn |= turned | {"flip": float(flip), **{f"colour/{name}": float(value) for name, value in operations}}
    if len(sample.truth.labels) and not len(truth.labels):
        drawn["empty"] = 1.0
    return replace(sample, image=image, truth=truth, drawn=drawn)


def evaluation_view(sample: Sample, resize: Resize) -> Sample:
    """The resized sample; `original` becomes the incoming truth, untouched. Segments keep their numbers."""
    size = scaled = sample.truth.size
    if any(resize.size):
        scaled = resize.size
    elif any(resize.fit):
        scaled = fit_size(size, *resize.fit)
    elif resize.short:
        scaled = short_side_size(size, resize.short, resize.longest, resize.rule)
    window = Window(scaled, (0, 0), scaled, (0, 0), scaled)
    image = resize_image(sample.image, window, resize.antialias)
    segments = resize_map(sample.truth.segments, window)
    return replace(sample, image=image, truth=replace(sample.truth, segments=segments), original=sample.truth)


# Draws


def draw_geometry(
    size: tuple[int, int],
    augment: Augment,
    rng: np.random.Generator,
    accept: Callable[[Window], bool] | None = None,
) -> tuple[Window, dict[str, float]]:
    """Draw scale, padding and crop of an image as one window.

    Args:
        size: (H, W).
        accept: a crop that it refuses is drawn again, up to `CROP_TRIES` times in all; the last one stays.

    Returns:
        the window, and the numbers drawn by name.
    """
    fitted = fit_size(size, *augment.fit) if any(augment.fit) else size
    fitted = augment.size if any(augment.size) else fitted
    if any(augment.early_crop) and rng.random() < augment.early_chance:
        return draw_early_crop(fitted, augment, rng)
    scaled = draw_scale(fitted, augment, rng)
    before, padded = draw_padding(scaled, augment, rng)
    for _ in range(CROP_TRIES):
        corner, result = draw_crop(padded, augment, rng)
        starts, stops, offsets = zip(
            *(_overlap(*axis) for axis in zip(scaled, before, corner, result, strict=True)), strict=True
        )
        window = Window(scaled, starts, stops, offsets, result)
        if accept is None or accept(window):
            break
    drawn = {
        "height": scaled[0],
        "width": scaled[1],
        "pad_top": before[0],
        "pad_left": before[1],
        "top": corner[0],
        "left": corner[1],
    }
    return window, {name: float(value) for name, value in drawn.items()}


def _overlap(scaled: int, before: int, corner: int, result: int) -> tuple[int, int, int]:
    """Start and stop of the part in the scaled image along one axis, and its offset in the result."""
    start = max(corner - before, 0)
    return start, min(corner - before + result, scaled), start + before - corner


def draw_early_crop(
    size: tuple[int, int], augment: Augment, rng: np.random.Generator
) -> tuple[Window, dict[str, float]]:
    """Draw a first scale, a crop and a second scale as one window.

    The window is the crop's place in an image that is scaled as much as the crop is. Sides of the crop are independent
    and never exceed the image's.
    """
    low, high = augment.early_crop
    first = short_side_size(size, int(rng.choice(augment.early_sides)), UNLIMITED, augment.rule)
    crop = tuple(int(rng.integers(min(side, low), min(side, high) + 1)) for side in first)
    corner = tuple(int(rng.integers(0, side - cut + 1)) for side, cut in zip(first, crop, strict=True))
    result = draw_scale((crop[0], crop[1]), augment, rng)
    growth = [result[k] / crop[k] for k in (0, 1)]
    scaled = [max(result[k], round(first[k] * growth[k])) for k in (0, 1)]
    start = [min(round(corner[k] * growth[k]), scaled[k] - result[k]) for k in (0, 1)]
    stop = (start[0] + result[0], start[1] + result[1])
    drawn = {"height": scaled[0], "width": scaled[1], "top": start[0], "left": start[1]}
    drawn |= {"early_height": crop[0], "early_width": crop[1]}
    window = Window((scaled[0], scaled[1]), (start[0], start[1]), stop, (0, 0), result)
    return window, {name: float(value) for name, value in drawn.items()}


def draw_scale(size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the size (h, w) after the random scale."""
    low, high, step = augment.factors
    if augment.scale == "factor":
        count = int((high - low) / step + 1.5)
        factor = float(rng.choice(np.linspace(low, high, count)))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    if augment.scale == "short":
        return short_side_size(size, int(rng.choice(augment.sides)), augment.longest, augment.rule)
    if augment.scale == "jitter":
        return jitter_size(size, augment.target, float(rng.uniform(low, high)), augment.truncate)
    if augment.scale == "ratio":
        return ratio_size(size, augment.target, float(rng.uniform(low, high)))
    return size


def draw_padding(
    size: tuple[int, int], augment: Augment, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw the rows above and the columns left of the image; returns them and the padded size (h, w)."""
    if augment.pad == "none":
        return (0, 0), size
    missing = [max(0, crop - side) for crop, side in zip(augment.crop, size, strict=True)]
    top, left = (int(rng.integers(0, m + 1)) if augment.pad == "random" else 0 for m in missing)
    return (top, left), (size[0] + missing[0], size[1] + missing[1])


def draw_crop(
    size: tuple[int, int], augment: Augment, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw the top left corner of the crop; returns it and the crop's size, whose sides never exceed the image's."""
    height, width = (min(crop or side, side) for crop, side in zip(augment.crop, size, strict=True))
    spare = size[0] - height, size[1] - width
    if augment.crop_corner == "diagonal":
        share = float(rng.random())
        return (round(spare[0] * share), round(spare[1] * share)), (height, width)
    return (int(rng.integers(0, spare[0] + 1)), int(rng.integers(0, spare[1] + 1))), (height, width)


def draw_colours(augment: Augment, rng: np.random.Generator, always: bool = False) -> Operations:
    """Draw the colour operations of the policy, in order; `always` overrules `colour_chance`."""
    if augment.colour == "ssd":
        return draw_ssd(rng)
    if augment.colour == "eomt":
        return draw_eomt(rng)
    if augment.colour == "colour004":
        chance = 1.0 if always else augment.colour_chance
        return draw_colour004(rng, chance, augment.colour_operations, augment.colour_strength)
    return []


# Pixels


def rotated(
    image: np.ndarray, numbers: np.ndarray, degrees: float, value: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Image and map turned about the middle of the image, at its size; bilinear for the image, nearest for the map.

    Args:
        image: uint8 [H, W, 3].
        numbers: the map, int [H, W].
        degrees: anticlockwise.
        value: colour of what comes in from outside, which is void.
    """
    height, width = numbers.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=value)
    known = numbers if numbers.dtype != np.int32 else numbers.astype(np.float64)  # of which OpenCV makes no warp
    moved = cv2.warpAffine(known, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=0)
    return turned, moved.astype(numbers.dtype)


def mirrored(window: Window) -> Window:
    """The part of the image that lies where `window` lies in its mirror image."""
    width = window.scaled[1]
    left, right = width - window.stop[1], width - window.start[1]
    return replace(window, start=(window.start[0], left), stop=(window.stop[0], right))


def _mixed(numbers: np.ndarray, labels: np.ndarray, share: float) -> Callable[[Window], bool]:
    """A test of windows: two classes or more, and none of them on more than `share` of the labelled pixels.

    Args:
        numbers: the map, int [H, W].
        labels: int64 [N], the class of each segment.
    """

    def accept(window: Window) -> bool:
        areas = np.bincount(resize_map(numbers, window).ravel(), minlength=len(labels) + 1)[1:]
        counts = np.bincount(labels, weights=areas) if len(labels) else np.zeros(0)
        return bool((counts > 0).sum() > 1 and counts.max() < share * counts.sum())

    return accept


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
