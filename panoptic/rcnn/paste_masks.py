"""Small masks of boxes pasted into their image, in memory of the size of the box.

detectron2's rule: the mask's probabilities are interpolated bilinearly at pixel centres, zero around the mask,
and belong to the instance from one half on. Interpolation is linear in rows and columns apart, so a window is
two small matrix products.

Shapes: H x W the image, S side of a mask, h x w a window.
"""

from __future__ import annotations

import numpy as np

from panoptic.layers.greedy_merge import CroppedMask

SMALL, HUGE = 1 << 19, 1 << 22
"""Bytes: less is taken as it comes, more in huge pages."""


def paste(
    probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> list[CroppedMask]:
    """The masks of boxes in pixels of the image, each within the window that its box can reach.

    Args:
        probabilities: float32 [N, S, S].
        boxes: float32 [N, 4], x0 y0 x1 y1 in pixels of the image; no side is 0.
        size: height and width of the image.
        threshold: pixels of at least this probability belong to the instance.
    """
    if not len(boxes):
        return []
    side = probabilities.shape[1]
    tops, heights, lefts, widths = windows(boxes, size)
    # memory for the factors of all masks along both axes, one window of probabilities, and all windows of booleans
    ends = np.cumsum(heights * widths)
    rows, columns, plane, mask = _block(
        (heights.sum() * side, np.float32),
        (widths.sum() * side, np.float32),
        (int((heights * widths).max()), np.float32),
        (int(ends[-1]), np.bool_),
    )
    down = _weights(boxes[:, 1], boxes[:, 3], tops, heights, rows.reshape(-1, side))
    across = _weights(boxes[:, 0], boxes[:, 2], lefts, widths, columns.reshape(-1, side))
    # a bilinear resize is a product from the left along the rows and one from the right along the columns
    pasted = []
    for k, (first, last) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        shape = len(down[k]), len(across[k])
        window, inside = plane[: last - first].reshape(shape), mask[first:last].reshape(shape)
        np.matmul(down[k] @ probabilities[k], across[k].T, out=window)
        np.greater_equal(window, threshold, out=inside)
        pasted.append(CroppedMask(int(tops[k]), int(lefts[k]), inside))
    return pasted


def windows(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The top row, height, left column and width of the window that each box can reach, int64 [N] each."""
    return *_spans(boxes[:, 1], boxes[:, 3], size[0]), *_spans(boxes[:, 0], boxes[:, 2], size[1])


def paste_values(values: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """One mask's values interpolated at the pixels of its window, as `paste` does before its threshold.

    Args:
        values: float32 [S, S].
        box: float32 [4], x0 y0 x1 y1 in pixels of the image; no side is 0.
        size: height and width of the image.

    Returns:
        the window's top row, its left column, and float32 [h, w], 0 beyond half a cell around the mask.
    """
    box = box[None]
    tops, heights, lefts, widths = windows(box, size)
    side = len(values)
    rows, columns = (np.empty((int(count[0]), side), np.float32) for count in (heights, widths))
    (down,) = _weights(box[:, 1], box[:, 3], tops, heights, rows)
    (across,) = _weights(box[:, 0], box[:, 2], lefts, widths, columns)
    return int(tops[0]), int(lefts[0]), (down @ values) @ across.T


def _spans(low: np.ndarray, high: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and number of pixels of each window, int64 [N]; a pixel and a half beside a box, all is 0."""
    first = np.clip(np.floor(low).astype(np.int64) - 1, 0, limit)
    return first, np.maximum(np.clip(np.ceil(high).astype(np.int64) + 1, 0, limit) - first, 0)


def _weights(
    low: np.ndarray, high: np.ndarray, first: np.ndarray, counts: np.ndarray, out: np.ndarray
) -> list[np.ndarray]:
    """The factor of each of a mask's S cells at each pixel of an axis, in float32 in the order of `grid_sample`.

    Args:
        low, high: float32 [N], the ends of the boxes.
        first, counts: of `_spans`.
        out: float32 [sum of counts, S], filled and cut into the [h, S] of each mask.
    """
    # everything in float32, step by step as `grid_sample` computes it, so that the same pixels pass the threshold
    starts = np.cumsum(counts) - counts
    side, one, two, half = out.shape[1], np.float32(1), np.float32(2), np.float32(0.5)
    # pixel centres, from -1 to 1 over the box, then in cells of the mask
    pixels = (np.arange(len(out)) + np.repeat(first - starts, counts)).astype(np.float32) + half
    grid = (pixels - np.repeat(low, counts)) / np.repeat(high - low, counts) * two - one
    places = ((grid + one) * np.float32(side) - one) * half
    # a cell counts 1 at its centre and falls to 0 at the centres of its neighbours
    np.subtract(places[:, None], np.arange(side, dtype=np.float32), out=out)
    np.abs(out, out=out)
    np.subtract(one, out, out=out)
    np.maximum(out, 0, out=out)
    return [out[start : start + count] for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]


def _block(*kinds: tuple[int, type]) -> list[np.ndarray]:
    """Uninitialised vectors in one piece of memory.

    NumPy asks the kernel for huge pages from 4 MB on; touching that much in small ones for the first time takes
    longer than all the arithmetic of `paste`.
    """
    sizes = [-(-count * np.dtype(kind).itemsize // 64) * 64 for count, kind in kinds]
    starts = np.cumsum([0, *sizes]).tolist()
    memory = np.empty(starts[-1] if starts[-1] < SMALL else max(starts[-1], HUGE), np.uint8)
    return [
        memory[start : start + int(count) * np.dtype(kind).itemsize].view(kind)
        for start, (count, kind) in zip(starts, kinds, strict=False)
    ]
