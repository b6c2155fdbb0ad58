"""Validation by the workers of a training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cv2
import torch

from panoptic.distributed import world_size
from panoptic.evaluation.step import evaluation_step
from panoptic.evaluation.tally import Batch, Tally
from panoptic.models.base import PanopticModel
from panoptic.visualization import side_by_side
from pipelines.config import Experiment
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest


def validation_batches(
    manifest: Manifest, experiment: Experiment, divisor: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of a split, as `evaluate_batches` takes it."""
    size, threads = experiment.train.validation_batch, experiment.feed.threads
    for images, targets, samples in evaluation_batches(
        manifest, experiment.resize, size, rank=rank, world=world, divisor=divisor, threads=threads
    ):
        truths = [s.original for s in samples if s.original is not None]
        yield Batch(images, targets, truths, [s.position for s in samples])


def pictures(model: PanopticModel, manifest: Manifest, experiment: Experiment, count: int) -> Iterator[tuple[str, Any]]:
    """Image, truth and prediction side by side, of the first `count` rows: (name, uint8 [H, W, 3])."""
    if count < 1:
        return
    batches = evaluation_batches(manifest, experiment.resize, 1, divisor=model.divisor, threads=1)
    for images, targets, samples in itertools.islice(batches, count):
        maps = evaluation_step(model, images, targets, experiment.engine, ("maps",), losses=False).prediction.maps
        assert maps is not None
        (found,) = maps
        truth = samples[0].original
        assert truth is not None
        image = cv2.resize(samples[0].image, truth.size[::-1], interpolation=cv2.INTER_LINEAR)
        yield samples[0].name, side_by_side(image, truth, found, manifest.categories)


def _gathered(tally: Tally) -> list[Tally]:
    """The tallies of all workers, on each of them."""
    if world_size() == 1:
        return [tally]
    tallies: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(tallies, tally)
    return tallies
