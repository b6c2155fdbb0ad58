"""Mask2Former's transformer decoder with masked attention (Cheng et al., arXiv 2112.01527, section 3.2).

Each layer attends to one of three strides in turn, only where the mask that a query predicts so far is at least 1/2;
cross-attention comes first, since the queries are learned and have no content of the image before it.

Shapes: B images, Q queries, K classes, C channels, D mask channels, h x w stride-4 maps, cells of one stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.attention import MLP, Attention, initialise_transformer
from panoptic.layers.resize import resize
from panoptic.models.mask2former.config import LEVELS
from panoptic.models.mask_transformer.pixel_decoders import Decoded, map_positions


class MaskedDecoder(nn.Module):
    """Learned queries that attend, layer by layer, to strides 32, 16 and 8, each within its own mask."""

    def __init__(
        self, classes: int, queries: int, channels: int, mask_channels: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.query_content = nn.Embedding(queries, channels)
        self.query_positions = nn.Embedding(queries, channels)
        self.level_embedding = nn.Embedding(LEVELS, channels)
        self.layers = nn.ModuleList(MaskedDecoderLayer(channels, heads, hidden) for _ in range(layers))
        initialise_transformer(self.layers)
        self.norm = nn.LayerNorm(channels)
        self.class_head = nn.Linear(channels, classes + 1)
        self.mask_head = MLP((channels, channels, channels, mask_channels))

    def forward(self, decoded: Decoded) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [B, Q, K + 1] and embeddings [B, Q, D] of the initial queries and after every layer.

        What masks attention is the product of the embeddings with resized features instead of resized products: both
        are linear, so the numbers are the same to rounding.
        """
        memories, keys, coarse = [], [], []
        for level, embedding in zip(decoded.levels, self.level_embedding.weight, strict=True):
            memory = level.flatten(2).transpose(1, 2) + embedding
            memories.append(memory)
            keys.append(memory + map_positions(level))
            with torch.no_grad():
                coarse.append(resize(decoded.features, (level.shape[-2], level.shape[-1]), False).flatten(2))
        x = self.query_content.weight.expand(memories[0].shape[0], -1, -1)
        positions = self.query_positions.weight[None]
        classes, embeddings = [], []
        for index, layer in enumerate(self.layers):
            level = index % LEVELS
            self._predict(x, classes, embeddings)
            mask = attention_mask(embeddings[-1], coarse[level])
            x = layer(x, positions, keys[level], memories[level], mask)
        self._predict(x, classes, embeddings)
        return classes, embeddings

    def _predict(self, x: Tensor, classes: list[Tensor], embeddings: list[Tensor]) -> None:
        """Append the predictions of the queries [B, Q, C]."""
        normalised = self.norm(x)
        classes.append(self.class_head(normalised))
        embeddings.append(self.mask_head(normalised))


@torch.no_grad()
def attention_mask(embeddings: Tensor, features: Tensor) -> Tensor:
    """The cells to which each query may attend, bool [B, 1, Q, cells]: where its mask is at least 1/2.

    A query whose mask is less everywhere may attend everywhere.

    Args:
        embeddings: [B, Q, D].
        features: [B, D, cells], at the resolution of the level that is attended to.
    """
    inside = embeddings @ features >= 0
    return (inside | ~inside.any(-1, keepdim=True))[:, None]


class MaskedDecoderLayer(nn.Module):
    """Masked attention to the image, then self-attention, then the feed-forward network; normalised after each."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attention, self.self_attention = Attention(channels, heads), Attention(channels, heads)
        self.linear1, self.linear2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, Q, C] after the layer.

        Args:
            x: [B, Q, C], the queries.
            positions: [1, Q, C], of the queries.
            keys: [B, cells, C], the memory with its positions added.
            memory: [B, cells, C].
            mask: bool [B, 1, Q, cells], of `attention_mask`.
        """
        x = self.norm1(x + self.cross_attention(x + positions, keys, memory, mask))
        placed = x + positions
        x = self.norm2(x + self.self_attention(placed, placed, x))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))
