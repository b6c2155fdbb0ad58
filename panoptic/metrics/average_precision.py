"""Average precision of scored instances, against the masks of the panoptic truth.

A worker compares the masks of an image (IoU as pycocotools computes it) and keeps the table alone
(`InstanceOverlaps`), never masks: a record of a few kilobytes, whatever the size of the image. Which instance
takes which truth is decided at the end, by faster-coco-eval where it is installed (the extra `fast`), else by
pycocotools; the figures are the same to rounding.

The truths are the things of the panoptic map and so never overlap, unlike COCO's instance annotations:
figures compare among themselves and with others "against panoptic masks" only. A crowd takes any number of
instances and counts for nothing, as in COCO.

Shapes: D instances and G truths of an image, C classes, T = 10 IoU thresholds, R = 101 recalls.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

from panoptic.metrics.semantic import known_mean
from panoptic.rle import encode_segments, overlaps
from panoptic.segmentation import Categories, Instances, Segmentation

logger = logging.getLogger(__name__)

LIMIT = 100
"""Instances of a class in an image that are evaluated, those of highest score, as in COCO."""

ANY_AREA = [0, 1e10]
"""The range of areas, in pixels, that leaves nothing out."""

Library = Literal["faster-coco-eval", "pycocotools"]


class ClassOverlaps(NamedTuple):
    """The instances and truths of one class in one image."""

    label: int
    scores: np.ndarray
    """float64 [d], falling."""
    crowd: np.ndarray
    """bool [g], the truths that are crowds."""
    ious: np.ndarray
    """float64 [d, g]; of a crowd, the share of the instance that lies in it."""


@dataclass(frozen=True)
class InstanceOverlaps:
    """Scores, classes and IoUs of one image, all that average precision depends on; by rising class."""

    labels: np.ndarray
    """int64 [D], contiguous classes."""
    scores: np.ndarray
    """float64 [D], falling within a class."""
    truths: np.ndarray
    """int64 [G], contiguous classes."""
    crowd: np.ndarray
    """bool [G]."""
    ious: np.ndarray
    """float64, flat: the tables [d, g] of the classes one after the other."""

    def by_class(self) -> Iterator[ClassOverlaps]:
        """Each class that occurs among the instances or the truths."""
        start = 0
        for label in np.union1d(self.labels, self.truths).tolist():
            scores, crowd = self.scores[self.labels == label], self.crowd[self.truths == label]
            end = start + len(scores) * len(crowd)
            yield ClassOverlaps(label, scores, crowd, self.ious[start:end].reshape(len(scores), len(crowd)))
            start = end


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


def instance_overlaps(truth: Segmentation, instances: Instances, categories: Categories) -> InstanceOverlaps:
    """Compare the predicted instances of one image with the things of its truth.

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
    # a table of IoUs for each class that occurs, the best instances by its truths
    chosen, tables = [np.zeros(0, np.intp)], [np.zeros(0)]
    for label in np.union1d(labels, classes).tolist():
        mine, theirs = np.flatnonzero(labels == label), np.flatnonzero(classes == label)
        best = mine[np.argsort(-instances.scores[mine].astype(np.float64), kind="stable")[:LIMIT]]
        chosen.append(best)
        if len(best) and len(theirs):
            table = overlaps([instances.masks[k] for k in best], [masks[k] for k in theirs], crowd[theirs])
            tables.append(table.ravel())
    order = np.concatenate(chosen)
    return InstanceOverlaps(
        labels[order], instances.scores[order].astype(np.float64), classes, crowd, np.concatenate(tables)
    )


def average_precision(
    images: Sequence[InstanceOverlaps], categories: Categories, library: Library | None = None
) -> Precision:
    """AP and AP50 as COCO defines them: precision at 101 recalls, interpolated, averaged.

    Args:
        images: in the order of the data set, by which ties of score are broken.
        categories: tell which classes are things.
        library: matches and accumulates; by default faster-coco-eval where it is installed.

    Raises:
        ValueError: there is no image.
    """
    if not images:
        raise ValueError("average_precision: no image was evaluated")
    things = list(categories.things)
    precision = _precision(images, things, library or installed())  # [T, R, things], -1 where there is no truth
    known = precision[0, 0] > -1
    ap, ap50 = (np.full(len(categories), np.nan) for _ in range(2))
    there = np.array(things, np.int64)[known]
    ap[there] = 100 * precision[:, :, known].mean((0, 1))
    ap50[there] = 100 * precision[0][:, known].mean(0)
    return Precision(ap, ap50, known_mean(ap), known_mean(ap50))


