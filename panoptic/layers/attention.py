"""Transformer parts that the query models share: positions, attention, encoder and decoder layers.

Layers are those of DETR (Carion et al., "End-to-End Object Detection with Transformers", arXiv
2005.12872; facebookresearch/detr): positions are added to queries and keys in every layer, never to
values. Tokens are batch-first. Everything else agrees with the reference, its initialisation and its
fused projection of query, key and value included.

Shapes: B images, C channels, h x w a feature map, N = h * w tokens of it, Q queries, L layers, M heads.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 10_000.0
"""Ratio of the longest to the shortest wave length of `sine_positions`."""

GRID = 50
"""Number of rows, and of columns, of which `LearnedPositions` has a vector."""


def sine_positions(valid: Tensor, channels: int) -> Tensor:
    """Sine positions, float32 [B, C, h, w]: sines and cosines of the row (first C / 2) and of the column.

    Coordinates count the valid cells up to and with each one, divided by their number: 1/n to 1, times 2 pi.

    Args:
        valid: bool [B, h, w], False in padding.
        channels: C, a multiple of 4.
    """
    counted = valid.to(torch.float32)
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=valid.device)
    waves = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / half)
    encoded = []
    for axis in (1, 2):
        position = counted.cumsum(axis)
        last = position.narrow(axis, position.shape[axis] - 1, 1)
        angle = (position / (last + 1e-6) * (2 * math.pi))[..., None] / waves
        encoded.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(3))
    return torch.cat(encoded, 3).permute(0, 3, 1, 2)


class LearnedPositions(nn.Module):
    """A vector for each column and each row, up to 50 of both (DETR's `--position_embedding learned`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(GRID, channels // 2)
        self.columns = nn.Embedding(GRID, channels // 2)
        nn.init.uniform_(self.rows.weight)
        nn.init.uniform_(self.columns.weight)

    def forward(self, valid: Tensor) -> Tensor:
        """bool [B, h, w] to [B, C, h, w], the column's vector first; padding makes no difference.

        Raises:
            ValueError: the map has more rows or columns than there are vectors.
        """
        images, height, width = valid.shape
        if max(height, width) > GRID:
            raise ValueError(
                f"positions: a feature map of {height} x {width} has more than the {GRID} learned rows or columns; "
                "give smaller images or take sine positions"
            )
        rows = self.rows.weight[:height, None].expand(-1, width, -1)
        columns = self.columns.weight[None, :width].expand(height, -1, -1)
        return torch.cat([columns, rows], 2).permute(2, 0, 1).expand(images, -1, -1, -1)


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, batch-first, on the fused kernels."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {channels} channels cannot be shared by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Q, C] of queries, [B, N, C] of keys and values to [B, Q, C].

        Args:
            mask: bool, broadcast to [B, M, Q, N], True where a query may look; None lets all see all. A
                query that may look nowhere has no defined result.
        """
        channels = query.shape[-1]
        weights, biases = self.in_proj_weight.split(channels), self.in_proj_bias.split(channels)
        if query is key:  # one product in place of two
            both = F.linear(query, self.in_proj_weight[: 2 * channels], self.in_proj_bias[: 2 * channels])
            q, k = both.split(channels, -1)
        else:
            q = F.linear(query, weights[0], biases[0])
            k = F.linear(key, weights[1], biases[1])
        v = F.linear(value, weights[2], biases[2])
        attended = F.scaled_dot_product_attention(
            self._heads(q), self._heads(k), self._heads(v), mask, self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, M, N, C / M]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual; normalised after (post-norm) or before."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float = 0.1, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attention = Attention(channels, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] to the same; `positions` is [B or 1, N, C], `mask` as of `Attention`."""
        if self.pre_norm:
            normed = self.norm1(x)
            x = x + self.dropout(self._attend(normed, positions, mask))
            return x + self.dropout(_feed_forward(self, self.norm2(x)))
        x = self.norm1(x + self.dropout(self._attend(x, positions, mask)))
        return self.norm2(x + self.dropout(_feed_forward(self, x)))

    def _attend(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        placed = x + positions
        return self.self_attention(placed, placed, x, mask)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward network; each with a residual."""

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float = 0.1, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attention = Attention(channels, heads, dropout)
        self.cross_attention = Attention(channels, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_positions: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[B, Q, C] to the same.

        Args:
            x: the queries.
            query_positions: [B or 1, Q, C].
            keys: [B, N, C], the memory with its positions added.
            memory: [B, N, C].
            mask: of the attention to the memory, as of `Attention`.
        """
        if self.pre_norm:
            x = x + self.dropout(self._attend(self.norm1(x), query_positions))
            x = x + self.dropout(self.cross_attention(self.norm2(x) + query_positions, keys, memory, mask))
            return x + self.dropout(_feed_forward(self, self.norm3(x)))
        x = self.norm1(x + self.dropout(self._attend(x, query_positions)))
        x = self.norm2(x + self.dropout(self.cross_attention(x + query_positions, keys, memory, mask)))
        return self.norm3(x + self.dropout(_feed_forward(self, x)))

    def _attend(self, x: Tensor, positions: Tensor) -> Tensor:
        placed = x + positions
        return self.self_attention(placed, placed, x)


def _feed_forward(layer: EncoderLayer | DecoderLayer, x: Tensor) -> Tensor:
    """[B, N, C] through the two linear layers of a layer, with its dropout between them."""
    return layer.linear2(layer.dropout(F.relu(layer.linear1(x))))


class Encoder(nn.Module):
    """Encoder layers; a last norm only where the layers normalise before, as in DETR."""

    def __init__(
        self, channels: int, heads: int, hidden: int, layers: int, dropout: float = 0.1, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(channels, heads, hidden, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(channels) if pre_norm else None
        initialise_transformer(self)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] to the same; `positions` is [B or 1, N, C], `mask` as of `Attention`."""
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """Decoder layers; one norm is applied to the output of every layer, never to the input of the next one."""

    def __init__(
        self, channels: int, heads: int, hidden: int, layers: int, dropout: float = 0.1, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, hidden, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        initialise_transformer(self)

    def forward(self, query_positions: Tensor, memory: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalised queries after every layer, [L, B, Q, C]; they start from zeros.

        Args:
            query_positions: [Q, C].
            memory: [B, N, C].
            positions: [B or 1, N, C], of the memory.
            mask: of the attention to the memory, as of `Attention`.
        """
        x = memory.new_zeros(memory.shape[0], *query_positions.shape)
        keys, states = memory + positions, []
        for layer in self.layers:
            x = layer(x, query_positions[None], keys, memory, mask)
            states.append(self.norm(x))
        return torch.stack(states)


def initialise_transformer(module: nn.Module) -> None:
    """Initialise every matrix by Xavier's uniform rule, a fused projection as one matrix; vectors stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class MLP(nn.Module):
    """Linear layers with ReLU, and optionally dropout, between them."""

    def __init__(self, widths: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] to [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            x = self.dropout(F.relu(layer(x)))
        return self.layers[-1](x)


class AttentionMap(nn.Module):
    """Attention of queries to the cells of a map, by head, without values (DETR's mask head).

    The softmax is taken over heads and cells together, so that the maps of all heads of a query sum to 1: odd, but
    published so.

    Args:
        unit_mean: multiply the maps by heads and cells. Values of 1/2000 at first are lost beside features around 1,
            and a mask head that starts from nothing hardly learns to see them.
    """

    def __init__(self, channels: int, heads: int, unit_mean: bool = False) -> None:
        super().__init__()
        self.heads, self.unit_mean = heads, unit_mean
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        for layer in (self.query, self.key):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, Q, C] and the map [B, C, h, w] to [B, Q, M, h, w]; 0 outside of `valid`, bool [B, h, w]."""
        size = memory.shape[-2:]
        q = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, M, Q, C / M]
        k = self.key(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1)
        weights = (q * q.shape[-1] ** -0.5) @ k  # [B, M, Q, N]
        if valid is not None:
            weights = weights.masked_fill(~valid.flatten(1)[:, None, None], -math.inf)
        weights = weights.transpose(1, 2)
        maps = weights.flatten(2).softmax(-1).view(weights.shape).unflatten(-1, size)
        return maps * (self.heads * size[0] * size[1]) if self.unit_mean else maps
