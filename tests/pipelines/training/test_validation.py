"""An evaluation that several workers share gives the figures of one worker, to the last bit."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from panoptic import models
from panoptic.evaluation.tally import Measures, evaluate_batches, summarise
from panoptic.metrics.report import metrics
from panoptic.models import EoMTConfig, PanopticDeepLabConfig
from panoptic.segmentation import Categories
from pipelines.data.manifest import Manifest
from pipelines.data.sampler import evaluation_window
from pipelines.presets import PRESETS
from pipelines.training import validation
from pipelines.training.validation import share_batches
from tests.support.small import SMALL, SMALL_DEEPLAB
from tests.support.stored import write_shards

ROWS = 7

CASES = [
    pytest.param(
        config,
        id=f"{kind.__name__}-{name}",
        marks=[] if kind in (PanopticDeepLabConfig, EoMTConfig) else pytest.mark.nightly,
    )
    for kind in typing.get_args(models.Architecture)
    for name, config in list(SMALL[kind].items())[:1]
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, small_categories: Categories) -> Manifest:
    return write_shards(tmp_path_factory.mktemp("shards"), small_categories, ROWS)


@pytest.mark.parametrize("config", CASES)
def test_figures_do_not_depend_on_the_number_of_workers(config, shards: Manifest) -> None:
    torch.manual_seed(0)
    model, demo = config.build(shards.categories).eval(), PRESETS["demo"]()
    experiment = replace(demo, train=replace(demo.train, validation_batch=2))
    measures = Measures(boundary=True, instances=True)

    def figures(world: int) -> dict[str, float]:
        parts = [share_batches(shards, experiment, model.divisor, rank=rank, world=world) for rank in range(world)]
        tallies = [evaluate_batches(model, part, experiment.engine, measures) for part in parts]
        found = metrics(summarise(reversed(tallies), shards.categories))
        return {name: value for name, value in found.items() if "time/" not in name}

    alone = figures(1)
    assert any(name.startswith("val/loss") for name in alone) and alone["val/images"] == ROWS
    for world in (2, 3):
        np.testing.assert_equal(figures(world), alone)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_are_those_of_one_worker(shards: Manifest, batch: int) -> None:
    """In training, and in an evaluation, whose actors take a window each."""
    from pipelines.data.loader import evaluation_batches

    demo = PRESETS["demo"]()
    experiment = replace(demo, train=replace(demo.train, validation_batch=batch))

    def rows_of(world: int) -> list[list[int]]:
        parts = [share_batches(shards, experiment, 8, rank=rank, world=world) for rank in range(world)]
        return [list(found.rows) for part in parts for found in part]

    alone, window = rows_of(1), evaluation_window(ROWS, batch)
    assert sorted(row for rows in alone for row in rows) == list(range(ROWS))
    assert all(rows_of(world) == alone for world in (2, 3, 5, 20))
    chunks = [range(k, min(k + window, ROWS)) for k in range(0, ROWS, window)]
    pieces = [evaluation_batches(shards, demo.resize, batch, divisor=8, rows=chunk) for chunk in chunks]
    assert [[s.position for s in samples] for piece in pieces for _, _, samples in piece] == alone


@pytest.mark.parametrize(("step", "shown"), [(0, 2), (5, 0)])
def test_pictures_of_the_beginning_stand_at_step_0(step: int, shown: int, shards: Manifest) -> None:
    """A run that goes on has them already; a worker without a tracker draws none."""
    demo, calls = PRESETS["demo"](), []
    experiment = replace(demo, train=replace(demo.train, overlays=2), engine=replace(demo.engine, precision="float32"))
    tracker = SimpleNamespace(slider=lambda *given: calls.append(given))
    job, model = SimpleNamespace(val=shards), SMALL_DEEPLAB.build(shards.categories).train()
    state: Any = SimpleNamespace(experiment=experiment, tracker=tracker, job=job, model=model, step=step)
    validation.show_beginning(state)
    assert len(calls) == shown and {where for where, *_ in calls} <= {0}
    assert all(picture.dtype == np.uint8 and picture.ndim == 3 for *_, picture in calls)
    state.tracker = None
    validation.show_beginning(state)
    assert len(calls) == shown


def test_pictures_of_one_stem_have_names_of_their_own_and_one_that_fails_is_a_warning(
    tmp_path: Path, small_categories: Categories, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path, small_categories, 3, names=["d/x.jpg", "e/x.png", "a#1?.jpg"])
    experiment, model = PRESETS["demo"](), SMALL_DEEPLAB.build(small_categories)
    found = dict(validation.pictures(model.eval(), shards, experiment, 3))
    assert list(found) == ["x", "x_png", "a_1_"]

    drawn = validation.side_by_side

    def failing(*given: Any) -> np.ndarray:
        monkeypatch.setattr(validation, "side_by_side", drawn)
        raise cv2.error("not this one")

    monkeypatch.setattr(validation, "side_by_side", failing)
    assert list(dict(validation.pictures(model, shards, experiment, 3))) == ["x_png", "a_1_"]
    assert "the picture of d/x.jpg could not be drawn (not this one)" in caplog.text

    monkeypatch.setattr(validation, "evaluation_batches", lambda *_, **__: iter([("too", "few")]))
    assert list(validation.pictures(model, shards, experiment, 3)) == []
    assert "the pictures of the validation could not be drawn" in caplog.text
