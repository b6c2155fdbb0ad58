"""Panoptic quality: PQ = SQ x RQ (Kirillov et al., Panoptic Segmentation, CVPR 2019, equation 1).

The rules are those of the official panopticapi, number for number, except that areas are counted from
pixels (panopticapi trusts the area in the JSON, so a wrong one there yields PQ above 100):

- A predicted and a true segment match when they have one class, the true one is no crowd, and
  IoU > 0.5, where pixels of the prediction on void truth are not part of the union.
- A true segment without a match is a miss (FN) unless it is a crowd.
- A predicted segment without a match is a false positive (FP) unless more than half of it lies on void
  truth and on the crowd segment of its class. Of several crowd segments of a class the last one counts.
- Void in a prediction is no segment: it matches nothing and costs only what it leaves unfound.
- A class counts in the averages if it has a match, a false positive or a miss.

A segment without a pixel does not exist here, on either side. (panopticapi refuses it in a prediction
and calls it a miss in the truth; `from_coco` refuses such a file in both places.)

IoUs are added in the order of the true segments. panopticapi adds in the order of the ids in the PNG,
so sums agree to the last bit where a record lists ascending ids, and to rounding otherwise.

Shapes: H x W pixels, C classes, T true and P predicted segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from panoptic.metrics.semantic import BLOCK, runs, runs_by_block, tabulate
from panoptic.png import MAX_ID, decode_colours, pack_colours
from panoptic.segmentation import Categories, Segmentation

MULTIPLIERS = tuple(np.uint32(number) for number in (2654435769, 2246822519, 3266489917, 668265263, 374761393))
"""Odd numbers whose products spread over 32 bits; the first is 2^32 divided by the golden ratio."""
MOST_BITS = 16
"""The most bits of an index into a hash table, which then has a size of half a megabyte."""


@dataclass(frozen=True)
class QualityCounts:
    """The counts that PQ is computed from; those of images, workers or shards are merged with `+`."""

    iou: np.ndarray
    """float64 [C], the summed IoU of matched pairs."""
    tp: np.ndarray
    """int64 [C], matched pairs."""
    fp: np.ndarray
    """int64 [C], predicted segments without a match."""
    fn: np.ndarray
    """int64 [C], true segments without a match."""

    @classmethod
    def zeros(cls, classes: int) -> QualityCounts:
        """The counts of no image."""
        return cls(np.zeros(classes), *(np.zeros(classes, np.int64) for _ in range(3)))

    def __add__(self, other: QualityCounts) -> QualityCounts:
        return QualityCounts(self.iou + other.iou, self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    def to_array(self) -> np.ndarray:
        """float64 [C, 4] of (iou, tp, fp, fn), for an all-reduce; exact."""
        return np.stack([self.iou, self.tp, self.fp, self.fn], 1).astype(np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> QualityCounts:
        """The inverse of `to_array`, also of a sum of such arrays."""
        iou, *counts = np.asarray(array, np.float64).T
        return cls(iou.copy(), *(np.rint(c).astype(np.int64) for c in counts))

    def nonzero(self) -> tuple[np.ndarray, np.ndarray]:
        """Sparse form: the K classes that occur int64 [K] and their rows of `to_array` [K, 4]."""
        classes = np.flatnonzero(self.tp + self.fp + self.fn)
        return classes, self.to_array()[classes]

    @classmethod
    def from_nonzero(cls, classes: np.ndarray, rows: np.ndarray, size: int) -> QualityCounts:
        """The inverse of `nonzero` for C = `size`; a class that appears several times is summed."""
        array = np.zeros((size, 4))
        np.add.at(array, np.asarray(classes, np.int64), np.asarray(rows, np.float64).reshape(-1, 4))
        return cls.from_array(array)


def count(truth: Segmentation, prediction: Segmentation, categories: Categories | int) -> QualityCounts:
    """The counts of one image: match its prediction with its truth.

    Args:
        truth: at its original size.
        prediction: at the same size.
        categories: of the dataset, or just their number C.

    Raises:
        ValueError: the maps differ in size, or hold a segment or class that does not exist.
    """
    pixels = overlaps(truth, prediction)
    return match(pixels, truth.labels, truth.is_crowd(), prediction.labels, categories)


def overlaps(truth: Segmentation, prediction: Segmentation) -> np.ndarray:
    """The pixels that each true and each predicted segment share, int64 [T + 1, P + 1]; row and column 0 are void.

    Raises:
        ValueError: the maps differ in size, or hold a segment that does not exist.
    """
    if truth.size != prediction.size:
        raise ValueError(
            f"the truth is {truth.size} but the prediction is {prediction.size} (height, width); "
            "PQ is taken at the size of the truth: resize the prediction"
        )
    a, b, lengths = runs(truth.segments, prediction.segments)
    for name, indices, labels in (("truth", a, truth.labels), ("prediction", b, prediction.labels)):
        if indices.size and not 0 <= indices.min() <= indices.max() <= len(labels):
            raise ValueError(
                f"{name}: segments run from {indices.min()} to {indices.max()} but {len(labels)} are listed"
            )
    return tabulate(a, b, lengths, len(truth.labels) + 1, len(prediction.labels) + 1)


def count_coco(
    truth: tuple[bytes, Mapping], prediction: tuple[bytes, Mapping], categories: Categories, name: str
) -> QualityCounts:
    """`count` straight from two COCO-panoptic PNGs and their records, without renumbered maps.

    Raises:
        ValueError: sizes differ, a PNG holds a segment that its record does not list, or a category is
            unknown; the message starts with `name`. `png.from_coco` lists every problem of one file.
    """
    try:
        maps = [decode_colours(png) for png, _ in (truth, prediction)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sizes = [colours.shape[:2] for colours in maps]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{name}: the truth is {sizes[0]} but the prediction is {sizes[1]} (height, width)")
    *packed, lengths = _runs_of_colours(*maps)
    ids = [values & MAX_ID for values in packed]
    infos = [record["segments_info"] for _, record in (truth, prediction)]
    a, b = (_indices(values, [i["id"] for i in listed], name) for values, listed in zip(ids, infos, strict=True))
    index = {category: k for k, category in enumerate(categories.ids)}
    try:
        labels = [np.array([index[i["category_id"]] for i in listed], np.int64) for listed in infos]
    except KeyError as error:
        raise ValueError(f"{name}: category {error} is not among the dataset's categories") from error
    crowd = np.array([bool(i.get("iscrowd", 0)) for i in infos[0]], bool)
    pixels = tabulate(a, b, lengths, len(labels[0]) + 1, len(labels[1]) + 1)
    return match(pixels, labels[0], crowd, labels[1], categories)


def _runs_of_colours(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`runs` of a pair of maps uint8 [H, W, 3 or 4], whose values are those of `pack_colours`.

    Packed block by block, as whole maps of integers are fresh memory for every image: where the system takes that back
    in between, as it does from small processes, its pages cost as much as the decoding.
    """
    maps = [colours.reshape(1, -1, colours.shape[2]) for colours in (first, second)]
    packed = np.empty((2, 1, BLOCK + 1, 4), np.uint8)

    def read(block: slice) -> tuple[np.ndarray, np.ndarray]:
        pixels = block.stop - block.start
        a, b = (pack_colours(colours[:, block], out[:, :pixels])[0] for colours, out in zip(maps, packed, strict=True))
        return a, b

    return runs_by_block(maps[0].shape[1], read)


