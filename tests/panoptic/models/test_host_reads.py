"""Count of the values that a training step of each architecture asks the device for: a GPU stands still each time."""

from __future__ import annotations

import typing
from collections import Counter

import numpy as np
import pytest
import torch

from panoptic import models
from panoptic.segmentation import Sample, collate
from tests.support.host_reads import HostReads
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]

PER_IMAGE = ("region_masks",)
"""Functions that ask image by image on a CPU, where that is cheap, and not on a GPU."""


@pytest.mark.parametrize("config", CASES)
def test_a_step_reads_no_more_for_more_images(config, small_categories, random_segmentation) -> None:
    torch.manual_seed(0)
    model = config.build(small_categories).train()
    places: list[Counter[str]] = []
    for count in (2, 5):
        rng = np.random.default_rng(0)
        truths = [random_segmentation(rng, 64, 96, small_categories) for _ in range(count)]
        samples = [Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), truth, "a") for truth in truths]
        images, targets = collate(samples, model.divisor)
        with HostReads() as reads:
            losses, _ = model(images, targets)
            torch.stack(list(losses.values())).sum().backward()
        places.append(Counter({place: n for place, n in reads.places.items() if not place.endswith(PER_IMAGE)}))
    assert not places[1] - places[0], places[1] - places[0]
    assert places[0].total() <= 16, places[0]
