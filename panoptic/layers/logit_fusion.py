"""The panoptic fusion module of EfficientPS (arXiv 2004.02307, section 3.5), on NumPy alone.

As the authors' code computes it. A thing's logit at a pixel joins the logit a of its mask and the logit b that the
semantic head gives its class there: (sigmoid(a) + sigmoid(b)) (a + b). Things and classes of stuff then compete pixel
by pixel. Where no thing wins, the semantic head decides alone, and its thing classes become void.

Shapes: K classes, D detections, H x W pixels, h x w a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from panoptic.segmentation import Categories, Segmentation


class ClassLogits(Protocol):
    """The logits of a semantic head at output size; a class at a time, since all may not fit memory."""

    def of(self, label: int) -> np.ndarray:
        """float32 [H, W], the logits of one class."""
        ...

    def best_of(self, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The highest logit of some classes at each pixel, float32 [H, W], and its class, integer [H, W]."""
        ...


@dataclass(frozen=True)
class PastedMask:
    """The logits of one detection's mask at the pixels of its window; they are 0 outside of it."""

    top: int
    """First row of the window."""
    left: int
    """First column of the window."""
    logits: np.ndarray
    """float32 [h, w]."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        height, width = self.logits.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def fuse(
    masks: Sequence[PastedMask],
    rows: np.ndarray,
    semantic: ClassLogits,
    classes: np.ndarray,
    categories: Categories,
    sigmoid: Callable[[np.ndarray], np.ndarray],
    *,
    overlap: float,
    stuff_area: int,
    mask_factor: float,
    inclusive: bool,
) -> Segmentation:
    """The panoptic map of one image.

    Args:
        masks: D, best first.
        rows: float32 [D, 6], x0 y0 x1 y1 in pixels of the output, score, class.
        semantic: logits of all classes.
        classes: integer [H, W], the best class of each pixel, things among them.
        categories: tell things from stuff.
        sigmoid: of float32 arrays.
        overlap, stuff_area, mask_factor, inclusive: of `EfficientPSConfig.fusion`.

    Returns:
        instances by descending score, then stuff in the order of the classes.
    """
    # things compete with the best class of stuff, or with nothing where there is no stuff
    stuff = categories.stuff
    best = semantic.best_of(stuff)[0] if stuff else np.zeros(classes.shape, np.float32)
    owners = np.zeros(classes.shape, np.int32)
    occupied = np.zeros(classes.shape, bool)
    kept: list[int] = []
    for k, mask in enumerate(masks):
        window = mask.window
        inside = mask.logits > 0
        area = np.count_nonzero(inside)
        if area and np.count_nonzero(inside & occupied[window]) / area > overlap:
            continue
        occupied[window] |= inside
        kept.append(k)
        # the logit of the thing: (sigmoid(a) + sigmoid(b)) (a + b) in its window ...
        label = int(rows[k, 5])
        a, b = mask_factor * mask.logits, _inside_box(semantic.of(label), rows[k, :4].tolist(), window, inclusive)
        logits = (sigmoid(a) + sigmoid(b)) * (a + b)
        # ... and 0 outside of it, where a = b = 0: more than stuff whose logits are all negative
        beaten = best < 0
        beaten[window] = logits > best[window]
        best[window] = np.maximum(best[window], logits)
        np.copyto(best, np.maximum(best, 0), where=_outside(beaten, window))
        owners[beaten] = len(kept)
    # where no thing has won the semantic head decides; its things are void, and so is stuff of few pixels
    counts = np.bincount(classes[owners == 0], minlength=len(categories))
    present = [label for label in stuff if counts[label] >= max(1, stuff_area)]
    numbers = np.zeros(len(categories), np.int32)
    numbers[present] = np.arange(len(kept) + 1, len(kept) + len(present) + 1)
    segments = np.where(owners == 0, numbers[classes], owners).astype(np.int32)
    labels = np.array([int(rows[k, 5]) for k in kept] + present, np.int64)
    scores = np.array([float(rows[k, 4]) for k in kept] + [1.0] * len(present), np.float32)
    return Segmentation(segments, labels, scores=scores).compact()


def _inside_box(logits: np.ndarray, box: Sequence[float], window: tuple[slice, slice], inclusive: bool) -> np.ndarray:
    """The logits float32 [H, W] in a mask's window, 0 outside of the box."""
    height, width = logits.shape
    x0, y0, x1, y1 = box
    if inclusive:  # whose far corner is one less; the bounds are the published code's
        top, left = max(int(y0 + 1), 0), max(int(x0 + 1), 0)
        bottom, right = min(round(y1 - 2) + 1, height), min(round(x1 - 2) + 1, width)
    else:
        top, left = int(np.floor(y0)), int(np.floor(x0))
        bottom, right = min(int(np.ceil(y1)), height), min(int(np.ceil(x1)), width)
    rows, columns = window
    top, bottom = np.clip([top, bottom], rows.start, rows.stop)
    left, right = np.clip([left, right], columns.start, columns.stop)
    shown = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    part = logits[top:bottom, left:right]
    shown[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start] = part
    return shown


def _outside(beaten: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """`beaten` bool [H, W] without the pixels of the window."""
    outside = beaten.copy()
    outside[window] = False
    return outside
