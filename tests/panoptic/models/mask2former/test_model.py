"""Mask2Former as a whole: precision, options, learning. Published numbers come through `convert`'s tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from panoptic.models.mask2former.model import Mask2Former, Mask2FormerConfig
from panoptic.segmentation import Categories, Targets, collate
from tests.panoptic.models.test_contract import as_sample, only
from tests.support.small import SMALL_MASK2FORMER


def batch(categories: Categories, counts: tuple[int, ...]) -> tuple[torch.Tensor, Targets]:
    """Images of that many vertical bands."""
    truths = [only(64, 96, [k % len(categories) for k in range(count)]) for count in counts]
    return collate([as_sample(truth, k) for k, truth in enumerate(truths)], 32)


def built(categories: Categories, **options) -> Mask2Former:
    torch.manual_seed(0)
    return replace(SMALL_MASK2FORMER, **options).build(categories).eval()


def test_autocast_stays_out_of_the_pixel_decoder(small_categories) -> None:
    images, _ = batch(small_categories, (2,))
    kinds = {}
    for full in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            kinds[full] = built(small_categories, full_precision=full).network(images)["features"].dtype
    assert kinds == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"queries": 0}, "queries 0"),
        ({"decoder_layers": 2}, "decoder_layers 2"),
        ({"importance": 1.5}, r"importance 1\.5"),
        ({"oversample": 0.5}, r"oversample 0\.5"),
    ],
)
def test_options_out_of_range_are_named(option, message, small_categories) -> None:
    with pytest.raises(ValueError, match=message):
        Mask2FormerConfig(**option).build(small_categories)
