"""COCO run-length encoding of masks, in the one place that makes it.

Shapes: N segments, H x W pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
from pycocotools import mask as rle


def encode_masks(segments: np.ndarray, wanted: np.ndarray) -> list[dict]:
    """COCO RLE of some segments of a map, from the runs of the whole map instead of a mask each.

    Args:
        segments: int32 [H, W].
        wanted: int [K], distinct segment numbers.
    """
    height, width = segments.shape
    flat = cv2.transpose(segments).reshape(-1)  # RLE runs down the columns
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    order = np.argsort(owners, kind="stable")
    first, last = (np.searchsorted(owners[order], wanted, side=side) for side in ("left", "right"))
    masks = []
    for a, b in zip(first, last, strict=True):
        runs = order[a:b]
        edges = np.stack([starts[runs], ends[runs]], 1).reshape(-1)
        counts = np.diff(edges, prepend=0, append=flat.size)
        masks.append({"size": [height, width], "counts": counts.tolist()})
    return rle.frPyObjects(masks, height, width) if masks else []
