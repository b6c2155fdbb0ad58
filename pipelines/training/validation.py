"""Validation of a training: each worker evaluates its share of the images, rank 0 records the figures of all.

`evaluate_share` is the loop of every evaluation: a validation runs it on the rows of a rank, an evaluation of a
stored model (`pipelines.evaluation.evaluate`) on the rows that an actor is given.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from panoptic.distributed import share_buffers, world_size
from panoptic.evaluation.step import evaluation_step
from panoptic.evaluation.tally import Batch, Measures, Tally, evaluate_batches, summarise
from panoptic.metrics.report import Evaluation, class_rows, class_table, metrics, table
from panoptic.models.base import PanopticModel
from panoptic.segmentation import Sample, Targets
from panoptic.visualization import side_by_side
from pipelines.cluster.file_names import PictureNames
from pipelines.config import Experiment
from pipelines.data.absent import absent_labels
from pipelines.data.loader import evaluation_batches
from pipelines.data.manifest import Manifest
from pipelines.training.state import State

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """An evaluation was left before its last image."""


def validate(state: State, interrupts: Callable[[], bool] | None = None) -> Evaluation | None:
    """The figures of the whole validation split, equal on every worker; rank 0 prints and records them.

    Every worker calls it. The model is left in evaluation mode.

    Args:
        interrupts: asked between batches; True ends the validation of all workers, without figures.

    Returns:
        the figures; None on every worker if one of them was interrupted before its last batch.
    """
    begin = time.perf_counter()
    val, experiment = state.job.val, state.experiment
    model = validated_model(state)
    try:
        tally = evaluate_share(model, val, experiment, rank=state.rank, world=state.world, interrupts=interrupts)
    except Interrupted:
        tally = None
    tallies = _gather(tally)
    if tallies is None:
        if state.tracker is not None:
            print(f"validation at step {state.step}: left after a notice to stop", flush=True)
        return None
    evaluation = summarise(tallies, val.categories)
    if state.tracker is not None:
        _record(state, model, evaluation)
        seconds = time.perf_counter() - begin
        tables = f"{table(evaluation)}\nworst classes\n{class_table(evaluation, 5)}"
        print(f"validation at step {state.step}\n{tables}\n({seconds:.0f} s)", flush=True)
    return evaluation


def validated_model(state: State) -> PanopticModel:
    """The averaged weights where there are any, else the model itself; with rank 0's running statistics everywhere."""
    model = state.model if state.ema is None else state.ema.module
    share_buffers(model)
    return model.eval()  # type: ignore[return-value]


def evaluate_share(
    model: PanopticModel,
    manifest: Manifest,
    experiment: Experiment,
    measures: Measures | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    rows: Sequence[int] | None = None,
    interrupts: Callable[[], bool] | None = None,
) -> Tally:
    """Run the model on a share of a split and count.

    Args:
        model: unwrapped, in evaluation mode.
        experiment: gives the evaluation view, batch, decoding threads and precision.
        measures: what is counted beside PQ and mIoU.
        rank, world: the share of a worker.
        rows: the share itself; whole windows, see `evaluation_window`.
        interrupts: asked before each batch.

    Raises:
        Interrupted: `interrupts` said so.
    """
    batches = share_batches(manifest, experiment, model.divisor, rank=rank, world=world, rows=rows)
    return evaluate_batches(model, _until(interrupts, batches), experiment.engine, measures)


def _until(interrupts: Callable[[], bool] | None, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if interrupts is not None and interrupts():
            raise Interrupted
        yield batch


def share_batches(
    manifest: Manifest,
    experiment: Experiment,
    divisor: int,
    *,
    rank: int = 0,
    world: int = 1,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """A share of a split (as in `evaluate_share`) in the form that `evaluate_batches` takes."""
    size, threads = experiment.train.validation_batch, experiment.feed.threads
    for images, targets, samples in evaluation_batches(
        manifest, experiment.resize, size, rank=rank, world=world, divisor=divisor, threads=threads, rows=rows
    ):
        truths = [sample.original for sample in samples if sample.original is not None]
        absent = absent_labels(manifest.source, manifest.categories, [sample.name for sample in samples])
        yield Batch(images, targets, truths, [sample.position for sample in samples], absent)


def pictures(
    model: PanopticModel, manifest: Manifest, experiment: Experiment, count: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Image, truth and prediction side by side, of the first `count` rows: (name, uint8 [H, W, 3]).

    The names are safe as names of files, and no two are equal. A picture that cannot be drawn is a warning: it is worth
    less than the training that it shows.
    """
    if count < 1:
        return
    names = PictureNames()
    try:
        batches = evaluation_batches(manifest, experiment.resize, 1, divisor=model.divisor, threads=1)
        for images, targets, samples in itertools.islice(batches, count):
            name = names.add(samples[0].name)
            try:
                picture = _picture(model, manifest, experiment, images, targets, samples[0])
            except Exception as error:  # whatever torch or OpenCV raise
                logger.warning("the picture of %s could not be drawn (%s)", samples[0].name, error)
                continue
            yield name, picture
    except Exception as error:  # whatever reading the images raises
        logger.warning("the pictures of the validation could not be drawn (%s)", error)


def _picture(
    model: PanopticModel,
    manifest: Manifest,
    experiment: Experiment,
    images: torch.Tensor,
    targets: Targets,
    sample: Sample,
) -> np.ndarray:
    """Image, truth and prediction of one sample side by side, uint8 [H, W, 3]."""
    maps = evaluation_step(model, images, targets, experiment.engine, ("maps",), losses=False).prediction.maps
    truth = sample.original
    assert maps is not None and truth is not None
    image = cv2.resize(sample.image, truth.size[::-1], interpolation=cv2.INTER_LINEAR)
    return side_by_side(image, truth, maps[0], manifest.categories)


def show_beginning(state: State) -> None:
    """Pictures of a model that has learnt nothing yet, for step 0: there MLflow's slider stands when a page opens.

    Only rank 0 draws them, and only of a run that begins; the model is in evaluation mode afterwards.
    """
    if state.tracker is None or state.step:
        return
    state.model.eval()
    for name, picture in pictures(state.model, state.job.val, state.experiment, state.experiment.train.overlays):
        state.tracker.slider(0, name, picture)


def _record(state: State, model: PanopticModel, evaluation: Evaluation) -> None:
    """Metrics, table of classes and pictures in the MLflow run."""
    tracker, step = state.tracker, state.step
    assert tracker is not None
    tracker.metrics(step, metrics(evaluation))
    tracker.flush()
    text = f"{table(evaluation)}\n\n{class_table(evaluation)}"
    tracker.table(f"classes/step_{step:06d}", class_rows(evaluation), text)
    for name, picture in pictures(model, state.job.val, state.experiment, state.experiment.train.overlays):
        tracker.image(step, name, picture)
        tracker.slider(step, name, picture)


def _gather(tally: Tally | None) -> list[Tally] | None:
    """The tallies of all workers, on each of them; None if one of them has none."""
    tallies: list[Any] = [tally] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(tallies, tally)
    return None if None in tallies else tallies
