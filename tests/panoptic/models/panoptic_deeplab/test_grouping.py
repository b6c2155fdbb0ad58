"""Centres of instances and the grouping of pixels, against dense pooling and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic.models.panoptic_deeplab import grouping
from tests.panoptic.models.panoptic_deeplab.test_postprocess import scenes


@settings(max_examples=50, deadline=None)
@given(scenes(), st.sampled_from([1, 3, 7, 41]), st.sampled_from([None, 1, 3, 200]))
def test_centres_are_those_of_dense_pooling(scene, kernel, top_k):
    heatmap = scene[1]
    kept = torch.where(heatmap > 0.1, heatmap, -1.0)
    pooled = F.max_pool2d(kept[None], kernel, 1, kernel // 2)[0]
    kept = torch.where(pooled == kept, kept, -1.0)
    if top_k is not None and (kept > 0).sum() >= top_k:
        kept = torch.where(kept > kept.flatten().topk(top_k).values[-1], kept, -1.0)
    assert torch.equal(grouping.find_centres(heatmap, 0.1, kernel, top_k), torch.nonzero(kept > 0))


def test_a_heatmap_full_of_candidates_is_pooled_with_the_same_result():
    heatmap = torch.from_numpy(np.random.default_rng(0).random((60, 70), np.float32)) + 1
    pooled = F.max_pool2d(heatmap[None], 7, 1, 3)[0]
    assert torch.equal(grouping.find_centres(heatmap, 0.1, 7, None), torch.nonzero(pooled == heatmap))


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="make kernel odd"):
        grouping.find_centres(torch.zeros(4, 4), kernel=4)


@settings(max_examples=50, deadline=None)
@given(scenes(), st.integers(1, 30), st.booleans())
def test_grouping_is_the_brute_force_argmin(scene, count, integers):
    semantic, _, offset = scene
    height, width = semantic.shape
    generator = torch.Generator().manual_seed(count)
    centres = torch.stack([torch.randint(size, (count,), generator=generator) for size in (height, width)], 1)
    if not integers:  # fractions, inside of cells; whole and half numbers sit on their borders and make ties
        offset = offset + torch.rand(offset.shape, generator=generator)
    mask = semantic > 1
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    gap = (offset + grid)[:, None] - centres.T[:, :, None, None]
    expected = torch.where(mask, (gap**2).sum(0).argmin(0) + 1, 0)
    assert torch.equal(grouping.group_pixels(centres, offset, mask), expected.int())


@pytest.mark.parametrize("count", [1, 2, 9, 90])
def test_grouping_over_many_cells_is_the_brute_force_argmin(count):
    size = 150, 230
    generator = torch.Generator().manual_seed(count)
    centres = torch.stack([torch.randint(side, (count,), generator=generator) for side in size], 1)
    offset = 20 * torch.randn(2, *size, generator=generator)
    decided = grouping._only_candidates(centres, size)[1:-1, 1:-1] > 0
    assert decided.float().mean() > (0.4 if count < 10 else 0)  # the short cut is taken
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    gap = (offset + grid)[:, None] - centres.T[:, :, None, None]
    grouped = grouping.group_pixels(centres, offset, torch.ones(size, dtype=torch.bool))
    assert torch.equal(grouped, ((gap**2).sum(0).argmin(0) + 1).int())
