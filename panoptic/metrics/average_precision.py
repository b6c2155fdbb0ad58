"""Average precision of scored instances, against the masks of the panoptic truth.

A worker compares the masks of an image (IoU as pycocotools computes it), decides which instance takes which truth, and
keeps what came of it alone (`InstanceMatches`): some ten bytes an instance, whatever the size of the image. At the end
the instances of all images stand in flat arrays (`PrecisionCounts`), a class is sorted by score, and precision follows.
Figures are those of pycocotools' COCOeval to the last bit but one (`tests/panoptic/metrics`).

The truths are the things of the panoptic map and so never overlap, unlike COCO's instance annotations:
figures compare among themselves and with others "against panoptic masks" only. A crowd takes any number of
instances and counts for nothing, as in COCO.

Shapes: D instances and G truths of an image, C classes, T = 10 IoU thresholds, R = 101 recalls.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from panoptic.metrics.semantic import known_mean
from panoptic.rle import encode_segments, overlaps
from panoptic.segmentation import Categories, Instances, Segmentation

LIMIT = 100
"""Instances of a class in an image that are evaluated, those of highest score, as in COCO."""

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU from which on an instance takes a truth, float64 [T]."""

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is read, float64 [R]."""

BITS = 1 << np.arange(len(THRESHOLDS), dtype=np.uint16)
"""The bit of each threshold in a number of `InstanceMatches`, uint16 [T]."""


@dataclass(frozen=True)
class InstanceMatches:
    """All that average precision depends on, of one image; instances by rising class."""

    labels: np.ndarray
    """int64 [D], contiguous classes."""
    scores: np.ndarray
    """float64 [D], falling within a class."""
    taken: np.ndarray
    """uint16 [D]: bit t is set where the instance takes a truth that is no crowd at IoU `THRESHOLDS[t]`."""
    crowd: np.ndarray
    """uint16 [D]: bit t is set where it takes none of those but lies in a crowd, and so counts for nothing."""
    truths: np.ndarray
    """int64 [G], the classes of the truths that are no crowds, rising."""


@dataclass(frozen=True)
class Precision:
    """Average precision in percent; NaN for a class without a truth, and where there is none at all."""

    ap: np.ndarray
    """float64 [C], the mean over the ten thresholds."""
    ap50: np.ndarray
    """float64 [C], at IoU 0.5."""
    mean_ap: float
    """The mean of `ap` over the classes that are not NaN."""
    mean_ap50: float
    """The mean of `ap50` over the classes that are not NaN."""


class PrecisionCounts:
    """The instances of many images in flat arrays, 14 bytes each; order of images breaks ties of score, as in COCO."""

    def __init__(self, classes: int) -> None:
        self.images = 0
        self._labels, self._scores = array("H"), array("d")
        self._taken, self._crowd = array("H"), array("H")
        self._truths = np.zeros(classes, np.int64)

    def add(self, image: InstanceMatches) -> None:
        """Add the instances of one image."""
        self.images += 1
        self._labels.frombytes(image.labels.astype(np.uint16).tobytes())
        self._scores.frombytes(image.scores.astype(np.float64).tobytes())
        self._taken.frombytes(image.taken.astype(np.uint16).tobytes())
        self._crowd.frombytes(image.crowd.astype(np.uint16).tobytes())
        self._truths += np.bincount(image.truths, minlength=len(self._truths))

    def precision(self, categories: Categories) -> Precision:
        """AP and AP50 as COCO defines them: precision at 101 recalls, interpolated, averaged.

        Raises:
            ValueError: there is no image.
        """
        if not self.images:
            raise ValueError("average precision: no image was evaluated")
        labels, scores, taken, crowd = map(np.asarray, (self._labels, self._scores, self._taken, self._crowd))
        ap, ap50 = (np.full(len(categories), np.nan) for _ in range(2))
        for label in categories.things:
            if not self._truths[label]:
                continue
            places = np.flatnonzero(labels == label)
            order = places[np.argsort(-scores[places], kind="stable")]
            mine, lost, truths = taken[order], crowd[order], int(self._truths[label])
            # one threshold after the other, as tables of all would take ten times the memory
            at = [100 * _interpolated(mine & bit > 0, lost & bit > 0, truths).mean() for bit in BITS]
            ap[label], ap50[label] = np.mean(at), at[0]
        return Precision(ap, ap50, known_mean(ap), known_mean(ap50))


def average_precision(images: Iterable[InstanceMatches], categories: Categories) -> Precision:
    """AP and AP50 of images in the order of the data set, as `PrecisionCounts.precision` gives them.

    Raises:
        ValueError: there is no image.
    """
    counts = PrecisionCounts(len(categories))
    for image in images:
        counts.add(image)
    return counts.precision(categories)


def match_instances(truth: Segmentation, instances: Instances, categories: Categories) -> InstanceMatches:
    """Compare the predicted instances of one image with the things of its truth.

    By falling score an instance takes, of the truths of its class that are free, the one of highest IoU.

    Args:
        truth: at the size of the instances' masks; segments without a pixel are no truth.
        instances: at most `LIMIT` of each class count, those of highest score.
        categories: tell things from stuff.

    Raises:
        ValueError: an instance has a class of stuff, a score that is not finite, or a mask of another size.
    """
    _check(truth, instances, categories)
    is_thing, labels = np.array(categories.is_thing, bool), np.asarray(instances.labels, np.int64)
    # the truths: things that have a pixel, by class
    things = np.flatnonzero(is_thing[truth.labels] & (truth.areas() > 0))
    things = things[np.argsort(truth.labels[things], kind="stable")]
    masks = encode_segments(truth.segments, things + 1)
    classes, crowd = truth.labels[things].astype(np.int64), truth.is_crowd()[things]
    # the best instances of each class, and their IoUs with the truths of their class
    best = [np.flatnonzero(labels == label) for label in np.unique(labels).tolist()]
    best = [mine[np.argsort(-instances.scores[mine].astype(np.float64), kind="stable")[:LIMIT]] for mine in best]
    order = np.concatenate([np.zeros(0, np.intp), *best])
    ious = np.zeros((len(order), len(things)))
    for mine in best:
        first, after = np.searchsorted(classes, labels[mine[0]] + np.arange(2))
        if first < after:
            table = overlaps([instances.masks[k] for k in mine], masks[first:after], crowd[first:after])
            ious[labels[order] == labels[mine[0]], first:after] = table
    taken, lost = _match(ious, crowd)
    return InstanceMatches(labels[order], instances.scores[order].astype(np.float64), taken, lost, classes[~crowd])


def _match(ious: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`taken` and `crowd` of an image's instances, uint16 [D] each.

    Args:
        ious: float64 [D, G], instances of a class by falling score, 0 for truths of another class; of a crowd, the
            share of the instance that lies in it.
        crowd: bool [G], the truths that are crowds.
    """
    single, within = ious[:, ~crowd], ious[:, crowd].max(1, initial=0.0)
    # the pairs of some threshold: instances by score, their truths by falling IoU, of equals the last as in COCO
    instances, truths = np.nonzero(single >= THRESHOLDS[0])
    values = single[instances, truths]
    order = np.lexsort((-truths, -values, instances))
    taken, used = [0] * len(ious), [0] * single.shape[1]
    for k, truth, bits in zip(*(column[order].tolist() for column in (instances, truths, _bits(values))), strict=True):
        takes = bits & ~taken[k] & ~used[truth]
        taken[k] |= takes
        used[truth] |= takes
    mine = np.array(taken, np.uint16)
    return mine, _bits(within) & ~mine


