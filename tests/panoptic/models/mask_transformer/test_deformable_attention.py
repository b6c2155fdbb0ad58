"""Deformable attention against its definition, sample by sample; both ways of computing it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panoptic.models.mask_transformer import deformable_attention
from panoptic.models.mask_transformer.deformable_attention import (
    DeformableAttention,
    DeformableEncoder,
    _cell_middles,
    _sampled_planes,
    _sampled_rows,
)

SIZES = ((2, 3), (4, 6))
TOKENS = sum(height * width for height, width in SIZES)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values [2, N, 2 heads, 4], positions that leave the maps on all sides, weights."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(2, TOKENS, 2, 4, generator=draw)
    cells = torch.rand(2, 5, 2, 2, 3, 2, generator=draw) * 10 - 2.5
    return values, cells, torch.rand(2, 5, 2, 2, 3, generator=draw)


def by_definition(values: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """The sums [B, Q, C], every sample by itself; cells outside of a level count 0."""
    sums = torch.zeros(2, 5, 2, 4)
    for b, q, head, level, point in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        height, width = SIZES[level]
        first = sum(h * w for h, w in SIZES[:level])
        x, y = cells[b, q, head, level, point].tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, head, level, point]
                    sums[b, q, head] += share * values[b, first + row * width + column, head]
    return sums.flatten(2)


@pytest.mark.parametrize("sample", [_sampled_rows, _sampled_planes])
def test_samples_are_weighted_bilinear_means(sample) -> None:
    values, cells, weights = drawn()
    torch.testing.assert_close(sample(values, cells, weights, SIZES), by_definition(values, cells, weights))


def test_gradients_of_both_ways_agree() -> None:
    gradients = []
    for sample in (_sampled_rows, _sampled_planes):
        leaves = [x.requires_grad_() for x in drawn(1)]
        sample(*leaves, SIZES).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_exported_graph_gives_the_same() -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, 2, 3).eval()
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    inputs = (torch.randn(1, TOKENS, 8), torch.randn(1, TOKENS, 8), _cell_middles(SIZES, torch.device("cpu")))

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, queries: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
            return self.layer(queries, tokens, references, SIZES)

    program = torch.export.export(Fixed(), inputs)
    assert any("grid_sampler" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Fixed()(*inputs))


def test_it_begins_by_looking_around() -> None:
    """Each head in its own direction, each point one pixel further, whatever the query; with equal weights."""
    layer = DeformableAttention(16, 8, 2, 3)
    offsets = layer.sampling_offsets(torch.randn(1, 16)).view(8, 2, 3, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[:, 0].abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, -1))
    torch.testing.assert_close(offsets[1, 0, 2], torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(offsets[4, 0, 0], torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)
    assert not layer.attention_weights(torch.randn(1, 16)).any()


def test_encoder_under_autocast_stays_close() -> None:
    torch.manual_seed(0)
    encoder = DeformableEncoder(32, 4, 32, 2, 2, 4).eval()
    tokens, positions = torch.randn(2, TOKENS, 32), torch.randn(1, TOKENS, 32)
    exact = encoder(tokens, positions, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(tokens, positions, SIZES)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.15)


def test_heads_must_share_the_channels() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be shared by 4 heads"):
        DeformableAttention(10, 4, 3, 4)


def test_images_beyond_the_limit_are_summed_in_parts(monkeypatch) -> None:
    """A GPU's `embedding_bag` has a limit; where the images are parted makes no difference."""
    results = []
    for limit in (1 << 25, 1):
        monkeypatch.setattr(deformable_attention, "SAMPLES", limit)
        leaves = [x.requires_grad_() for x in drawn(2)]
        sums = _sampled_rows(*leaves, SIZES)
        sums.square().sum().backward()
        results.append([sums, *(x.grad for x in leaves)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)
