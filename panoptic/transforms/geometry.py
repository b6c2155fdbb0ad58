"""Resizing a part of an image as if the whole were resized and then cut, and the published rules of sizes.

Shapes: H x W the source image, h x w the scaled image.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from panoptic.transforms.policies import SizeRule

PHASE = 1 / 128
"""Largest distance, in source pixels, between the samples of a windowed resize and the grid of the whole image."""

UNLIMITED = 1 << 30
"""A long side that caps nothing."""


@dataclass(frozen=True)
class Window:
    """The part of the scaled image that survives, and its place in the result."""

    scaled: tuple[int, int]
    """(h, w) of the whole scaled image."""
    start: tuple[int, int]
    """Top left corner of the part, in pixels of the scaled image."""
    stop: tuple[int, int]
    """Bottom right corner, exclusive."""
    offset: tuple[int, int]
    """Top left corner of the part in the result."""
    result: tuple[int, int]
    """(H, W) of the result; larger than the part where there is padding."""


# Sizes


def short_side_size(size: tuple[int, int], short: int, longest: int, rule: SizeRule = "detectron2") -> tuple[int, int]:
    """The size (h, w) whose short side is `short`, or less where the long side would exceed `longest`.

    | rule | the cap | the sides |
    |---|---|---|
    | detectron2 | scales both in floating point | int(x + 0.5) |
    | half_even | as detectron2 | rounded, halves to even (EoMT, and large-scale jitter) |
    | detr | the short side is rounded (half to even) first | the long one is truncated |
    | huggingface | as detr | the long one from the short one before its rounding, truncated |
    | huggingface32 | as huggingface | then both up to a multiple of 32, as Mask(2)Former's processors |

    An image whose short side is right already keeps its size (huggingface32: up to that multiple).
    """
    if rule == "half_even":
        scale = min(short / min(size), longest / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    if rule == "detectron2":
        # the short side is exact before the cap: twice rounded it would decide some ties otherwise
        height, width = (float(short) if side == min(size) else short / min(size) * side for side in size)
        cap = longest / max(height, width)
        if cap < 1:
            height, width = height * cap, width * cap
        return max(1, int(height + 0.5)), max(1, int(width + 0.5))
    # the short side, before and after rounding
    exact: float = short
    if max(size) / min(size) * short > longest:
        exact = longest * min(size) / max(size)
    small = max(1, round(exact))
    # the long side in proportion to it
    basis = small if rule == "detr" else exact
    sides = [small if side == min(size) else int(basis * side / min(size)) for side in size]
    if min(size) == small:
        sides = list(size)
    step = 32 if rule == "huggingface32" else 1
    return -(-sides[0] // step) * step, -(-sides[1] // step) * step


def jitter_size(
    size: tuple[int, int], target: tuple[int, int], factor: float, truncate: bool = False
) -> tuple[int, int]:
    """The largest (h, w) of the image's shape within `factor` times the target (height, width).

    Large-scale jitter (Ghiasi et al. 2021) as detectron2 rounds it, half to even, or as torchvision's `ScaleJitter`
    does, which truncates.
    """
    if truncate:
        scale = min(target[0] / size[0], target[1] / size[1]) * factor
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    scale = min(target[0] * factor / size[0], target[1] * factor / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def ratio_size(size: tuple[int, int], target: tuple[int, int], ratio: float) -> tuple[int, int]:
    """The largest (h, w) of the image's shape within `ratio` times the target (short, long), either way round.

    mmdetection's Resize with a ratio range: the target is truncated, the result int(x + 0.5).
    """
    short, long = sorted(int(side * ratio) for side in target)
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def fit_size(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """The size (h, w) by the standalone Panoptic-DeepLab's rule for COCO.

    The image is fitted into `short` and `longest` and rounded down, then up to 32k + 1, but never beyond `longest`.
    """
    factor = min(short / min(size), longest / max(size))

    def stride(side: int) -> int:
        up = -(-(max(1, int(side * factor + 1e-9)) - 1) // 32) * 32 + 1
        return up - 32 if up > longest and up > 32 else up

    return stride(size[0]), stride(size[1])


# Pixels


def resize_image(image: np.ndarray, window: Window, antialias: bool = False) -> np.ndarray:
    """The window's part of the scaled image, uint8 [h', w', 3], bilinear.

    Equal to resizing everything and cropping, but for sampling up to `PHASE` source pixels aside: `cv2.resize` knows no
    sub-pixel origin, so the part is widened to the nearest row and column where both grids meet.

    Args:
        image: uint8 [H, W, 3].
        window: its padding is not made here (see `place`).
        antialias: average source pixels where both sides shrink.
    """
    size = image.shape[:2]
    if window.scaled == size:
        return image[window.start[0] : window.stop[0], window.start[1] : window.stop[1]]
    shrinks = antialias and window.scaled[0] < size[0] and window.scaled[1] < size[1]
    # the source pixels that the part needs, from a row and column on where both grids meet
    rows, columns = (_source_span(size[k], window.scaled[k], window.start[k], window.stop[k]) for k in (0, 1))
    part = image[rows[0] : rows[1], columns[0] : columns[1]]
    factors = window.scaled[0] / size[0], window.scaled[1] / size[1]
    if all(round(side * factor) == side for side, factor in zip(part.shape, factors, strict=False)):
        # OpenCV would copy a part whose size stays, though its pixels lie elsewhere
        part, rows, columns = image, (0, size[0], 0), (0, size[1], 0)
    scaled = cv2.resize(
        part,
        None,
        fx=factors[1],
        fy=factors[0],
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    # without what was added to reach that row and column
    top, left = window.start[0] - rows[2], window.start[1] - columns[2]
    return scaled[top : top + window.stop[0] - window.start[0], left : left + window.stop[1] - window.start[1]]


def _source_span(source: int, scaled: int, start: int, stop: int) -> tuple[int, int, int]:
    """The source pixels [first, last) to resize along one axis, and the scaled pixel at which `first` lies.

    Three source pixels of margin keep the border rule of the part away from the pixels that are kept.
    """
    # scaled pixels at most one source pixel before the part and before that, the nearest first
    candidates = np.arange(max(0, start - -(-scaled // source)), -1, -1)
    exact = candidates * (source / scaled)
    meets = int(np.argmax(np.abs(exact - np.round(exact)) <= PHASE))  # 0 always meets
    first = round(exact[meets])
    last = min(source, -(-stop * source // scaled) + 3)
    return first, last, int(candidates[meets])


def resize_map(segments: np.ndarray, window: Window) -> np.ndarray:
    """The window's part of the scaled map, nearest neighbour at pixel centres.

    Args:
        segments: int [H, W].
        window: its padding is not made here (see `place`).
    """
    if window.scaled == segments.shape:
        return segments[window.start[0] : window.stop[0], window.start[1] : window.stop[1]]
    # floor((i + 1/2) * source / scaled), in whole numbers
    rows, columns = (
        (2 * np.arange(window.start[k], window.stop[k]) + 1) * segments.shape[k] // (2 * window.scaled[k])
        for k in (0, 1)
    )
    if len(rows) <= rows[-1] - rows[0]:
        return np.take(segments[rows], columns, axis=1, mode="clip")
    # when upsampling, rows repeat: take the columns of the source's few rows first
    return np.take(segments[rows[0] : rows[-1] + 1], columns, axis=1, mode="clip")[rows - rows[0]]


def place(part: np.ndarray, window: Window, value: tuple[int, ...]) -> np.ndarray:
    """The part at its offset in a canvas of the result's size, filled with `value`; the part itself if they agree."""
    if part.shape[:2] == window.result:
        return part
    top, left = window.offset
    bottom, right = window.result[0] - top - part.shape[0], window.result[1] - left - part.shape[1]
    return cv2.copyMakeBorder(part, top, bottom, left, right, cv2.BORDER_CONSTANT, value=value)
