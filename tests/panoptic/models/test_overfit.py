"""Every architecture learns four photographs of COCO by heart."""

from __future__ import annotations

import pytest

from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.training.device import Engine
from tests.panoptic.models.test_contract import ARCHITECTURES
from tests.support.photographs import learn, of_present_classes, photographs
from tests.support.recipes import RECIPES, Recipe

EVERY_CHANGE = (PanopticFPNConfig, EoMTConfig)
"""One that learns pixels and regions, and one that learns masks of queries: those that train fastest, in `make slow`.
The others are much like one of them and train in `make nightly`."""

LOSS = 0.15
"""The largest share of the first loss that a training may leave."""


def test_every_architecture_has_a_recipe() -> None:
    assert set(RECIPES) == set(ARCHITECTURES)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=kind.__name__, marks=pytest.mark.slow if kind in EVERY_CHANGE else pytest.mark.nightly)
        for kind, recipe in RECIPES.items()
    ],
)
def test_four_photographs_are_learnt(recipe: Recipe, shared) -> None:  # type: ignore[no-untyped-def]
    """With their crowds and their void, from scratch: the loss falls, and PQ passes what the recipe asks for."""
    samples, categories = photographs(shared, recipe.short)
    if recipe.present:
        samples, categories = of_present_classes(samples, categories)
    engine = Engine(channels_last=recipe.present)
    losses, pq = learn(recipe.config, samples, categories, recipe.steps, recipe.optim(), engine)
    print(f"PQ {pq:.1f}, loss {losses[0]:.3g} to {losses[-1]:.3g}")
    assert losses[-1] < LOSS * losses[0]
    assert pq > recipe.least
