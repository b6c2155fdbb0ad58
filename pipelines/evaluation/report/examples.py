"""The images that a report shows, and their pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2

from panoptic.evaluation.step import evaluation_step
from panoptic.evaluation.tally import Tally
from panoptic.metrics.sentence import error_sentence
from panoptic.png import encode_jpeg
from panoptic.segmentation import Categories, Sample, Segmentation
from panoptic.visualization import errors, overlay
from pipelines.data.loader import evaluation_batches
from pipelines.evaluation.evaluate import Task, placed
from pipelines.evaluation.report.page import Example

WIDTH = 520
"""Largest width of a panel in pixels."""
QUALITY = 82
"""Quality of the JPEGs, 0 to 100."""


def choose(tally: Tally, classes: int, number: int) -> tuple[list[int], list[int]]:
    """Rows of the worst images by their own PQ, and of those around the median.

    No image is both: of few images at most a third is shown as either.
    """
    scored = [(image.pq(classes), row) for row, image in tally.images.items()]
    ranked = [row for pq, row in sorted((pq, row) for pq, row in scored if not math.isnan(pq))]
    typical = min(number, len(ranked) // 3)
    worst = min(number, max(1, typical))
    middle = (len(ranked) - typical) // 2
    return ranked[:worst], ranked[middle : middle + typical]


def pictures(task: Task, tally: Tally, rows: Sequence[int]) -> list[Example]:
    """Image, truth, prediction and errors of some rows, in their order."""
    model, experiment = placed(task), task.experiment
    examples: dict[int, Example] = {}
    for images, targets, samples in evaluation_batches(
        task.manifest, experiment.resize, 1, divisor=model.divisor, threads=1, rows=sorted(rows)
    ):
        maps = evaluation_step(model, images, targets, experiment.engine, ("maps",), losses=False).prediction.maps
        assert maps is not None
        prediction = maps[0]
        sample = samples[0]
        own = tally.images[sample.position].pq(len(model.categories))
        truth = sample.original
        assert truth is not None
        sentence = error_sentence(truth, prediction, model.categories)
        examples[sample.position] = Example(sample.name, own, _panels(sample, prediction, model.categories), sentence)
    return [examples[row] for row in rows]


def _panels(sample: Sample, prediction: Segmentation, categories: Categories) -> dict[str, bytes]:
    """Title to JPEG of the panels of one image."""
    truth = sample.original
    assert truth is not None
    height, width = truth.size
    scale = min(1.0, WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA)
    whole = cv2.resize(sample.image, (width, height), interpolation=cv2.INTER_LINEAR)
    drawn = {
        "image": image,
        "truth": overlay(image, _resized(truth, size), categories),
        "prediction": overlay(image, _resized(prediction, size), categories),
        # matched at the size at which PQ is counted
        "errors": cv2.resize(errors(whole, truth, prediction), size, interpolation=cv2.INTER_AREA),
    }
    return {name: encode_jpeg(picture, QUALITY) for name, picture in drawn.items()}


def _resized(segmentation: Segmentation, size: tuple[int, int]) -> Segmentation:
    segments = cv2.resize(segmentation.segments, size, interpolation=cv2.INTER_NEAREST)
    return replace(segmentation, segments=segments)
