"""The oracle table of a stored model: evaluated with every choice of its outputs swapped for the truth."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from panoptic.evaluation.oracle import missing_needs, subsets, truth_names
from panoptic.evaluation.tally import Measures
from panoptic.metrics.report import Evaluation
from panoptic.metrics.text import markdown_table
from panoptic.models.base import PanopticModel
from pipelines.cluster.actor_pool import Pool
from pipelines.config import Experiment
from pipelines.data.manifest import Manifest
from pipelines.evaluation.evaluate import HERE, Stored, assign_stored, evaluate_all
from pipelines.tracking import registry, runs

KEY = "oracle_key"
"""Tag of the runs of oracle tables."""

TABLE = "oracle.json"
"""Artifact with the cells of the table."""

logger = logging.getLogger(__name__)


def choices_of(model: PanopticModel, named: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The outputs that each row of the table swaps: every choice that says something, or those named.

    Args:
        model: in evaluation mode.
        named: choices, each of output names joined by "+"; "none" swaps nothing.

    Raises:
        ValueError: an output that the truth cannot stand for, or a choice without what it needs.
    """
    names = truth_names(model)
    if not named:
        return subsets(names, model.truth_needs)
    choices = [tuple(text.split("+")) if text != "none" else () for text in named]
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
    pool: Pool = HERE,
) -> Iterator[tuple[tuple[str, ...], Evaluation]]:
    """Every image of the split for each choice, the choices in their order.

    Args:
        stored: the model.
        manifest: the split.
        experiment: gives the evaluation view, precision and batch.
        choices: from `choices_of`.
        instances: count AP, too. Where what was swapped scores all instances alike, ties go by the order of the
            images, as in COCO's own evaluation.
        pool: actors that share the work; by default this process does it. The figures are the same.

    Raises:
        ValueError: the classes of model and data differ, or images kill every actor.
    """
    measures = [Measures(instances=instances, true=chosen, losses=False) for chosen in choices]
    tasks = [assign_stored(stored, manifest, experiment, measure) for measure in measures]
    for chosen, evaluated in zip(choices, evaluate_all(tasks, pool), strict=True):
        logger.info("evaluated with %s", f"the true {', '.join(chosen)}" if chosen else "the network's own outputs")
        yield chosen, evaluated.evaluation


def record(
    uri: str, identity: str, manifest: Manifest, cells: Sequence[Sequence[str]], tracking: runs.Tracking
) -> runs.Run:
    """Write one MLflow run with an oracle table, which the report of the model's evaluations on these images finds.

    Args:
        uri: of the model.
        identity: tells its version from every other, see `evaluate.identify`.
        manifest: the split.
        cells: of the table, the head first.
        tracking: the store, the experiment, and the name of the run.

    Raises:
        ConnectionError: the store does not take it.
    """
    tags = {KEY: key_of(identity, manifest), "model": uri, "model_identity": identity, "data_hash": manifest.hash}
    data = [runs.DataSet(manifest.split, manifest.hash, manifest.uri, "eval")]
    run = runs.start(tracking, "runs", params={"model": uri}, tags=tags, data=data)
    with runs.ending(run):
        registry.log_artifact(run, TABLE, json.dumps(cells).encode())
        text = markdown_table(cells)
        registry.log_artifact(run, "oracle.md", text.encode())
        runs.describe(run, text)
    return run


def recorded(identity: str, manifest: Manifest, tracking: runs.Tracking) -> list[list[str]]:
    """The cells of the newest oracle table of a model on these images; [] where there is none, or no store answers."""
    uri = runs.resolve_uri(tracking, "runs")
    try:
        run = registry.find_evaluation(KEY, key_of(identity, manifest), tracking.experiment, uri)
        return [] if run is None else json.loads(registry.read_artifact(run, TABLE))
    except (ConnectionError, ValueError) as error:  # the report is worth more
        logger.warning("no oracle table in the report: %s", error)
        return []


def key_of(identity: str, manifest: Manifest) -> str:
    """The key of a model on some images."""
    return hashlib.sha256(f"{identity} {manifest.hash}".encode()).hexdigest()[:32]


def without_stuff_area(stored: Stored) -> Stored:
    """The model with stuff of any size kept: the threshold `stuff_area` costs even a perfect network.

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
