"""The oracle table of a stored model: evaluated with every choice of its outputs swapped for the truth."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch

from panoptic.evaluation.oracle import missing_needs, subsets, truth_names
from panoptic.evaluation.tally import Measures, evaluate_batches, summarise
from panoptic.metrics.report import Evaluation
from panoptic.models.base import PanopticModel
from panoptic.training.checkpoint import check_categories
from panoptic.training.device import prepare
from pipelines.config import Experiment
from pipelines.data.manifest import Manifest
from pipelines.evaluation.evaluate import Stored
from pipelines.training.validation import share_batches

logger = logging.getLogger(__name__)


def choices_of(model: PanopticModel, wanted: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Which outputs to swap in each row: all choices that say something, or those wanted.

    Args:
        model: in evaluation mode.
        wanted: names joined by "+", "none" for the network's own outputs.

    Raises:
        ValueError: an output that the truth cannot stand for, or a choice without what it needs.
    """
    names = truth_names(model)
    if not wanted:
        return subsets(names, model.truth_needs)
    choices = [tuple(text.split("+")) if text != "none" else () for text in wanted]
    for chosen in choices:
        if unknown := sorted(set(chosen) - set(names)):
            raise ValueError(f"{'+'.join(chosen)}: {', '.join(unknown)} is none of {', '.join(names)}")
        if needs := missing_needs(chosen, model.truth_needs):
            raise ValueError(f"{'+'.join(chosen)}: says nothing without {', '.join(needs)}")
    return choices


def oracle(
    stored: Stored,
    manifest: Manifest,
    experiment: Experiment,
    choices: Sequence[tuple[str, ...]],
    instances: bool = True,
) -> Iterator[tuple[tuple[str, ...], Evaluation]]:
    """Every image of the split for each choice, in this process (on a GPU when there is one).

    Args:
        stored: the model.
        manifest: the split.
        experiment: gives the evaluation view, precision and batch.
        choices: of `choices_of`.
        instances: count AP, too. Where what was swapped scores all instances alike, ties go by the order of the
            images, as in COCO's own evaluation.

    Raises:
        ValueError: the classes of model and data differ.
    """
    check_categories(stored.model.categories, manifest.categories)
    model = prepare(stored.model, "cuda" if torch.cuda.is_available() else "cpu", experiment.engine).eval()
    for chosen in choices:
        logger.info("evaluation with %s", f"the true {', '.join(chosen)}" if chosen else "the network's own outputs")
        batches = share_batches(manifest, experiment, model.divisor)
        tally = evaluate_batches(model, batches, experiment.engine, Measures(instances=instances, true=chosen))
        yield chosen, summarise([tally], manifest.categories)


def without_stuff_area(stored: Stored) -> Stored:
    """The same model keeping stuff of any size: a threshold costs even a perfect network.

    Raises:
        ValueError: it has no such threshold.
    """
    model = stored.model
    config = model.config
    if "stuff_area" not in {entry.name for entry in fields(config)}:
        raise ValueError(f"{type(config).__name__} has no stuff_area")
    other = replace(config, stuff_area=0).build(model.categories)
    other.load_state_dict(model.state_dict())
    return replace(stored, model=other)
