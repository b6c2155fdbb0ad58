"""PSPNet's pyramid pooling and JSIS-Net's hybrid upsampling, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from panoptic.models.jsis_net.semantic_branch import HybridUpsampling, PyramidPooling, SemanticBranch


def transparent(bins: tuple[int, ...]) -> PyramidPooling:
    """Pooling whose layers let the averages through: one channel, identity 1x1s, the 3x3 a copy of its inputs."""
    pooling = PyramidPooling(1, 1 + len(bins), bins, 1, "batch").eval()
    with torch.no_grad():
        for branch in pooling.branches:
            branch.conv.weight.fill_(1)  # type: ignore[union-attr,operator]
        weight = torch.zeros_like(pooling.fuse.conv.weight)
        weight[range(1 + len(bins)), range(1 + len(bins)), 1, 1] = 1
        pooling.fuse.conv.weight.copy_(weight)
    return pooling


def test_averages_are_block_means_and_corners_keep_their_values() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 12, 12)
    factor = (1 + 1e-5) ** -0.5  # of each batch norm that has seen nothing yet
    bins = (1, 2, 3, 6)
    with torch.no_grad():
        y = transparent(bins)(x)
    assert torch.allclose(y[:, :1], x * factor, atol=1e-5)
    for k, cells in enumerate(bins):
        side = 12 // cells
        means = x.view(2, cells, side, cells, side).mean((2, 4)) * factor**2
        found = y[:, k + 1]
        assert torch.allclose(
            found[:, [0, 0, 11, 11], [0, 11, 0, 11]], means[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-5
        )
        resized = F.interpolate(means[:, None], (12, 12), mode="bilinear", align_corners=True)[:, 0]
        assert torch.allclose(found, resized, atol=1e-5)


def test_channels_are_shared_out_and_sizes_kept() -> None:
    pooling = PyramidPooling(32, 12, (1, 2, 3, 6), 0, "batch")
    assert pooling.branches[0].conv.weight.shape == (8, 32, 1, 1)  # type: ignore[union-attr]
    assert pooling.fuse.conv.weight.shape == (12, 64, 3, 3)
    assert pooling(torch.rand(2, 32, 5, 7)).shape == (2, 12, 5, 7)


def test_a_single_value_has_no_statistics() -> None:
    pooling = PyramidPooling(8, 4, (1, 2), 0, "batch")
    with pytest.raises(ValueError, match="two images or more"):
        pooling.train()(torch.rand(1, 8, 4, 4))
    assert pooling.eval()(torch.rand(1, 8, 4, 4)).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="bin_channels: 16 channels"):
        PyramidPooling(64, 4, (1, 2, 3, 6), 0, "group")


@pytest.mark.parametrize(("kind", "factor"), [("double", 2), ("same", 1), ("none", 1)])
def test_hybrid_upsampling_begins_as_what_it_replaces(kind, factor: int) -> None:
    x = torch.rand(2, 3, 5, 7)
    y = HybridUpsampling(3, kind)(x)
    assert y.shape == (2, 3, 5 * factor, 7 * factor)
    expected = x if factor == 1 else F.interpolate(x, scale_factor=2, mode="bilinear")
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # at the border the convolution sees zeros
    assert torch.allclose(y[inner], expected[inner], atol=1e-6)


def test_hybrid_upsampling_mixes_all_classes() -> None:
    (layer,) = (m for m in HybridUpsampling(3, "double").modules() if isinstance(m, nn.ConvTranspose2d))
    assert layer.weight.shape == (3, 3, 4, 4) and layer.stride == (2, 2) and layer.bias is not None


def test_the_branch_gives_logits_at_twice_the_size() -> None:
    branch = SemanticBranch(16, 8, 5, "double", (1, 2), 4, "batch")
    assert branch(torch.rand(2, 16, 6, 9)).shape == (2, 5, 12, 18)
    assert {name.split(".")[0] for name, _ in branch.named_parameters()} == {"ppm", "classifier", "upsample"}
