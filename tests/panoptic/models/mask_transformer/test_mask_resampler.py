"""Resampled masks against the plain way to resize them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from panoptic.models.mask_transformer.mask_resampler import MaskResampler, extremes
from tests.support.query_scenes import EXTENTS, full_size, scene


@pytest.mark.parametrize(("extent", "cells"), EXTENTS)
def test_windows_are_cut_from_the_whole(extent, cells) -> None:
    _, masks = scene(0, extent, cells)
    cut, whole = MaskResampler(masks, extent), full_size(masks, extent)
    height, width = extent.output
    for rows, columns in (((0, height), (0, width)), ((height // 3, height), (1, width // 2 + 1))):
        window = cut.window(masks, rows, columns)
        torch.testing.assert_close(window, whole[:, slice(*rows), slice(*columns)], rtol=0, atol=1e-4)


def test_extremes_of_neighbourhoods() -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    low, high = extremes(x)
    torch.testing.assert_close(high, F.max_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(low, -F.max_pool2d(-x, 3, 1, 1))
