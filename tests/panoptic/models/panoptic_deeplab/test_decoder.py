"""Panoptic-DeepLab's atrous spatial pyramid pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from panoptic.models.panoptic_deeplab.decoder import ASPP, ImagePool, pool_window


def test_image_pool() -> None:
    x = torch.rand(1, 6, 8, 12)
    pool = ImagePool(6, 4, bias=True, window=None, align=True)
    expected = torch.relu(pool.conv(x.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(pool(x), expected.expand(1, 4, 8, 12))
    windowed = ImagePool(6, 4, bias=True, window=(4, 4), align=False)
    inner = torch.relu(windowed.conv(nn.functional.avg_pool2d(x, 4, 1)))  # 5 x 9 positions
    assert windowed(x).shape == (1, 4, 8, 12)
    torch.testing.assert_close(windowed(x).amax(), inner.amax(), rtol=0.2, atol=0)
    whole = ImagePool(6, 4, bias=True, window=(8, 12), align=False)
    whole.load_state_dict(pool.state_dict())
    torch.testing.assert_close(whole(x), pool(x))
    with pytest.raises(ValueError, match="8x12 is no multiple of the pooling window 3x4"):
        ImagePool(6, 4, bias=False, window=(3, 4), align=False)(x)


def test_pool_window() -> None:
    assert pool_window(None, 16) is None
    assert pool_window((512, 1024), 16) == (32, 64)
    with pytest.raises(ValueError, match="500x1024 is no multiple"):
        pool_window((500, 1024), 16)


@pytest.mark.parametrize("separable", [False, True])
def test_aspp(separable: bool) -> None:
    options = dict(separable=separable, pool_bias=False, pool_window=None, align_corners=True)
    aspp = ASPP(6, 4, (1, 2, 30), "batch", dropout=0.5, **options)
    assert len(aspp.branches) == 4
    x = torch.rand(2, 6, 5, 7)
    assert aspp(x).shape == (2, 4, 5, 7)
    assert not torch.equal(aspp(x), aspp(x))  # dropout
    aspp.eval()
    assert torch.equal(aspp(x), aspp(x))
    assert aspp.project.conv.in_channels == 5 * 4
