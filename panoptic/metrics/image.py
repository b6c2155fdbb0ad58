"""All that is counted on one image, in a record of some hundred bytes.

| count | remarks |
|---|---|
| PQ | also by the size of the segments: COCO's areas below 32^2, below 96^2 and above |
| boundary PQ | when asked for |
| confusion | true segments by the class of the predicted segment that matches by IoU alone |

A matched pair has the size of its true segment, a false positive its own.

Records of many images are kept packed (`ImageRecords`), since arrays of a few numbers take most of their memory for
themselves: figures and the report need each image's counts until the last image is there.

Shapes: C classes, T true and P predicted segments.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from panoptic.metrics.average_precision import InstanceMatches
from panoptic.metrics.boundary import boundary_overlaps
from panoptic.metrics.panoptic_quality import Pairs, QualityCounts, check_labels, overlaps, pair
from panoptic.segmentation import Segmentation

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""Names and areas in pixels (from, below) of the true segment: COCO's."""

Sparse = tuple[np.ndarray, np.ndarray]
"""Classes and rows of counts, as `QualityCounts.nonzero` gives them."""


@dataclass(frozen=True)
class ImageCounts:
    """The counts of one image."""

    quality: Sparse
    sizes: tuple[Sparse, ...]
    """PQ by the size of the segments, in the order of `SIZES`."""
    confusion: np.ndarray
    """int64 [K, 3]: true class, predicted class, number of segments. Class C is "none": missed or made up."""
    boundary: Sparse | None = None
    instances: InstanceMatches | None = None
    """The predicted instances matched with true things, for AP; None = AP is not counted."""
    recall: tuple[int, int] | None = None
    """Number of true things that some region proposal covers, and of all true things; None = not counted."""
    name: str = ""
    """The image's name."""

    def pq(self, classes: int) -> float:
        """PQ of this image alone, 0 to 100: the mean over the classes that occur in it, NaN for none."""
        counts = QualityCounts.from_nonzero(*self.quality, classes)
        weight = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
        known = weight > 0
        return float(100 * (counts.iou[known] / weight[known]).mean()) if known.any() else float("nan")


class ImageRecords(Mapping[int, ImageCounts]):
    """The counts of images by their rows in the data set, each packed until it is asked for.

    An image of 8 classes with boundary PQ, 20 instances and a name of 24 characters takes 560 bytes here in all, and
    4,300 as an `ImageCounts`; without instances 400 and 3,200 (measured with tracemalloc over 3,000 images). Packing it
    takes 0.15 ms, and 0.05 ms to have it again.
    """

    def __init__(self, images: Mapping[int, ImageCounts] | None = None) -> None:
        self._packed = {row: _pack(counts) for row, counts in (images or {}).items()}

    def __getitem__(self, row: int) -> ImageCounts:
        """The counts of an image, equal to those that were given to the last bit; made anew each time."""
        return _unpack(self._packed[row])

    def __iter__(self) -> Iterator[int]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, row: object) -> bool:
        return row in self._packed

    def add(self, other: ImageRecords) -> None:
        """Add the images of other records.

        Raises:
            ValueError: an image is in both.
        """
        twice = self._packed.keys() & other._packed.keys()
        if twice:
            raise ValueError(f"rows counted more than once: {sorted(twice)[:10]}")
        self._packed |= other._packed


def _pack(image: ImageCounts) -> bytes:
    """All arrays of an image, compressed: of each, the letter of its type, its length and its values."""
    there = [image.boundary is not None, image.instances is not None, image.recall is not None]
    columns = [np.array(there), np.frombuffer(image.name.encode(), np.uint8), image.confusion.ravel()]
    for counts in (image.quality, *image.sizes, image.boundary):
        if counts is not None:
            classes, values = counts
            columns += [classes, values[:, 0], values[:, 1:].ravel().astype(np.int64)]
    if image.instances is not None:
        parts = image.instances
        columns += [parts.labels, parts.scores, parts.taken, parts.crowd, parts.truths]
    if image.recall is not None:
        columns.append(np.array(image.recall))
    small = [_smallest(column) for column in columns]
    return zlib.compress(b"".join(struct.pack("<cI", c.dtype.char.encode(), len(c)) + c.tobytes() for c in small), 1)


