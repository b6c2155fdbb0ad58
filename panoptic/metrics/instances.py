"""Average precision of scored instances, against the masks of the panoptic truth.

Matching and accumulation are pycocotools' own, so that the figures are the official ones. Of each image a
worker keeps only what accumulation needs (`Matches`), never masks: records are small, can be joined in any
grouping, and memory does not grow with the size of the images. faster-coco-eval gives the same figures, but what
it matched cannot be read per image, and `jobs/benchmark.py 5` shows that there is little to gain.

The truths are the things of the panoptic map and so never overlap, unlike COCO's instance annotations:
figures compare among themselves and with others "against panoptic masks" only. A crowd takes any number of
instances and counts for nothing, as in COCO.

Shapes: D instances, C classes, T = 10 IoU thresholds.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from panoptic.merging.centres import encode_masks
from panoptic.segmentation import Categories, Instances, Segmentation

LIMIT = 100
"""The best so many instances of a class in an image are judged, as in COCO."""

ANY_AREA = [0, 1e10]


@dataclass(frozen=True)
class Matches:
    """What became of the instances of one image (or, joined, of many) at each IoU threshold 0.5, 0.55 … 0.95."""

    labels: np.ndarray
    """int64 [D], contiguous classes; within a class and an image by falling score."""
    scores: np.ndarray
    """float64 [D]."""
    matched: np.ndarray
    """bool [T, D], whether it has a truth."""
    ignored: np.ndarray
    """bool [T, D], whether it counts for nothing, because its truth is a crowd."""
    truths: np.ndarray
    """int64 [C], truths of each class that are no crowd."""


@dataclass(frozen=True)
class Precision:
    """Average precision in percent; NaN for a class without a truth, and where there is none at all."""

    ap: np.ndarray
    """float64 [C], the mean over the ten thresholds."""
    ap50: np.ndarray
    """float64 [C], at IoU 0.5."""
    mean_ap: float
    """Over the classes that are not NaN."""
    mean_ap50: float
    """Over the classes that are not NaN."""


def match(truth: Segmentation, found: Instances, categories: Categories) -> Matches:
    """Match the instances of one image to the things of its truth.

    Args:
        truth: at the size of the instances' masks; segments without a pixel are no truth.
        found: at most `LIMIT` of each class count, those of highest score.

    Raises:
        ValueError: an instance has a class of stuff, a score that is not finite, or a mask of another size.
    """
    _check(truth, found, categories)
    judge = _judge([LIMIT])
    truths = _fill(judge, truth, found, categories)
    parts = []
    for label in sorted({label for _, label in [*judge._gts, *judge._dts]}):
        judge.ious[0, label] = judge.computeIoU(0, label)
        result = judge.evaluateImg(0, label, ANY_AREA, LIMIT)
        if result is not None and len(result["dtScores"]):
            parts.append((np.full(len(result["dtScores"]), label), result))
    thresholds = len(judge.params.iouThrs)
    none = np.zeros((thresholds, 0), bool)
    return Matches(
        labels=np.concatenate([np.zeros(0, np.int64), *(labels for labels, _ in parts)]),
        scores=np.concatenate([np.zeros(0), *(result["dtScores"] for _, result in parts)]),
        matched=np.concatenate([none, *(result["dtMatches"] > 0 for _, result in parts)], 1),
        ignored=np.concatenate([none, *(result["dtIgnore"].astype(bool) for _, result in parts)], 1),
        truths=truths,
    )


def join(parts: Sequence[Matches]) -> Matches:
    """The record of several images, in their order (ties of score are broken by it).

    Raises:
        ValueError: there is none.
    """
    if not parts:
        raise ValueError("join: no image was matched")
    return Matches(
        labels=np.concatenate([part.labels for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        matched=np.concatenate([part.matched for part in parts], 1),
        ignored=np.concatenate([part.ignored for part in parts], 1),
        truths=np.sum([part.truths for part in parts], 0),
    )


def average_precision(matches: Matches, categories: Categories) -> Precision:
    """AP and AP50 as COCO defines them: precision at 101 recalls, interpolated, averaged."""
    judge = _judge([max(1, len(matches.labels))])
    judge.params.imgIds, judge.params.catIds = [0], list(categories.things)
    judge.evalImgs = [_class_record(matches, label) for label in categories.things]
    judge._paramsEval = copy.deepcopy(judge.params)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        judge.accumulate()
    precision = judge.eval["precision"][..., 0, 0]  # [T, 101, things], -1 where a class has no truth
    known = precision[0, 0] > -1
    ap, ap50 = (np.full(len(categories), np.nan) for _ in range(2))
    things = np.array(categories.things, np.int64)[known]
    ap[things] = 100 * precision[:, :, known].mean((0, 1))
    ap50[things] = 100 * precision[0][:, known].mean(0)
    return Precision(ap, ap50, _mean(ap), _mean(ap50))


def _judge(limits: list[int]) -> Any:
    """pycocotools' evaluation without files: `Any`, as its type stubs leave out what it reads and writes itself."""
    judge = COCOeval(iouType="segm")
    judge.params.maxDets, judge.params.areaRng = limits, [ANY_AREA]
    return judge


def _check(truth: Segmentation, found: Instances, categories: Categories) -> None:
    stuff = sorted({categories.names[label] for label in found.labels.tolist() if not categories.is_thing[label]})
    if stuff:
        raise ValueError(f"instances: {', '.join(stuff)} is stuff; only things are counted by average precision")
    if not np.isfinite(found.scores).all():
        raise ValueError("instances: a score is not finite")
    wrong = [tuple(mask["size"]) for mask in found.masks if tuple(mask["size"]) != truth.size]
    if wrong:
        raise ValueError(f"instances: a mask is {wrong[0]} but the truth {truth.size}; give both the same size")


def _fill(judge: Any, truth: Segmentation, found: Instances, categories: Categories) -> np.ndarray:
    """Hand truths and instances of image 0 to pycocotools; int64 [C], the truths that are no crowd."""
    truths = np.zeros(len(categories), np.int64)
    crowd, areas = truth.is_crowd(), truth.areas()
    things = np.flatnonzero(np.array(categories.is_thing, bool)[truth.labels] & (areas > 0))
    for k, mask in zip(things, encode_masks(truth.segments, things + 1), strict=True):
        label = int(truth.labels[k])
        truths[label] += not crowd[k]
        judge._gts[0, label].append(
            {
                "id": int(k) + 1,  # 0 would read as unmatched
                "segmentation": mask,
                "area": int(areas[k]),
                "iscrowd": int(crowd[k]),
                "ignore": int(crowd[k]),
            }
        )
    for k, (mask, label, score) in enumerate(zip(found.masks, found.labels, found.scores, strict=True)):
        # the area matters for ranges of area alone, and there is but one
        record = {"id": k + 1, "segmentation": mask, "score": float(score), "area": 1}
        judge._dts[0, int(label)].append(record)
    return truths


def _class_record(matches: Matches, label: int) -> dict[str, np.ndarray] | None:
    """All instances of a class as pycocotools keeps those of an image; None where there is nothing."""
    mine = matches.labels == label
    if not mine.any() and not matches.truths[label]:
        return None
    return {
        "dtScores": matches.scores[mine],
        "dtMatches": matches.matched[:, mine],
        "dtIgnore": matches.ignored[:, mine],
        "gtIgnore": np.zeros(matches.truths[label], np.int64),
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
