"""Losses of a batch against those of its parts, which accumulation and workers average, for every architecture.

A term that is a mean over images, or over as many pixels of each, is the mean of its parts to rounding. `NORMALISERS`
names the others and why they differ. What divides by a count of the batch weighs its parts by their counts, so it lies
between the smallest and the largest of them; what is drawn at random differs by the draw, too.
"""

from __future__ import annotations

import re
import typing

import numpy as np
import pytest
import torch

from panoptic import models
from panoptic.distributed import alone, batch_parts, one_of
from panoptic.models.base import PanopticModel
from panoptic.models.detr.model import DETRConfig
from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.eomt.model import EoMTConfig
from panoptic.models.jsis_net.model import JSISNetConfig
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.segmentation import Categories, Sample, collate
from tests.conftest import draw_segmentation
from tests.support.small import SMALL

HARD = "mean over the hardest pixels of the batch, not of each image"
THINGS = "divided by the weighted pixels or the things that there are"
SEGMENTS = "divided by the segments of the batch, or by their weights as classes"
DRAWN = "divided by regions that are drawn from all candidates of the batch"
POINTS = "divided by the segments of the batch, which are matched and compared at points that are drawn"

NORMALISERS: dict[type, dict[str, str]] = {
    PanopticDeepLabConfig: {"semantic": HARD, "centre": THINGS, "offset": THINGS},
    PanopticFPNConfig: dict.fromkeys(("objectness", "class", "box", "region", "mask"), DRAWN),
    PanopticFCNConfig: dict.fromkeys(("thing_position", "thing_mask", "stuff_mask"), THINGS),
    DETRConfig: dict.fromkeys(("class", "box", "giou", "mask", "dice"), SEGMENTS),
    JSISNetConfig: dict.fromkeys(("objectness", "class", "box", "region", "mask"), DRAWN),
    MaskFormerConfig: dict.fromkeys(("classes", "masks", "dice"), SEGMENTS),
    Mask2FormerConfig: dict.fromkeys(("classes", "masks", "dice"), POINTS),
    EoMTConfig: dict.fromkeys(("classes", "masks", "dice"), POINTS),
    EfficientPSConfig: dict.fromkeys(("objectness", "class", "box", "region", "mask"), DRAWN) | {"semantic": HARD},
}
"""Terms whose value of a batch is not the mean of its parts, and why."""

CHANCE = 0.05
"""Share of the whole loss by which a drawn term may differ."""

CASES = [
    pytest.param(config, id=f"{kind.__name__}-{name}")
    for kind in typing.get_args(models.Architecture)
    for name, config in SMALL[kind].items()
]


@pytest.fixture(scope="module")
def samples(small_categories: Categories) -> list[Sample]:
    """Four images of one size with one, three, five and seven things, a crowd among them."""
    found = []
    for k in range(4):
        truth = draw_segmentation(np.random.default_rng(k), 64, 96, small_categories, things=1 + 2 * k, crowd=k == 2)
        found.append(Sample(np.random.default_rng(k).integers(0, 256, (64, 96, 3), np.uint8), truth, f"sample {k}"))
    return found


def terms(model: PanopticModel, part: list[Sample], parts: int) -> dict[str, float]:
    torch.manual_seed(1)
    with torch.no_grad(), one_of(parts):
        losses, _ = model(*collate(part, model.divisor))
    assert losses is not None
    return {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_loss_does_not_depend_on_the_parts_of_its_batch(config, parts, samples, small_categories) -> None:
    torch.manual_seed(0)
    model = config.build(small_categories).eval()  # the statistics of batch norms are another matter
    whole = terms(model, samples, 1)
    size = len(samples) // parts
    split = [terms(model, samples[k : k + size], parts) for k in range(0, len(samples), size)]
    chance = CHANCE * sum(whole.values())
    for name, value in whole.items():
        values = [part[name] for part in split]
        reason = NORMALISERS[type(config)].get(re.sub(r"_\d+$", "", name))
        if reason is None:
            assert np.mean(values) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        elif reason in (DRAWN, POINTS):
            assert np.mean(values) == pytest.approx(value, abs=chance), f"{name}: {reason}"
        elif reason == HARD:  # a batch may take all its pixels from one image
            assert np.mean(values) * (1 - 1e-5) <= value <= max(values) * (1 + 1e-5), f"{name}: {reason}"
        else:
            assert min(values) * (1 - 1e-5) <= value <= max(values) * (1 + 1e-5), f"{name}: {reason}"


def test_every_architecture_says_which_terms_differ() -> None:
    assert NORMALISERS.keys() == set(typing.get_args(models.Architecture))


def test_the_parts_of_a_batch_are_micro_batches_times_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_parts() == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with one_of(2):
        assert batch_parts() == 6
        with alone():
            assert batch_parts() == 1
    assert batch_parts() == 3


@pytest.mark.parametrize("parts", [2, 4])
def test_the_masks_of_jsis_net_weigh_the_same_in_any_part(parts, samples, small_categories) -> None:
    """They are summed over the images of the batch: without the number of parts two would weigh half."""
    torch.manual_seed(0)
    model = SMALL[JSISNetConfig]["own_stage"].build(small_categories).eval()
    whole = terms(model, samples, 1)["mask"]
    size = len(samples) // parts
    split = [terms(model, samples[k : k + size], parts)["mask"] for k in range(0, len(samples), size)]
    assert np.mean(split) == pytest.approx(whole, rel=0.01)
