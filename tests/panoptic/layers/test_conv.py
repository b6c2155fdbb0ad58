"""Input normalisation, norms, pyramid pooling, freezing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from panoptic.layers.image import ImageNormalisation
from panoptic.layers.norm import FrozenBatchNorm, freeze, norm_layer, set_norm_momentum
from panoptic.models.panoptic_deeplab.decoder import ASPP, ImagePool, pool_window
from panoptic.segmentation import Frame

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def test_pixels_normalises_and_blanks_batch_padding() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    frame = Frame((8, 10), torch.tensor([[8, 10], [5, 7]]), torch.tensor([[8, 10], [5, 7]]))
    x = ImageNormalisation(MEAN, STD)(images, frame)
    expected = (images.numpy() - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    np.testing.assert_allclose(x[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(x[1, :, :5, :7], expected[1, :, :5, :7], atol=1e-5)
    assert not x[1, :, 5:].any() and not x[1, :, :, 7:].any()
    assert ImageNormalisation(MEAN, STD)(images)[1, :, 5:].any()
    bgr = ImageNormalisation(MEAN[::-1], STD[::-1], bgr=True)(images)
    assert torch.equal(bgr.flip(1), ImageNormalisation(MEAN, STD)(images))
    assert not ImageNormalisation(MEAN, STD).state_dict()


def test_norms() -> None:
    x = torch.rand(2, 48, 5, 5)
    group = norm_layer("group", 48)
    assert isinstance(group, nn.GroupNorm) and group.num_groups == 16
    assert isinstance(norm_layer("sync", 8), nn.SyncBatchNorm)
    frozen = norm_layer("frozen", 48)
    torch.testing.assert_close(frozen(x), x)
    assert not list(frozen.parameters())
    with pytest.raises(ValueError, match="not one of"):
        norm_layer("layer", 8)  # type: ignore[arg-type]
    for norm in ("batch", "group", "sync", "frozen"):
        assert {"weight", "bias"} <= norm_layer(norm, 8).state_dict().keys()
    assert norm_layer("batch", 8).state_dict().keys() == norm_layer("frozen", 8).state_dict().keys()


def test_frozen_norm_takes_half_precision_and_passes_gradients() -> None:
    frozen = FrozenBatchNorm(4)
    x = torch.rand(1, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = frozen(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_freeze_and_momentum() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    set_norm_momentum(module, 0.01)
    assert module[1].momentum == module[2][0].momentum == 0.01
    module(torch.rand(8, 3, 4, 4))
    mean = module[1].running_mean.clone()
    freeze(module)
    assert isinstance(module[1], FrozenBatchNorm) and isinstance(module[2][0], FrozenBatchNorm)
    assert not any(p.requires_grad for p in module.parameters())
    module.train()(torch.rand(8, 3, 4, 4))
    assert torch.equal(module[1].running_mean, mean)
    # SyncBN conversion must not revive it
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted[1], FrozenBatchNorm)


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