def installed() -> Library:
    """The fastest library that is installed."""
    return "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"


def _precision(images: Sequence[InstanceOverlaps], things: list[int], library: Library) -> np.ndarray:
    """The precision at each threshold and recall of each thing class, float64 [T, R, things]; -1 without a truth."""
    if not things:
        return np.full((10, 101, 0), -1.0)
    if library == "pycocotools":
        return _pycocotools(images, things)
    try:
        return _faster_coco_eval(images, things)
    except Exception as error:  # whatever another release of it raises: what was evaluated must not be lost
        logger.warning("faster-coco-eval cannot count these instances (%s); pycocotools does", error)
        return _pycocotools(images, things)


def _pycocotools(images: Sequence[InstanceOverlaps], things: list[int]) -> np.ndarray:
    """`_precision` by pycocotools' matching and accumulation, given the overlaps.

    `Any`, because its type stubs leave out the attributes that are set here.
    """
    evaluator: Any = COCOeval(iouType="segm")
    params, place = evaluator.params, {label: k for k, label in enumerate(things)}
    params.maxDets, params.areaRng, params.imgIds, params.catIds = [LIMIT], [ANY_AREA], range(len(images)), things
    evaluator.evalImgs = [None] * (len(things) * len(images))
    for image, record in enumerate(images):
        for part in record.by_class():
            key = image, part.label
            evaluator._gts[key], evaluator._dts[key] = _truths(part), _instances(part)
            evaluator.ious[key] = part.ious if part.ious.size else []
            evaluator.evalImgs[place[part.label] * len(images) + image] = evaluator.evaluateImg(*key, ANY_AREA, LIMIT)
    evaluator._paramsEval = copy.deepcopy(params)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluator.accumulate()
    return evaluator.eval["precision"][..., 0, 0]


def _faster_coco_eval(images: Sequence[InstanceOverlaps], things: list[int]) -> np.ndarray:
    """`_precision` by the C++ of faster-coco-eval."""
    from faster_coco_eval import COCOeval_faster  # pyright: ignore[reportMissingImports]

    class Evaluate(COCOeval_faster):
        """Its evaluation, reading overlaps instead of annotations."""

        def _prepare(self) -> None:
            self.tables: dict[tuple[int, int], Any] = {}
            for image, record in enumerate(images):
                for part in record.by_class():
                    self.tables[image, part.label] = part.ious
                    for truth in _truths(part):
                        self.gt_dataset.append(image, part.label, truth)
                    for instance in _instances(part):
                        self.dt_dataset.append(image, part.label, instance)

        def computeIoU(self, imgId: int, catId: int) -> Any:
            table = self.tables.get((imgId, catId))
            return [] if table is None or not table.size else table

    evaluator: Any = Evaluate(iouType="segm", print_function=logger.debug)
    params = evaluator.params
    params.maxDets, params.areaRng, params.imgIds, params.catIds = [LIMIT], [ANY_AREA], range(len(images)), things
    evaluator.rle_iou_max_workers = 1  # threads would only look up tables
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[..., 0, 0]


def _truths(part: ClassOverlaps) -> list[dict[str, Any]]:
    """The truths as both libraries keep them.

    The area matters for ranges of area alone, and id 0 would read as unmatched.
    """
    crowd = part.crowd.astype(int).tolist()
    return [{"id": k + 1, "area": 1, "iscrowd": many, "ignore": many} for k, many in enumerate(crowd)]


def _instances(part: ClassOverlaps) -> list[dict[str, Any]]:
    """The instances as both libraries keep them."""
    return [{"id": k + 1, "area": 1, "score": score} for k, score in enumerate(part.scores.tolist())]


def _check(truth: Segmentation, instances: Instances, categories: Categories) -> None:
    """Refuse instances that cannot be counted.

    Raises:
        ValueError: as of `instance_overlaps`.
    """
    stuff = sorted({categories.names[label] for label in instances.labels.tolist() if not categories.is_thing[label]})
    if stuff:
        raise ValueError(f"instances: {', '.join(stuff)} is stuff; only things are counted by average precision")
    if not np.isfinite(instances.scores).all():
        raise ValueError("instances: a score is not finite")
    wrong = [tuple(mask["size"]) for mask in instances.masks if tuple(mask["size"]) != truth.size]
    if wrong:
        raise ValueError(f"instances: a mask is {wrong[0]} but the truth {truth.size}; give both the same size")
