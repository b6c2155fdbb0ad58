"""Evaluation of a model: counts that can be added, and the record that is computed from them.

A worker counts its own images (`evaluate_batches`) and hands over a `Tally`. Tallies are merged in any order and summed
in the order of the images, so that the result is the same to the last bit however the images were shared out. An image
leaves a record of some hundred bytes, whatever its size; see `ImageRecords`.

Shapes: B images of a batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from panoptic.evaluation.step import EvaluationResult, evaluation_step
from panoptic.metrics.average_precision import PrecisionCounts, match_instances
from panoptic.metrics.image import SIZES, ImageCounts, ImageRecords, Sparse, count_image
from panoptic.metrics.panoptic_quality import QualityCounts, quality
from panoptic.metrics.recall import count_recall
from panoptic.metrics.report import Evaluation
from panoptic.metrics.semantic import confusion, mean_iou
from panoptic.models.base import PanopticModel, Prediction, Wanted
from panoptic.segmentation import IGNORE, VOID, Categories, Instances, Segmentation, Targets
from panoptic.training.config import Engine
from panoptic.training.device import seed_torch


@dataclass(frozen=True)
class Measures:
    """Measures beside PQ and mIoU, which are always counted."""

    boundary: bool = False
    """Count boundary PQ."""
    instances: bool = False
    """Count AP of the instances before merging, and recall of region proposals where a model has them."""
    true: tuple[str, ...] = ()
    """Outputs of the network that the truth takes the place of (see `oracle`)."""
    losses: bool = True
    """Compute the losses."""


class Batch(NamedTuple):
    """Images to evaluate, with their truth at network size (for losses) and at original size (for PQ)."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    targets: Targets
    truths: Sequence[Segmentation]
    """B maps at `targets.frame.output_sizes`."""
    rows: Sequence[int]
    """The place of each image in its dataset, by which sums are ordered."""
    absent: Sequence[frozenset[int]] = ()
    """For each image, the classes that its data set never annotates; none where it is empty. Predictions of them are
    neither right nor wrong."""


@dataclass
class Tally:
    """Counts of some images of a dataset."""

    images: ImageRecords = field(default_factory=ImageRecords)
    """Counts of each image, by its row."""
    confusion: np.ndarray | None = None
    """int64 [C, C + 1], pixels by true and by predicted class (the last: void); None where none are counted."""
    losses: dict[int, tuple[int, dict[str, float]]] = field(default_factory=dict)
    """The number of images and the mean losses of each batch, by its first row."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Summed over batches: `data`, `network`, `loss`, `postprocess`, `metric`."""

    def add(self, other: Tally) -> None:
        """Add the counts of other images.

        Raises:
            ValueError: an image was counted twice.
        """
        self.images.add(other.images)
        self.losses |= other.losses
        if other.confusion is not None:
            self.confusion = other.confusion if self.confusion is None else self.confusion + other.confusion
        for name, value in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value


def evaluate_batches(
    model: PanopticModel, batches: Iterable[Batch], engine: Engine, measures: Measures | None = None
) -> Tally:
    """Run a model on each batch and count.

    Args:
        model: unwrapped, in evaluation mode.
        batches: images with their truth, each image once.
        engine: precision and memory format of the network.
        measures: counted beside PQ and mIoU; only the losses by default.

    Raises:
        ValueError: a row came twice, or the model is in training mode.
    """
    tally, measures = Tally(), measures or Measures()
    mark = time.perf_counter()
    for batch in batches:
        data = time.perf_counter() - mark
        seed_torch(0, batch.rows[0], 0, 0)  # some losses sample points
        want: tuple[Wanted, ...] = ("maps", "semantics")
        if measures.instances:
            want = (*want, "instances", "proposals")
        result = evaluation_step(model, batch.images, batch.targets, engine, want, measures.true, measures.losses)
        counting = time.perf_counter()
        part = _counted(batch, result, model.categories, measures)
        part.seconds = {"data": data, **result.seconds, "metric": time.perf_counter() - counting}
        tally.add(part)
        mark = time.perf_counter()
    return tally


def _counted(batch: Batch, result: EvaluationResult, categories: Categories, measures: Measures) -> Tally:
    """The counts of one batch, without times."""
    tally, classes, prediction = Tally(), len(categories), result.prediction
    assert prediction.maps is not None and prediction.semantics is not None
    if any(batch.absent):
        prediction = _without_absent(prediction, batch.absent)
        assert prediction.maps is not None and prediction.semantics is not None
    for k, (row, truth) in enumerate(zip(batch.rows, batch.truths, strict=True)):
        scored = prediction.instances
        instances = None if scored is None else match_instances(truth, scored[k], categories)
        recall = None
        if prediction.proposals is not None:
            covered = count_recall(truth, prediction.proposals[k].cpu().numpy(), categories)
            recall = int(covered.covered.sum()), int(covered.total.sum())
        name = batch.targets.names[k]
        counts = count_image(truth, prediction.maps[k], classes, measures.boundary, instances, name, recall)
        pixels = confusion(truth.semantic(), prediction.semantics[k], classes)
        tally.add(Tally(ImageRecords({row: counts}), pixels))
    means = {name: float(value) for name, value in result.losses.items()}
    if means:
        tally.losses = {batch.rows[0]: (len(prediction.maps), means)}
    return tally


