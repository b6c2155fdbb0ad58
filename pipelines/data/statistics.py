"""Statistics of a set of images: counts that add up over shards, and the table of them for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from panoptic.segmentation import Categories, Segmentation

Count = Annotated[int, Field(ge=0)]

BINS = 29
"""Bins of the areas of segments: bin k holds those from 2^k to 2^(k+1) - 1 pixels, and no image has 2^28."""


@dataclass(frozen=True)
class Statistics:
    """Counts over all images of a set. Shapes: C classes, in the order of its categories."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    pixels: Count
    """Pixels of all images."""
    void: Count
    """Pixels that belong to no segment."""
    crowd: Count
    """Pixels of crowds."""
    class_images: tuple[Count, ...]
    """[C], images that have a segment of the class."""
    class_pixels: tuple[Count, ...]
    """[C], crowds included."""
    class_crowds: tuple[Count, ...]
    """[C], segments that are crowds."""
    areas: tuple[tuple[Count, ...], ...]
    """[C, BINS], segments by their number of pixels, in powers of two."""
    segments: tuple[Count, ...] = ()
    """Images by their number of segments: entry n has n."""
    sizes: Mapping[str, Count] = field(default_factory=dict)
    """Images by their size: "height x width" as "480x640"."""


class Segments(NamedTuple):
    """The segments of one image, without their map; N segments."""

    size: tuple[int, int]
    """(H, W)."""
    labels: np.ndarray
    """[N], classes."""
    areas: np.ndarray
    """[N], pixels."""
    crowd: np.ndarray
    """bool [N], segments that are crowds."""

    @classmethod
    def of(cls, truth: Segmentation, areas: np.ndarray | None = None) -> Segments:
        """The segments of a map; `areas` [N] where they are counted already."""
        return cls(truth.size, truth.labels, truth.areas() if areas is None else areas, truth.is_crowd())


def of_images(images: Sequence[Segments], classes: int) -> Statistics:
    """The statistics of some images, of a data set of `classes` classes."""
    labels = np.concatenate([np.zeros(0, np.int64), *(image.labels for image in images)])
    areas = np.concatenate([np.zeros(0, np.int64), *(image.areas for image in images)])
    crowd = np.concatenate([np.zeros(0, bool), *(image.crowd for image in images)])
    numbers = [len(image.labels) for image in images]
    # one number for each pair of image and class, so that several segments of a class in an image count once
    pairs = np.unique(np.repeat(np.arange(len(images)), numbers) * classes + labels)
    # `add.at` adds for every entry of an index, also where a class and a bin occur again
    table = np.zeros((classes, BINS), np.int64)
    np.add.at(table, (labels, np.log2(np.maximum(areas, 1)).astype(np.int64)), 1)
    class_pixels = np.zeros(classes, np.int64)
    np.add.at(class_pixels, labels, areas)
    pixels = sum(height * width for (height, width), *_ in images)
    sizes = Counter(f"{height}x{width}" for (height, width), *_ in images)
    return Statistics(
        pixels=pixels,
        void=pixels - int(areas.sum()),
        crowd=int(areas[crowd].sum()),
        class_images=tuple(np.bincount(pairs % classes, minlength=classes).tolist()),
        class_pixels=tuple(class_pixels.tolist()),
        class_crowds=tuple(np.bincount(labels[crowd], minlength=classes).tolist()),
        areas=tuple(map(tuple, table.tolist())),
        segments=tuple(np.bincount(np.array(numbers, np.int64)).tolist()),
        sizes={size: sizes[size] for size in sorted(sizes, key=_height_and_width)},
    )


def added(parts: Iterable[Statistics], classes: int) -> Statistics:
    """The sum of the statistics of parts, whatever their order; of none, zeros."""
    pixels = void = crowd = 0
    lists = [np.zeros(classes, np.int64) for _ in range(3)]
    areas = np.zeros((classes, BINS), np.int64)
    segments: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    for part in parts:
        pixels, void, crowd = pixels + part.pixels, void + part.void, crowd + part.crowd
        for total, counts in zip(lists, (part.class_images, part.class_pixels, part.class_crowds), strict=True):
            total += np.asarray(counts, np.int64)
        areas += np.asarray(part.areas, np.int64).reshape(classes, BINS)
        segments.update({number: count for number, count in enumerate(part.segments) if count})
        sizes.update(part.sizes)
    return Statistics(
        pixels,
        void,
        crowd,
        *(tuple(total.tolist()) for total in lists),
        areas=tuple(map(tuple, areas.tolist())),
        segments=tuple(segments[number] for number in range(max(segments, default=-1) + 1)),
        sizes={size: sizes[size] for size in sorted(sizes, key=_height_and_width)},
    )


def size_pairs(statistics: Statistics) -> list[tuple[int, int, int]]:
    """(height, width, images) of each size that occurs, in ascending order."""
    return [(*_height_and_width(size), count) for size, count in statistics.sizes.items()]


def class_rows(categories: Categories, segments: Sequence[int], statistics: Statistics | None) -> list[list[str]]:
    """A table of text: a head, and a row for each class with its segments, crowds, images and share of the pixels.

    Args:
        categories: C classes.
        segments: of each class, [C].
        statistics: of the same images; None where nobody counted, as in manifests of earlier versions, which leaves out
            the columns behind the segments.
    """
    head = ["class", "kind", "segments", "crowds", "images", "pixels"]
    rows = []
    for k, (name, thing) in enumerate(zip(categories.names, categories.is_thing, strict=True)):
        row = [name, "thing" if thing else "stuff", f"{segments[k]}"]
        if statistics is not None:
            row += [f"{statistics.class_crowds[k]}", f"{statistics.class_images[k]}", share(statistics, k)]
        rows.append(row)
    return [head if statistics is not None else head[:3], *rows]


def share(statistics: Statistics, label: int) -> str:
    """The share of a class in all pixels, as text."""
    return percent(statistics.class_pixels[label], statistics.pixels)


def percent(part: int, whole: int) -> str:
    """A share as text, with the digits that tell a small one from none."""
    value = 100 * part / max(whole, 1)
    return f"{value:.2f} %" if not part or value >= 0.01 else f"{value:.1g} %"


def _height_and_width(size: str) -> tuple[int, int]:
    height, _, width = size.partition("x")
    return int(height), int(width)
