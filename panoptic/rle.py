"""COCO run-length encoding (RLE) of masks: the one module that makes, compares and measures it.

An RLE is pycocotools' dictionary {"size": [H, W], "counts": bytes}. Its runs go down the columns, pixels outside the
mask and inside by turns, and the first run lies outside. `encode_masks` is pycocotools' own encoder. `encode_segments`
and `encode_window` compute the runs here, from less than a whole mask each. Where a mask holds the last pixel of the
image, these two end in one more run, of length 0: other bytes, the same mask.

Shapes: H x W pixels of the image, K masks, h x w a window within the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco


def encode_masks(masks: np.ndarray) -> list[dict]:
    """The RLE of whole masks, which may overlap.

    Args:
        masks: bool or uint8 [K, H, W]. A uint8 mask whose memory runs down the columns is not copied.
    """
    planes = np.asarray(masks.transpose(1, 2, 0), np.uint8, order="F")
    return coco.encode(planes)  # type: ignore[return-value]


def encode_segments(segments: np.ndarray, numbers: np.ndarray) -> list[dict]:
    """The RLE of some segments of a map.

    All of them are read off the runs of the map, so that no mask of [H, W] is made: its pixels are compared once,
    however many segments there are.

    Args:
        segments: int32 [H, W].
        numbers: int [K], distinct segment numbers; one without a pixel has an empty mask.
    """
    height, width = segments.shape
    flat = cv2.transpose(segments).reshape(-1)  # RLE runs down the columns
    # the runs of equal numbers, and the number of each
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    # the runs of one segment, in the order of the image, side by side
    order = np.argsort(owners, kind="stable")
    first, last = (np.searchsorted(owners[order], numbers, side=side) for side in ("left", "right"))
    masks = []
    for a, b in zip(first, last, strict=True):
        runs = order[a:b]
        edges = np.stack([starts[runs], ends[runs]], 1).reshape(-1)
        masks.append(_uncompressed(edges, (height, width)))
    return coco.frPyObjects(masks, height, width) if masks else []


def encode_window(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict:
    """The RLE of a mask that is known within a window of its image; only the window's columns are looked at.

    Args:
        mask: bool [h, w], of the window whose first pixel is (top, left); nothing lies outside of it.
        top, left: row and column of that pixel; the whole window lies within the image.
        size: H and W of the image.
    """
    height, width = size
    # the columns of the image that the window touches, one after the other
    band = np.zeros((mask.shape[1], height), bool)
    band[:, top : top + mask.shape[0]] = mask.T
    flat = band.reshape(-1)
    # the ends of the runs that are inside, also of one that starts or ends with the band
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        edges = np.concatenate([[0], edges])
    if flat.size and flat[-1]:
        edges = np.append(edges, flat.size)
    return coco.frPyObjects(_uncompressed(edges + left * height, size), height, width)  # type: ignore[arg-type]


def _uncompressed(edges: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """The lengths of the runs, from the first pixel of each run inside and the first one after it, int [2 * runs]."""
    counts = np.diff(edges, prepend=0, append=size[0] * size[1])
    return {"size": list(size), "counts": counts.tolist()}


def bounding_boxes(masks: Sequence[dict]) -> np.ndarray:
    """float64 [K, 4], the x0 y0 x1 y1 of each mask in pixels, x1 and y1 exclusive; 0 0 0 0 of an empty mask."""
    if not masks:
        return np.zeros((0, 4))
    boxes = coco.toBbox(masks)  # type: ignore[arg-type]  (its stub knows one mask only)
    boxes[:, 2:] += boxes[:, :2]  # from width and height
    return boxes


def overlaps(predictions: Sequence[dict], truths: Sequence[dict], crowd: np.ndarray) -> np.ndarray:
    """float64 [K, G], the intersection over union of each prediction with each truth, as COCO compares them.

    Args:
        predictions: K masks.
        truths: G masks of the same size.
        crowd: bool [G]; of a crowd it is the share of the prediction that lies in it.
    """
    if not predictions or not len(truths):
        return np.zeros((len(predictions), len(truths)))
    table = coco.iou(list(predictions), list(truths), crowd.astype(np.uint8).tolist())  # type: ignore[arg-type]
    return np.asarray(table)


def run_lengths(counts: bytes) -> list[int]:
    """The lengths of the runs of a compressed RLE, which pycocotools decodes without looking whether they fit.

    Each number stands in groups of 5 bits, the lowest first; bit 6 says that another group follows, and from the
    fourth number on it is the difference to the number two before (cocodataset/cocoapi, common/maskApi.h).

    Raises:
        ValueError: the text ends within a number, holds a character that is no group, or a run is negative.
    """
    lengths: list[int] = []
    value = shift = 0
    for byte in counts:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"the character {chr(byte)!r} is none of a compressed RLE")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:  # negative
                value -= 1 << shift
            if len(lengths) > 2:
                value += lengths[-2]
            if value < 0:
                raise ValueError(f"a run of {value} pixels")
            lengths.append(value)
            value = shift = 0
    if shift:
        raise ValueError("the compressed RLE ends within a number")
    return lengths


def from_run_lengths(lengths: Sequence[int], size: tuple[int, int]) -> dict:
    """The RLE of runs that go down the columns, the first of them outside the mask.

    Raises:
        ValueError: a run is negative, or they do not add up to the pixels of `size`, (H, W).
    """
    height, width = size
    if any(length < 0 for length in lengths) or sum(lengths) != height * width:
        raise ValueError(
            f"the runs add up to {sum(lengths)} pixels, and the image has {height}x{width} (height x width), which is "
            f"{height * width}"
        )
    mask = {"size": [height, width], "counts": list(lengths)}
    return coco.frPyObjects(mask, height, width)  # type: ignore[arg-type,return-value]


def from_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> dict:
    """The RLE of the union of polygons, as pycocotools fills them: other fillers differ by the border.

    Args:
        polygons: each x0 y0 x1 y1 …, of at least three points; pixel i covers [i, i + 1).
        size: H and W of the image; what lies outside is cut off.
    """
    height, width = size
    parts = coco.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)  # type: ignore[arg-type]
    return coco.merge(parts)  # type: ignore[arg-type,return-value]


def union(masks: Sequence[dict]) -> dict:
    """The RLE of the pixels that at least one of some masks of the same image has."""
    return coco.merge(list(masks))  # type: ignore[arg-type,return-value]


def decode(mask: dict) -> np.ndarray:
    """The bool [H, W] mask of an RLE."""
    return coco.decode(mask).astype(bool)  # type: ignore[arg-type]


def area(mask: dict) -> int:
    """The pixels of an RLE."""
    return int(coco.area(mask))  # type: ignore[arg-type]