def _indices(values: np.ndarray, listed: list[int], name: str) -> np.ndarray:
    """The position 1..N of each id in `listed`, 0 for void.

    Args:
        values: int32 [R], ids of a PNG.
        listed: the N ids of its record.
        name: of the file, for the error message.

    Raises:
        ValueError: an id is not listed.
    """
    ids = np.array([0, *listed], np.int64)
    place = _places(values, ids)
    unlisted = values[ids.take(place) != values]
    if unlisted.size:
        first = np.unique(unlisted)[:8].tolist()
        raise ValueError(f"{name}: the PNG holds segments that the record does not list: {first}")
    return place


def _places(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The place of each value in `ids`, if it is in there; else any place.

    A hash table without collisions, for which a few multipliers are tried (multiplicative hashing: Knuth, The Art of
    Computer Programming, volume 3, section 6.4), is looked up four times faster than a binary search. The table is
    about 16 N^2 entries large, so that most multipliers give one, and the search does where it would be too large.
    """
    bits = (8 * len(ids) ** 2).bit_length()
    numbers = np.arange(len(ids))
    keys = ids.astype(np.uint32)
    if bits <= MOST_BITS and ids.min() >= 0 and ids.max() <= MAX_ID:
        table, shift = np.zeros(1 << bits, np.intp), np.uint32(32 - bits)
        for multiplier in MULTIPLIERS:
            entries = keys * multiplier >> shift
            table[entries] = numbers
            if (table[entries] == numbers).all():
                return table.take(values.astype(np.uint32) * multiplier >> shift)
    order = np.argsort(ids, kind="stable")
    return order[np.minimum(np.searchsorted(ids[order], values), len(ids) - 1)]


def match(
    pixels: np.ndarray,
    truth_labels: np.ndarray,
    truth_crowd: np.ndarray,
    prediction_labels: np.ndarray,
    categories: Categories | int,
) -> QualityCounts:
    """The counts of one image from its table of overlaps.

    Args:
        pixels, truth_labels, truth_crowd, prediction_labels: as of `pair`.
        categories: of the dataset, or just their number C.

    Raises:
        ValueError: a label lies outside 0..C-1.
    """
    classes = categories if isinstance(categories, int) else len(categories)
    check_labels(truth_labels, prediction_labels, classes)
    return pair(pixels, truth_labels, truth_crowd, prediction_labels).counts(truth_labels, prediction_labels, classes)


def check_labels(truth_labels: np.ndarray, prediction_labels: np.ndarray, classes: int) -> None:
    """Refuse classes that do not exist.

    Raises:
        ValueError: a label lies outside 0..C-1.
    """
    for name, labels in (("truth", truth_labels), ("prediction", prediction_labels)):
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"{name}: labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")


@dataclass(frozen=True)
class Pairs:
    """The segments of one image as matched, missed, false, or none of these (forgiven or without a pixel)."""

    truth: np.ndarray
    """int64 [K], the true segments (0..T-1) that have a match, in order."""
    prediction: np.ndarray
    """int64 [K], their matches (0..P-1)."""
    iou: np.ndarray
    """float64 [K]."""
    missed: np.ndarray
    """bool [T], true segments without a match that count (FN)."""
    false: np.ndarray
    """bool [P], predicted segments without a match that count (FP)."""

    def counts(
        self, truth_labels: np.ndarray, prediction_labels: np.ndarray, classes: int, among: Among | None = None
    ) -> QualityCounts:
        """The counts, summed by class.

        Args:
            truth_labels: int [T].
            prediction_labels: int [P].
            classes: C.
            among: the true and the predicted segments that count, all by default. A matched pair counts if its true
                segment does.
        """
        pairs, missed, false = np.ones(len(self.truth), bool), self.missed, self.false
        if among is not None:
            pairs, missed, false = among[0][self.truth], missed & among[0], false & among[1]
        labels = truth_labels[self.truth[pairs]]
        return QualityCounts(
            np.bincount(labels, weights=self.iou[pairs], minlength=classes),
            np.bincount(labels, minlength=classes),
            np.bincount(prediction_labels[false], minlength=classes),
            np.bincount(truth_labels[missed], minlength=classes),
        )


Among = tuple[np.ndarray, np.ndarray]
"""A choice of true and of predicted segments, bool [T] and bool [P]."""


def pair(
    pixels: np.ndarray,
    truth_labels: np.ndarray,
    truth_crowd: np.ndarray,
    prediction_labels: np.ndarray,
    boundary: np.ndarray | None = None,
    same_class: bool = True,
) -> Pairs:
    """Match the segments of one image (see the rules above).

    Args:
        pixels: int64 [T + 1, P + 1], the pixels that truth t and prediction p share; row and column 0 are void.
        truth_labels: int [T], the class of each true segment.
        truth_crowd: bool [T].
        prediction_labels: int [P], the class of each predicted segment.
        boundary: int64 [T + 2, P + 2], the same of segments without their inner pixels, which are row and
            column -1; the IoU of a pair is then the smaller one of both tables.
        same_class: only segments of one class match.
    """
    truth_area, area = pixels.sum(1)[1:], pixels.sum(0)[1:]
    on_void, shared = pixels[0, 1:], pixels[1:, 1:]
    # the pairs that share a pixel and may match, in order of t, then p
    t, p = np.nonzero(shared)
    allowed = ~truth_crowd[t]
    if same_class:
        allowed &= truth_labels[t] == prediction_labels[p]
    t, p = t[allowed], p[allowed]
    # IoU, the prediction's pixels on void truth apart
    overlap = shared[t, p]
    union = area[p] + truth_area[t] - overlap - on_void[p]
    iou = overlap / union
    if boundary is not None:
        inner = boundary[t + 1, p + 1]
        iou = np.minimum(iou, inner / (boundary.sum(0)[p + 1] + boundary.sum(1)[t + 1] - inner - boundary[0, p + 1]))
    # at most one match a segment, as segments of one map do not overlap
    matched = iou > 0.5
    t, p, iou = t[matched], p[matched], iou[matched]

    # misses: true segments without a match that are no crowd
    missed = (truth_area > 0) & ~truth_crowd
    missed[t] = False
    # false positives: predicted segments without a match of which half or more lies elsewhere than on void and on the
    # crowd of their class, whose row is looked up by class, 0 (void) for none; the last crowd of a class wins
    classes = 1 + max(truth_labels.max(initial=0), prediction_labels.max(initial=0))
    crowd_of = np.zeros(classes, np.int64)
    crowds = np.flatnonzero(truth_crowd & (truth_area > 0))
    crowd_of[truth_labels[crowds]] = crowds + 1
    row = crowd_of[prediction_labels]
    forgiven = on_void + np.where(row > 0, pixels[row, np.arange(1, len(area) + 1)], 0)
    false = (area > 0) & (2 * forgiven <= area)
    false[p] = False
    return Pairs(t, p, iou, missed, false)


@dataclass(frozen=True)
class Group:
    """The averages over a group of classes, in percent; NaN where no class of the group occurs."""

    pq: float
    sq: float
    rq: float
    classes: int
    """Number of classes of the group that occur, and so are averaged."""


@dataclass(frozen=True)
class Quality:
    """PQ, SQ and RQ in percent, of groups and of each class."""

    all: Group
    things: Group
    stuff: Group
    pq: np.ndarray
    """float64 [C], NaN for a class without a match, a false positive or a miss."""
    sq: np.ndarray
    """float64 [C], 0 for a class that occurs but was never matched."""
    rq: np.ndarray
    """float64 [C]."""
    counts: QualityCounts
    categories: Categories


def quality(counts: QualityCounts, categories: Categories) -> Quality:
    """PQ = sum of IoU / (TP + FP/2 + FN/2) of each class, and its average over the classes that occur.

    Raises:
        ValueError: the counts are of another number of classes.
    """
    if len(counts.iou) != len(categories):
        raise ValueError(f"counts of {len(counts.iou)} classes do not fit a dataset of {len(categories)}")
    weight = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
    occurs = weight > 0
    absent = np.where(occurs, 0.0, np.nan)
    pq = 100 * np.divide(counts.iou, weight, out=absent.copy(), where=occurs)
    sq = 100 * np.divide(counts.iou, counts.tp, out=absent.copy(), where=counts.tp > 0)
    rq = 100 * np.divide(counts.tp, weight, out=absent.copy(), where=occurs)

    def average(classes: tuple[int, ...]) -> Group:
        members = [c for c in classes if occurs[c]]
        if not members:
            return Group(float("nan"), float("nan"), float("nan"), 0)
        means = [float(values[members].mean()) for values in (pq, sq, rq)]
        return Group(means[0], means[1], means[2], len(members))

    every = average(tuple(range(len(categories))))
    return Quality(every, average(categories.things), average(categories.stuff), pq, sq, rq, counts, categories)
