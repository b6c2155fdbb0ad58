"""Deformable convolution beside torchvision's, and with offsets that are no numbers."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import deform_conv2d

from panoptic.layers.deformable import deformable_conv


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_it_is_torchvisions_under_autocast_too(stride: int, dilation: int, modulated: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 10), (6, 4, 3, 3), (6,)))
    size = (8 // stride, 10 // stride)
    offsets = 2 * torch.randn((2, 18, *size), generator=draw)
    factors = torch.rand((2, 9, *size), generator=draw) if modulated else None
    places = {"stride": (stride,) * 2, "padding": (dilation,) * 2, "dilation": (dilation,) * 2}
    expected = deform_conv2d(x, offsets, weight, bias, mask=factors, **places)
    with torch.autocast("cpu", torch.bfloat16):
        found = deformable_conv(x, offsets, weight, bias, stride=stride, dilation=dilation, factors=factors)
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_offsets_that_are_no_numbers_make_a_result_that_is_none() -> None:
    """torchvision's kernel reads outside of the map there, which can end the process."""
    x, weight = torch.randn(2, 16, 64, 96), torch.randn(8, 16, 3, 3)
    offsets = torch.zeros(2, 18, 64, 96, requires_grad=True)
    broken = offsets.clone()
    broken[1, 3] = torch.nan
    found = deformable_conv(x, broken, weight)
    assert found.isnan().all()
    found.sum().backward()
    assert torch.isfinite(deformable_conv(x, offsets, weight)).all()
