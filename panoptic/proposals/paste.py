"""From the small mask within a box to pixels of the image, in memory that only the box needs.

detectron2's rule: the mask's probabilities are interpolated bilinearly at pixel centres, zero around the mask,
and belong to the instance from one half on. Interpolation is linear in rows and columns apart, so a window is
two small matrix products.

Shapes: H x W the image, S side of a mask, h x w a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as rle


@dataclass(frozen=True)
class Pasted:
    """The pixels of one instance."""

    top: int
    left: int
    mask: np.ndarray
    """bool [h, w], of the window whose first pixel is (top, left); nothing lies outside of it."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def paste(probabilities: np.ndarray, box: Sequence[float], size: tuple[int, int], threshold: float = 0.5) -> Pasted:
    """One mask at its place.

    Args:
        probabilities: float32 [S, S].
        box: x0, y0, x1, y1 in pixels of the image; neither side is 0.
        size: height and width of the image.
        threshold: pixels of at least this probability belong to the instance.
    """
    x0, y0, x1, y1 = box
    down, top = _weights(y0, y1, size[0], probabilities.shape[0])
    across, left = _weights(x0, x1, size[1], probabilities.shape[1])
    return Pasted(top, left, down @ probabilities @ across.T >= threshold)


def _weights(low: float, high: float, limit: int, side: int) -> tuple[np.ndarray, int]:
    """How much each of the mask's S cells counts at each pixel of an axis, float32 [h, S], and the first pixel.

    Computed in float32 in the order of torch's `grid_sample`. From a pixel and a half beside the box on, all is 0.
    """
    first, last = max(0, math.floor(low) - 1), min(limit, math.ceil(high) + 1)
    pixels = np.arange(first, max(first, last), dtype=np.float32) + np.float32(0.5)
    grid = (pixels - np.float32(low)) / np.float32(np.float32(high) - np.float32(low)) * np.float32(2) - np.float32(1)
    places = ((grid + np.float32(1)) * np.float32(side) - np.float32(1)) * np.float32(0.5)
    distance = np.abs(places[:, None] - np.arange(side, dtype=np.float32))
    return np.maximum(np.float32(1) - distance, np.float32(0), out=distance), first


def encode(pasted: Pasted, size: tuple[int, int]) -> dict:
    """COCO RLE of an instance in an image of that size; only the window's columns are looked at."""
    height, width = size
    rows, columns = pasted.window
    band = np.zeros((pasted.mask.shape[1], height), bool)  # RLE runs down the columns
    band[:, rows] = pasted.mask.T
    flat = band.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        edges = np.concatenate([[0], edges])
    if flat.size and flat[-1]:
        edges = np.append(edges, flat.size)
    counts = np.diff(edges + columns.start * height, prepend=0, append=height * width)
    return rle.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)  # type: ignore[arg-type]