def _without_absent(prediction: Prediction, absent: Sequence[frozenset[int]]) -> Prediction:
    """The prediction without the classes of each image that nobody annotated there.

    Their segments and pixels become void, so that a true segment that they cover is a miss, but they are no false
    positives.
    """
    lists = [np.array(sorted(labels), np.int64) for labels in absent]
    maps, instances, semantics = prediction.maps, prediction.instances, prediction.semantics
    return replace(
        prediction,
        maps=maps and [_segments_without(one, labels) for one, labels in zip(maps, lists, strict=True)],
        instances=instances and [_instances_without(one, labels) for one, labels in zip(instances, lists, strict=True)],
        semantics=semantics
        and [
            np.where(np.isin(one, labels), IGNORE, one).astype(one.dtype)
            for one, labels in zip(semantics, lists, strict=True)
        ],
    )


def _segments_without(segmentation: Segmentation, labels: np.ndarray) -> Segmentation:
    gone = np.isin(segmentation.labels, labels)
    if not gone.any():
        return segmentation
    numbers = np.concatenate([[VOID], np.where(gone, VOID, np.arange(1, len(gone) + 1))]).astype(np.int32)
    return replace(segmentation, segments=numbers[segmentation.segments]).compact()


def _instances_without(instances: Instances, labels: np.ndarray) -> Instances:
    kept = ~np.isin(instances.labels, labels)
    masks = [mask for mask, keep in zip(instances.masks, kept.tolist(), strict=True) if keep]
    return Instances(masks, instances.labels[kept], instances.scores[kept], instances.boxes[kept])


def gather(tallies: Iterable[Tally]) -> Tally:
    """The sum of several tallies.

    Raises:
        ValueError: an image was counted twice.
    """
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    return whole


def summarise(tallies: Iterable[Tally], categories: Categories) -> Evaluation:
    """The evaluation of everything that was counted, summed in the order of the rows.

    Its `timings` are milliseconds that one worker spends on an image.

    Raises:
        ValueError: a row was counted more than once, or nothing was counted.
    """
    whole = gather(tallies)
    if not whole.images or whole.confusion is None:
        raise ValueError("nothing was evaluated: the split holds no image")
    sums = _Sums(len(categories))
    for row in sorted(whole.images):
        sums.add(whole.images[row])
    number, quality_of = len(whole.images), lambda array: quality(QualityCounts.from_array(array), categories)
    return Evaluation(
        quality=quality_of(sums.quality),
        regions=mean_iou(whole.confusion),
        losses=_mean_losses(whole, number),
        timings={f"{name}_ms": 1000 * value / number for name, value in whole.seconds.items()},
        images=number,
        sizes={name: quality_of(part) for name, part in zip(SIZES, sums.sizes, strict=True)},
        boundary=None if sums.boundary is None else quality_of(sums.boundary),
        precision=sums.instances.precision(categories) if sums.instances.images else None,
        proposal_recall=float(np.mean(sums.recalls)) if sums.recalls else float("nan"),
        image_pq=float(np.nanmean(sums.single)) if (~np.isnan(sums.single)).any() else float("nan"),
        confusion=sums.confusion,
    )


class _Sums:
    """The sums over images, which are added one after the other."""

    def __init__(self, classes: int) -> None:
        self.quality, self.sizes = np.zeros((classes, 4)), [np.zeros((classes, 4)) for _ in SIZES]
        self.boundary: np.ndarray | None = None
        """The sums of counts of boundaries; None where no image has any."""
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)
        """Segments by true and by predicted class, the last of each "none"."""
        self.single: list[float] = []
        """PQ of each image."""
        self.instances = PrecisionCounts(classes)
        self.recalls: list[float] = []
        """Recall of region proposals in percent, of each image that has things."""

    def add(self, image: ImageCounts) -> None:
        classes = len(self.quality)
        _add(self.quality, image.quality)
        for array, counts in zip(self.sizes, image.sizes, strict=True):
            _add(array, counts)
        if image.boundary is not None:
            self.boundary = np.zeros((classes, 4)) if self.boundary is None else self.boundary
            _add(self.boundary, image.boundary)
        rows, columns, numbers = image.confusion.T
        self.confusion[rows, columns] += numbers  # cells of one image differ
        self.single.append(image.pq(classes))
        if image.instances is not None:
            self.instances.add(image.instances)
        if image.recall and image.recall[1]:
            self.recalls.append(100 * image.recall[0] / image.recall[1])


def _add(array: np.ndarray, counts: Sparse) -> None:
    """Add an image's counts of classes to their sums float64 [C, 4]."""
    array[counts[0]] += counts[1]


def _mean_losses(whole: Tally, images: int) -> dict[str, float]:
    """Mean over all images of each term; the sum, which the terms have already, is left out."""
    losses: dict[str, float] = {}
    for row in sorted(whole.losses):
        number, means = whole.losses[row]
        for name, value in means.items():
            losses[name] = losses.get(name, 0.0) + value * number / images
    losses.pop("total", None)
    return losses
