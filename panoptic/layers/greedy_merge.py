"""The greedy merge of overlapping instances and a map of stuff to one panoptic map, in the order of the scores.

Kirillov et al., "Panoptic Segmentation", arXiv 1801.00868, as detectron2 computes it in
`combine_semantic_and_instance_outputs`. Panoptic FPN and Panoptic FCN share it.

Shapes: H x W pixels, D instances, S values of the stuff map, h x w a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from panoptic.segmentation import IGNORE, Segmentation


@dataclass(frozen=True)
class CroppedMask:
    """The mask of one instance, cut to a window of its image."""

    top: int
    """First row of the window."""
    left: int
    """First column of the window."""
    mask: np.ndarray
    """bool [h, w]; nothing of the instance lies outside of the window."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def merge_by_score(
    masks: Sequence[CroppedMask],
    labels: Sequence[int],
    scores: Sequence[float] | np.ndarray,
    stuff: np.ndarray,
    stuff_labels: Sequence[int],
    stuff_scores: Sequence[float] | None = None,
    *,
    confidence: float = 0.5,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> Segmentation:
    """Instances by score, each on the pixels that are free, then stuff on the pixels that are left.

    An instance of which more than `overlap` lies on better ones is dropped, else it takes what is free, however little
    that is. Equal scores keep their order.

    Args:
        masks: D, in any order.
        labels: [D], contiguous classes.
        scores: [D], compared in float32.
        stuff: integer [H, W], 0 to S - 1; 0 is no stuff.
        stuff_labels: [S], the contiguous class of each value of `stuff`, `IGNORE` for those that become void, as 0.
        stuff_scores: [S]; None stands for ones.
        confidence: instances score at least this.
        overlap: share of an instance that better ones may cover.
        stuff_area: a class of stuff with fewer free pixels becomes void.

    Returns:
        instances by descending score, then stuff in the order of its values.
    """
    segments = np.zeros(stuff.shape, np.int32)
    ranking = np.asarray(scores, np.float32)
    kept: list[int] = []
    for k in np.argsort(-ranking, kind="stable").tolist():
        if ranking[k] < confidence:
            break
        # the share of the mask that better instances left free, within the mask's window only
        mask, owners = masks[k].mask, segments[masks[k].window]
        free = owners == 0
        free &= mask
        area = np.count_nonzero(mask)
        if area == 0 or (area - np.count_nonzero(free)) / area > overlap:
            continue
        kept.append(k)
        np.copyto(owners, len(kept), where=free)
    # stuff is counted where no instance is, and numbered behind the instances
    remaining = np.multiply(stuff, segments == 0)
    areas = np.bincount(remaining.reshape(-1), minlength=len(stuff_labels))
    named = np.array(stuff_labels) != IGNORE
    present = np.flatnonzero(named & (areas >= max(1, stuff_area)))
    numbers = np.zeros(len(areas), np.int32)
    numbers[present] = np.arange(len(kept) + 1, len(kept) + len(present) + 1)
    segments += numbers[remaining]
    present_scores = np.ones(len(present)) if stuff_scores is None else np.array(stuff_scores)[present]
    return Segmentation(
        segments,
        np.array([labels[k] for k in kept] + [stuff_labels[k] for k in present.tolist()], np.int64),
        scores=np.concatenate([ranking[kept], present_scores]).astype(np.float32),
    ).compact()


def class_map(
    stuff: np.ndarray, stuff_labels: Sequence[int], merged: Segmentation, is_thing: Sequence[bool]
) -> np.ndarray:
    """int32 [H, W] classes: stuff by its map alone, things from the merged map where the map of stuff has no class.

    Args:
        stuff: integer [H, W], 0 to S - 1.
        stuff_labels: [S], the contiguous class of each value, `IGNORE` for none.
        merged: of `merge_by_score`.
        is_thing: [C], of each class.
    """
    classes = np.array(stuff_labels, np.int32)[stuff]
    merged_classes = merged.semantic()
    thing = np.array([*is_thing, False])  # the last entry, read by `IGNORE`, is void
    return np.where((classes == IGNORE) & thing[merged_classes], merged_classes, classes)
