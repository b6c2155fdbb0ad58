"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", arXiv 2010.04159) in plain PyTorch.

Every token looks at a few points around it on every level. A point is the bilinear mean of four cells, so
what a head takes in is a weighted sum of 4 x levels x points rows of a table: `embedding_bag`, which never
writes the samples down (a third to a fifth of the time of `grid_sample` on a CPU, and none of its memory).
Exported graphs take `grid_sample`, which every runtime knows; both give the same numbers.

No library's kernel is offered beside it. The one with wheels that is kept up, deformops 3.0.1, asks for Python 3.12 and
torch 2.11, where this package runs from Python 3.11 on: pip refuses it under 3.11. Its kernels need an NVIDIA GPU, so
that without one they cannot be compared with these numbers, which an extra would have to do.

Shapes: B images, C channels, M heads, L levels, P points, N tokens of all levels one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.attention import initialise_transformer

Sizes = Sequence[tuple[int, int]]
"""Height and width of each level."""

SAMPLES = 1 << 25
"""Rows that are summed at once.

Above 2^26 the backward of torch's `embedding_bag` numbers its threads, 32 a row, beyond int32 on a GPU and reads memory
that is not its own: nine images of 1024 x 1024 are enough."""


class DeformableAttention(nn.Module):
    """Attention to a few points whose places and weights follow from the query alone.

    Parameters have the names of the reference.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {channels} channels cannot be shared by {heads} heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.initialise()

    def initialise(self) -> None:
        """Points at 1, 2, … pixels in a direction of each head's own, whatever the query; equal weights."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.points + 1, dtype=torch.float32)[:, None]
        offsets = (directions[:, None, None] * reach).expand(-1, self.levels, -1, -1)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, tokens: Tensor, references: Tensor, sizes: Sizes) -> Tensor:
        """The attended values, [B, N, C].

        Args:
            queries: [B, N, C], the tokens with their positions.
            tokens: [B, N, C], of all levels.
            references: [N, 2], x and y of each query as shares of width and height, the same on all levels.
            sizes: of the levels, in the order of the tokens.
        """
        shape = (*queries.shape[:2], self.heads, self.levels, self.points)
        values = self.value_proj(tokens).unflatten(-1, (self.heads, -1)).float()
        # float32 whatever the autocast: half-precision positions are wrong by whole cells of a large map
        offsets = self.sampling_offsets(queries).float().view(*shape, 2)
        weights = self.attention_weights(queries).float().view(*shape[:3], -1).softmax(-1).view(shape)
        # positions in cells, of which (0, 0) is the middle of the first
        extents = _extents(sizes, queries.device)
        cells = references[:, None, None, None] * extents[:, None] - 0.5 + offsets
        sample = _sampled_planes if torch.compiler.is_exporting() else _sampled_rows
        return self.output_proj(sample(values, cells, weights, sizes))


def _sampled_rows(values: Tensor, cells: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """The weighted sums of samples, as sums of rows of a table.

    Args:
        values: [B, N, M, C / M].
        cells: [B, Q, M, L, P, 2], x and y; what lies outside of a level counts as 0.
        weights: [B, Q, M, L, P].
        sizes: of the levels.

    Returns:
        [B, Q, C].
    """
    images, tokens, heads, channels = values.shape
    device = values.device
    # a part of the images at a time where all are too many
    fit = max(1, SAMPLES * images // (4 * weights.numel()))
    if images > fit:
        parts = zip(values.split(fit), cells.split(fit), weights.split(fit), strict=True)
        return torch.cat([_sampled_rows(*part, sizes) for part in parts])
    # width and height of each level, and the place of its first token
    extents = _extents(sizes, device)
    first = F.pad(extents.prod(1).cumsum(0)[:-1], (1, 0))
    # the four cells around each point; those outside of the level have no share, and any row of the table will do
    low = cells.detach().floor()
    share = cells - low
    corners = torch.stack([low, low + 1], -2).to(torch.int32)  # [..., P, low or high, x or y]
    inside = (corners >= 0) & (corners < extents[:, None, None])
    shares = torch.stack([1 - share, share], -2) * inside
    corners = torch.minimum(corners.clamp_(min=0), extents.to(torch.int32)[:, None, None] - 1)
    x, y = corners.unbind(-1)
    # their rows in the table [B N M, C / M] of all values
    index = (y * extents[:, None, None, 0])[..., :, None] + x[..., None, :] + first[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None, None, None]
    image = (torch.arange(images, device=device) * tokens * heads).view(-1, *[1] * 6)
    index = (index * heads + head + image).to(torch.int32)
    # bilinear share times attention weight, and one bag for each image, query and head
    across, down = shares.unbind(-1)
    factors = (down * weights[..., None])[..., :, None] * across[..., None, :]
    bags = images * cells.shape[1] * heads
    sums = F.embedding_bag(
        index.view(bags, -1), values.reshape(-1, channels), mode="sum", per_sample_weights=factors.reshape(bags, -1)
    )
    return sums.view(images, cells.shape[1], heads * channels)


def _extents(sizes: Sizes, device: torch.device) -> Tensor:
    """The width and height of each level, int64 [L, 2]; the copy waits for nothing that the device has yet to do."""
    return torch.tensor([(width, height) for height, width in sizes]).to(device, non_blocking=True)


def _sampled_planes(values: Tensor, cells: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """The weighted sums of samples as in `_sampled_rows`, level by level with `grid_sample`."""
    images, _, heads, channels = values.shape
    queries, samples = cells.shape[1], []
    levels = values.split([height * width for height, width in sizes], 1)
    for level, (plane, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        plane = plane.permute(0, 2, 3, 1).reshape(images * heads, channels, height, width)
        grid = (2 * cells[:, :, :, level] + 1) / torch.tensor([width, height], device=cells.device) - 1
        grid = grid.transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(plane, grid, align_corners=False))
    weights = weights.flatten(3).transpose(1, 2).reshape(images * heads, 1, queries, -1)
    sums = (torch.cat(samples, -1) * weights).sum(-1)
    return sums.view(images, heads * channels, queries).transpose(1, 2)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and a norm after it."""

    def __init__(self, channels: int, heads: int, hidden: int, levels: int, points: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = DeformableAttention(channels, heads, levels, points)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, sizes: Sizes) -> Tensor:
        """Tokens [B, N, C] after the layer.

        Args:
            x: [B, N, C], tokens of all levels.
            positions: [1, N, C].
            references: [N, 2], of `_cell_middles`.
            sizes: of the levels.
        """
        x = self.norm1(x + self.dropout(self.self_attention(x + positions, x, references, sizes)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DeformableEncoder(nn.Module):
    """Transformer layers in which every cell of every level attends to all levels."""

    def __init__(
        self, channels: int, heads: int, hidden: int, layers: int, levels: int, points: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        built = [DeformableEncoderLayer(channels, heads, hidden, levels, points, dropout) for _ in range(layers)]
        self.layers = nn.ModuleList(built)
        initialise_transformer(self)
        for layer in built:
            layer.self_attention.initialise()

    def forward(self, x: Tensor, positions: Tensor, sizes: Sizes) -> Tensor:
        """Tokens [B, N, C] of all levels after all layers; `positions` is [1, N, C]."""
        references = _cell_middles(sizes, x.device)
        for layer in self.layers:
            x = layer(x, positions, references, sizes)
        return x


def _cell_middles(sizes: Sizes, device: torch.device) -> Tensor:
    """The middle of every cell as x and y, shares of its level's width and height, float32 [N, 2]."""
    levels = []
    for height, width in sizes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        levels.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(levels)
