"""The oracle table: the same figures from this process and from actors, whatever is swapped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from panoptic.evaluation.oracle import truth_names
from panoptic.metrics.report import metrics
from panoptic.segmentation import Categories
from pipelines.cluster.actor_pool import Pool
from pipelines.evaluation.evaluate import Stored, options_of
from pipelines.evaluation.oracle import choices_of, oracle, without_stuff_area
from pipelines.presets import PRESETS
from tests.support.small import SMALL_DEEPLAB
from tests.support.stored import OPTIONS, write_shards

ROWS = 11
"""Six windows of images for each choice, the last one smaller."""


@pytest.fixture
def stored(small_categories: Categories) -> Stored:
    """A model that was never trained, and would drop all stuff."""
    torch.manual_seed(0)
    config = replace(SMALL_DEEPLAB, stuff_area=10**6)
    return Stored(config.build(small_categories).eval(), OPTIONS)


@pytest.mark.timeout(200)
def test_the_figures_do_not_depend_on_the_number_of_actors(ray_cluster: None, stored: Stored, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, stored.model.categories, ROWS)
    names = truth_names(stored.model)
    choices = choices_of(stored.model, ["none", "+".join(names)])
    experiment = options_of(stored, PRESETS["demo"]())
    assert choices == [(), names] and experiment.train.validation_batch == 2

    def table(pool: Pool) -> list[tuple[tuple[str, ...], dict[str, float]]]:
        rows = oracle(stored, shards, experiment, choices, pool=pool)
        return [(c, {k: v for k, v in metrics(e).items() if "time/" not in k}) for c, e in rows]

    alone = table(Pool(0, threads=1))
    assert [chosen for chosen, _ in alone] == choices
    assert alone[0][1]["val/pq_things"] < 50 < alone[1][1]["val/pq_things"]
    assert all(figures["val/images"] == ROWS and "val/ap" in figures for _, figures in alone)
    np.testing.assert_equal(table(Pool(2, threads=1)), alone)


def test_a_threshold_costs_even_a_perfect_network(stored: Stored, tmp_path: Path) -> None:
    shards, names = write_shards(tmp_path, stored.model.categories, 4), truth_names(stored.model)
    experiment = options_of(stored, PRESETS["demo"]())
    (row,) = oracle(stored, shards, experiment, [names], instances=False)
    (without,) = oracle(without_stuff_area(stored), shards, experiment, [names], instances=False)
    assert row[1].quality.stuff.pq == 0 and without[1].quality.stuff.pq > 90
    assert row[1].precision is None


def test_a_model_of_other_classes_is_refused(stored: Stored, tmp_path: Path) -> None:
    classes = Categories(("a", "b"), (True, False), (1, 2), ((0, 0, 0),) * 2)
    shards = replace(write_shards(tmp_path, stored.model.categories, 4), categories=classes)
    with pytest.raises(ValueError, match="its 5 classes are not the 2 of the data"):
        next(oracle(stored, shards, options_of(stored, PRESETS["demo"]()), [()]))