def _smallest(column: np.ndarray) -> np.ndarray:
    """A column in the smallest type that holds its numbers exactly."""
    types = [np.uint8, np.uint16, np.int32] if column.dtype.kind in "iub" else [np.float32]
    for kind in types:
        with np.errstate(over="ignore"):
            smaller = column.astype(kind)
        if np.array_equal(smaller, column):
            return smaller
    return column


def _unpack(data: bytes) -> ImageCounts:
    """The inverse of `_pack`."""
    columns = _columns(zlib.decompress(data))
    boundary, instances, recall = next(columns).astype(bool).tolist()
    name, confusion = next(columns).tobytes().decode(), next(columns).astype(np.int64).reshape(-1, 3)

    def counts() -> Sparse:
        classes, iou, numbers = next(columns).astype(np.int64), next(columns), next(columns).reshape(-1, 3)
        return classes, np.concatenate([iou[:, None], numbers], 1).astype(np.float64)

    def matches() -> InstanceMatches:
        labels, scores, taken, crowd, truths = (next(columns) for _ in range(5))
        ints, bits = np.int64, np.uint16
        return InstanceMatches(
            labels.astype(ints), scores.astype(np.float64), taken.astype(bits), crowd.astype(bits), truths.astype(ints)
        )

    return ImageCounts(
        quality=counts(),
        sizes=tuple(counts() for _ in SIZES),
        confusion=confusion,
        boundary=counts() if boundary else None,
        instances=matches() if instances else None,
        recall=tuple(next(columns).tolist()) if recall else None,
        name=name,
    )


def _columns(data: bytes) -> Iterator[np.ndarray]:
    """The arrays of a record, one after the other."""
    start = 0
    while start < len(data):
        kind, length = struct.unpack_from("<cI", data, start)
        column = np.frombuffer(data, kind.decode(), length, start + 5)
        start += 5 + column.nbytes
        yield column


def count_image(
    truth: Segmentation,
    prediction: Segmentation,
    classes: int,
    boundary: bool = False,
    instances: InstanceMatches | None = None,
    name: str = "",
    recall: tuple[int, int] | None = None,
) -> ImageCounts:
    """Compare one predicted map with its truth.

    Args:
        truth: at its original size.
        prediction: at the same size.
        classes: C.
        boundary: count boundary PQ, too.
        instances, name, recall: passed on.

    Raises:
        ValueError: the maps differ in size, or hold a segment or class that does not exist.
    """
    table = overlaps(truth, prediction)
    check_labels(truth.labels, prediction.labels, classes)
    labels = truth.labels, prediction.labels
    crowd = truth.is_crowd()
    pairs = pair(table, truth.labels, crowd, prediction.labels)
    inner = None
    if boundary:
        inner = pair(table, truth.labels, crowd, prediction.labels, boundary_overlaps(truth, prediction))
    return ImageCounts(
        quality=pairs.counts(*labels, classes).nonzero(),
        sizes=_by_size(pairs, table, labels, classes),
        confusion=_confusion(pair(table, truth.labels, crowd, prediction.labels, same_class=False), labels, classes),
        boundary=None if inner is None else inner.counts(*labels, classes).nonzero(),
        instances=instances,
        recall=recall,
        name=name,
    )


def _by_size(
    pairs: Pairs, table: np.ndarray, labels: tuple[np.ndarray, np.ndarray], classes: int
) -> tuple[Sparse, ...]:
    """The counts of each range of `SIZES`."""
    areas = table.sum(1)[1:], table.sum(0)[1:]
    return tuple(
        pairs.counts(
            *labels, classes, ((low <= areas[0]) & (areas[0] < high), (low <= areas[1]) & (areas[1] < high))
        ).nonzero()
        for low, high in SIZES.values()
    )


def _confusion(pairs: Pairs, labels: tuple[np.ndarray, np.ndarray], classes: int) -> np.ndarray:
    """`ImageCounts.confusion` of segments that were paired whatever their class."""
    missed, false = labels[0][pairs.missed], labels[1][pairs.false]
    rows = np.concatenate([labels[0][pairs.truth], missed, np.full(len(false), classes)])
    columns = np.concatenate([labels[1][pairs.prediction], np.full(len(missed), classes), false])
    cells, numbers = np.unique(rows * (classes + 1) + columns, return_counts=True)
    return np.stack([*np.divmod(cells, classes + 1), numbers], 1).astype(np.int64).reshape(-1, 3)
