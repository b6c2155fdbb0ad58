"""Judging a model: counts that can be added, and the record that comes of them.

A worker counts its own images (`judge`) and hands over a `Tally`; tallies are merged in any way and
summed in the order of the images, so that the result is the same to the last bit however the images
were shared out.

Shapes: B images of a batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from panoptic.engine import Engine, evaluation_step, seed_torch
from panoptic.metrics.quality import QualityCounts, count, quality
from panoptic.metrics.regions import confusion, mean_iou
from panoptic.metrics.report import Evaluation
from panoptic.models.interface import PanopticModel
from panoptic.segmentation import Categories, Segmentation, Targets


class Batch(NamedTuple):
    """Images to judge, with their truth at network size (for losses) and at original size (for PQ)."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    targets: Targets
    truths: Sequence[Segmentation]
    """B maps at `targets.frame.output_sizes`."""
    rows: Sequence[int]
    """The place of each image in its dataset: what the sum is ordered by."""


@dataclass
class Tally:
    """What was counted on some images."""

    counts: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Row to the sparse counts of that image (`QualityCounts.nonzero`)."""
    confusion: np.ndarray | None = None
    """int64 [C, C + 1]."""
    losses: dict[int, tuple[int, dict[str, float]]] = field(default_factory=dict)
    """First row of a batch to its number of images and its mean losses."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Summed: `model` (network, losses, merging), `metric`, `data`."""

    def __add__(self, other: Tally) -> Tally:
        twice = self.counts.keys() & other.counts.keys()
        if twice:
            raise ValueError(f"rows counted more than once: {sorted(twice)[:10]}")
        tables = [t.confusion for t in (self, other) if t.confusion is not None]
        return Tally(
            self.counts | other.counts,
            sum(tables[1:], start=tables[0]) if tables else None,
            self.losses | other.losses,
            {name: self.seconds.get(name, 0.0) + other.seconds.get(name, 0.0) for name in self.seconds | other.seconds},
        )


def judge(model: PanopticModel, batches: Iterable[Batch], engine: Engine) -> Tally:
    """Run the model on each batch and count.

    Args:
        model: unwrapped, in evaluation mode.
        batches: from `pipelines.feed` or anything like it.

    Raises:
        ValueError: a row came twice, or the model is in training mode.
    """
    tally, classes = Tally(), len(model.categories)
    mark = time.perf_counter()
    for batch in batches:
        data = time.perf_counter()
        seed_torch(0, batch.rows[0], 0, 0)  # some losses sample points
        losses, maps, semantics = evaluation_step(model, batch.images, batch.targets, engine)
        ran = time.perf_counter()
        counts = {
            row: count(truth, found, classes).nonzero()
            for row, truth, found in zip(batch.rows, batch.truths, maps, strict=True)
        }
        tables = [confusion(t.semantic(), s, classes) for t, s in zip(batch.truths, semantics, strict=True)]
        means = {name: float(value) for name, value in losses.items()}
        done = time.perf_counter()
        seconds = {"data": data - mark, "model": ran - data, "metric": done - ran}
        tally += Tally(counts, sum(tables[1:], start=tables[0]), {batch.rows[0]: (len(maps), means)}, seconds)
        mark = time.perf_counter()
    return tally


def summarise(tallies: Iterable[Tally], categories: Categories) -> Evaluation:
    """The record of everything that was counted, summed in the order of the rows.

    `timings` are milliseconds an image of one worker.

    Raises:
        ValueError: a row was counted more than once, or nothing was counted.
    """
    whole = sum(tallies, start=Tally())
    if not whole.counts or whole.confusion is None:
        raise ValueError("nothing was evaluated: the split holds no image")
    total = QualityCounts.zeros(len(categories))
    for row in sorted(whole.counts):
        total += QualityCounts.from_nonzero(*whole.counts[row], len(categories))
    images = len(whole.counts)
    losses: dict[str, float] = {}
    for row in sorted(whole.losses):
        number, means = whole.losses[row]
        for name, value in means.items():
            losses[name] = losses.get(name, 0.0) + value * number / images
    losses.pop("total", None)
    timings = {f"{name}_ms": 1000 * value / images for name, value in whole.seconds.items()}
    return Evaluation(quality(total, categories), mean_iou(whole.confusion), losses, timings, images)
