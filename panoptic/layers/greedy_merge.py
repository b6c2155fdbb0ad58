"""Merge rules of the top-down models: overlapping instances and a map of stuff to one panoptic map.

Shapes: H x W pixels, D instances, S stuff classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from panoptic.segmentation import Categories, Segmentation


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


def merge_instances(
    instances: Sequence[Pasted],
    labels: Sequence[int],
    scores: Sequence[float],
    stuff: np.ndarray,
    categories: Categories,
    *,
    confidence: float = 0.5,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> Segmentation:
    """Panoptic FPN's rule, as detectron2 has it: better instances first, stuff where none is.

    An instance of which more than `overlap` lies on better ones is dropped, else it takes what is free,
    however little that is. Equal scores keep their order.

    Args:
        instances: D, in any order.
        labels: [D], contiguous classes.
        scores: [D].
        stuff: integer [H, W], 1 + the place of each pixel's class in `categories.stuff`, 0 for none.
        categories: tell which classes stuff holds.
        confidence: instances score at least this.
        overlap: share of an instance that better ones may cover.
        stuff_area: a class of stuff with fewer free pixels becomes void.

    Returns:
        instances by descending score, then stuff in the order of classes with score 1.
    """
    segments = np.zeros(stuff.shape, np.int32)
    kept: list[int] = []
    ranking = np.asarray(scores, np.float32)
    for k in np.argsort(-ranking, kind="stable").tolist():
        if ranking[k] < confidence:
            break
        mask, here = instances[k].mask, segments[instances[k].window]
        free = here == 0
        free &= mask
        area = np.count_nonzero(mask)
        if area == 0 or (area - np.count_nonzero(free)) / area > overlap:
            continue
        kept.append(k)
        np.copyto(here, len(kept), where=free)
    found, areas = _free_stuff(segments, stuff, len(categories.stuff))
    present = np.flatnonzero(areas >= max(1, stuff_area))
    present = present[present > 0]
    table = np.zeros(len(areas), np.int32)
    table[present] = np.arange(len(kept) + 1, len(kept) + len(present) + 1)
    segments += table[found]
    every = [labels[k] for k in kept] + [categories.stuff[k - 1] for k in present.tolist()]
    ranks = np.concatenate([ranking[kept], np.ones(len(present), np.float32)])
    return Segmentation(segments, np.array(every, np.int64), scores=ranks.astype(np.float32)).compact()


def _free_stuff(segments: np.ndarray, stuff: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`stuff` where no segment is, 0 elsewhere, and the pixels of each class int64 [S + 1]."""
    found = np.multiply(stuff, segments == 0)
    return found, np.bincount(found.reshape(-1), minlength=classes + 1)