def _bits(ious: np.ndarray) -> np.ndarray:
    """A number for each IoU whose bit t is set where the IoU is at least `THRESHOLDS[t]`, uint16."""
    return (np.left_shift(1, np.searchsorted(THRESHOLDS, ious, side="right")) - 1).astype(np.uint16)


def _interpolated(taken: np.ndarray, crowd: np.ndarray, truths: int) -> np.ndarray:
    """Precision at each of `RECALLS`, float64 [R]: the highest at that recall or beyond, 0 where none reaches it.

    Args:
        taken: bool [d], whether an instance takes a truth, by falling score.
        crowd: bool [d], whether it counts for nothing.
        truths: the number of truths that can be taken, at least 1.
    """
    right, wrong = np.cumsum(taken, dtype=np.float64), np.cumsum(~(taken | crowd), dtype=np.float64)
    precision = right / (right + wrong + np.spacing(1))
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(highest, 0.0)[np.searchsorted(right / truths, RECALLS)]


def _check(truth: Segmentation, instances: Instances, categories: Categories) -> None:
    """Refuse instances that cannot be counted.

    Raises:
        ValueError: as of `match_instances`.
    """
    stuff = sorted({categories.names[label] for label in instances.labels.tolist() if not categories.is_thing[label]})
    if stuff:
        raise ValueError(f"instances: {', '.join(stuff)} is stuff; only things are counted by average precision")
    if not np.isfinite(instances.scores).all():
        raise ValueError("instances: a score is not finite")
    wrong = [tuple(mask["size"]) for mask in instances.masks if tuple(mask["size"]) != truth.size]
    if wrong:
        raise ValueError(f"instances: a mask is {wrong[0]} but the truth {truth.size}; give both the same size")
