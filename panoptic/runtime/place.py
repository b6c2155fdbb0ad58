"""The place of one image between network and output, and bilinear resizing as the models compute it.

Shapes: h x w before a resize, H x W after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """The sizes of one image, height and width each."""

    canvas: tuple[int, int]
    """The size of the network's input, padding included."""
    size: tuple[int, int]
    """The size of the image inside of the input."""
    output: tuple[int, int]
    """The size of the map that is wanted."""

    def rounded(self, step: int) -> Place:
        """The place of the image on a canvas of whole multiples of `step`, up to which a network pads by itself."""
        height, width = (-(-side // step) * step for side in self.canvas)
        return self._replace(canvas=(height, width))


def mixed_cells(cells: int, pixels: int, align_corners: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two cells that a bilinear resize mixes in each pixel of an axis, int64, and the share of the second one."""
    positions = np.arange(pixels, dtype=np.float32)
    if align_corners:
        positions *= np.float32((cells - 1) / max(pixels - 1, 1))
    else:
        positions = np.maximum((positions + np.float32(0.5)) * np.float32(cells / pixels) - np.float32(0.5), 0)
    before = np.minimum(positions.astype(np.int64), cells - 1)
    return before, np.minimum(before + 1, cells - 1), positions - before.astype(np.float32)


def bilinear(x: np.ndarray, size: tuple[int, int], align_corners: bool = False) -> np.ndarray:
    """float32 [..., h, w] to [..., H, W]; the array itself where it has that size already.

    Args:
        align_corners: the centres of the corner cells stay where they are; else the corners of the map do.
    """
    if x.shape[-2:] == tuple(size):
        return x
    before, after, share = mixed_cells(x.shape[-1], size[1], align_corners)
    x = np.take(x, before, -1) * (1 - share) + np.take(x, after, -1) * share
    before, after, share = mixed_cells(x.shape[-2], size[0], align_corners)
    share = share[:, None]
    return np.take(x, before, -2) * (1 - share) + np.take(x, after, -2) * share


def to_output(x: np.ndarray, place: Place, align_corners: bool = False) -> np.ndarray:
    """float32 [..., h, w], which covers the canvas, at the output's size: resized, cut to the image, resized."""
    height, width = place.size
    return bilinear(bilinear(x, place.canvas, align_corners)[..., :height, :width], place.output)


def best_planes(planes: np.ndarray, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """The highest plane of [K, h, w] in each pixel of the output, float32 [H, W], and its number, the first of equals.

    A plane at a time: not all of them may fit memory at that size.
    """
    best = to_output(planes[0], place).copy()
    number = np.zeros(place.output, np.int32)
    for k in range(1, len(planes)):
        plane = to_output(planes[k], place)
        number[plane > best] = k
        np.maximum(best, plane, out=best)
    return best, number


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), float32, without overflow."""
    small = np.exp(-np.abs(x, dtype=np.float32))
    return np.where(x >= 0, 1, small) / (1 + small)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probabilities of logits along an axis, float32."""
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)
