"""Positions, attention and layers against PyTorch's own modules and against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from panoptic.layers.attention import (
    MLP,
    Attention,
    AttentionMap,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    LearnedPositions,
    sine_positions,
)


def test_sine_positions_follow_the_formula() -> None:
    valid = torch.zeros(1, 4, 6, dtype=torch.bool)
    valid[:, :3, :5] = True
    positions = sine_positions(valid, 16)[0]
    for row, column in ((0, 0), (2, 4), (1, 3)):
        for axis, (place, count) in enumerate((((row + 1), 3), ((column + 1), 5))):
            for i in range(8):
                angle = place / (count + 1e-6) * 2 * math.pi / 10_000 ** (2 * (i // 2) / 8)
                expected = math.cos(angle) if i % 2 else math.sin(angle)
                assert positions[axis * 8 + i, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_learned_positions_know_fifty_rows_and_columns() -> None:
    positions = LearnedPositions(8)
    encoded = positions(torch.ones(2, 3, 50, dtype=torch.bool))
    assert encoded.shape == (2, 8, 3, 50)
    assert torch.equal(encoded[1, :4, 2, 7], positions.columns.weight[7])
    assert torch.equal(encoded[1, 4:, 2, 7], positions.rows.weight[2])
    with pytest.raises(ValueError, match="3 x 51 has more than the 50"):
        positions(torch.ones(1, 3, 51, dtype=torch.bool))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_torch(same: bool, masked: bool) -> None:
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = Attention(16, 4)
    ours.load_state_dict(reference.state_dict())
    query = torch.randn(2, 5, 16)
    key = query if same else torch.randn(2, 7, 16)
    value = torch.randn(2, key.shape[1], 16)
    mask = torch.rand(2, key.shape[1]) > 0.3 if masked else None
    expected, _ = reference(query, key, value, key_padding_mask=None if mask is None else ~mask)
    attended = ours(query, key, value, None if mask is None else mask[:, None, None])
    torch.testing.assert_close(attended, expected, atol=1e-6, rtol=1e-5)


def renamed(layer: nn.Module) -> dict[str, torch.Tensor]:
    names = {"self_attn": "self_attention", "multihead_attn": "cross_attention"}
    return {".".join(names.get(part, part) for part in key.split(".")): v for key, v in layer.state_dict().items()}


@pytest.mark.parametrize("pre_norm", [True, False])
def test_layers_are_those_of_torch_where_positions_are_zero(pre_norm: bool) -> None:
    torch.manual_seed(0)
    options = dict(dropout=0.1, batch_first=True, norm_first=pre_norm)
    encoder, decoder = (
        nn.TransformerEncoderLayer(16, 4, 32, **options),
        nn.TransformerDecoderLayer(16, 4, 32, **options),
    )
    ours = EncoderLayer(16, 4, 32, 0.1, pre_norm), DecoderLayer(16, 4, 32, 0.1, pre_norm)
    memory, queries, zeros = torch.randn(2, 7, 16), torch.randn(2, 5, 16), torch.zeros(1, 1, 16)
    for mine, theirs in zip(ours, (encoder, decoder), strict=True):
        mine.load_state_dict(renamed(theirs))
        mine.eval(), theirs.eval()
    torch.testing.assert_close(ours[0](memory, zeros), encoder(memory), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1](queries, zeros, memory, memory), decoder(queries, memory), atol=1e-5, rtol=1e-5)


def test_values_have_no_positions_and_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder(16, 4, 32, 2).eval(), Decoder(16, 4, 32, 3).eval()
    valid = torch.tensor([[True] * 5 + [False] * 2])
    tokens, positions, queries = torch.randn(1, 7, 16), torch.randn(1, 7, 16), torch.randn(6, 16)
    other = torch.where(valid[:, :, None], tokens, torch.randn(1, 7, 16))
    mask = valid[:, None, None]
    memory = encoder(tokens, positions, mask)
    torch.testing.assert_close(memory[:, :5], encoder(other, positions, mask)[:, :5])
    states = decoder(queries, memory, positions, mask)
    assert states.shape == (3, 1, 6, 16)
    torch.testing.assert_close(states, decoder(queries, torch.where(valid[:, :, None], memory, 9.0), positions, mask))
    assert not torch.allclose(states, decoder(queries, memory, torch.zeros_like(positions), mask))
    # what a layer hands on is not what it shows
    first = decoder.layers[0](torch.zeros(1, 6, 16), queries[None], memory + positions, memory, mask)
    torch.testing.assert_close(states[0], decoder.norm(first))
    second = decoder.layers[1](first, queries[None], memory + positions, memory, mask)
    torch.testing.assert_close(states[1], decoder.norm(second))


def test_the_maps_of_all_heads_share_one_softmax() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[[True, True, False]], [[True, True, True]]])
    maps = AttentionMap(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 16, 1, 3), valid)
    assert maps.shape == (2, 5, 4, 1, 3)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 5))
    assert not maps[0, ..., 2].any()


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be shared by 4 heads"):
        Attention(10, 4)


def test_dropout_of_an_mlp_is_between_its_layers() -> None:
    torch.manual_seed(0)
    mlp = MLP((8, 64, 3), dropout=0.9)
    x = torch.randn(4, 8)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp.layers[1](mlp.layers[0](x).relu()))


def test_maps_of_a_unit_mean_are_the_published_ones_at_another_scale() -> None:
    torch.manual_seed(0)
    published = AttentionMap(16, 4)
    scaled = AttentionMap(16, 4, unit_mean=True)
    scaled.load_state_dict(published.state_dict())
    queries, memory = torch.randn(2, 3, 16), torch.randn(2, 16, 5, 7)
    maps = published(queries, memory)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 3))
    torch.testing.assert_close(scaled(queries, memory), maps * (4 * 5 * 7))
    torch.testing.assert_close(scaled(queries, memory).mean((2, 3, 4)), torch.ones(2, 3))
