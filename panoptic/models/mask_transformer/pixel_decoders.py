"""Pixel decoders of the mask-classification models: from a backbone's pyramid to features of every pixel.

`FPNPixelDecoder` is MaskFormer's (Cheng et al., arXiv 2107.06278), with or without transformer layers on the
coarsest map; `DeformablePixelDecoder` is Mask2Former's (Cheng et al., arXiv 2112.01527). Both give the features
that masks are products with (stride 4) and the maps that queries attend to, coarse to fine.

Shapes: B images, C channels, D channels of the mask features, h x w a feature map, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.attention import Encoder, sine_positions
from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer
from panoptic.layers.resize import resize
from panoptic.models.mask_transformer.deformable_attention import DeformableEncoder

COARSE_TO_FINE = ("res5", "res4", "res3", "res2")


class Decoded(NamedTuple):
    """The outputs of a pixel decoder."""

    features: Tensor
    """[B, D, h, w] at the finest stride."""
    levels: list[Tensor]
    """Three maps [B, C, h, w], coarse to fine; the first one went through the transformer if there is one."""


class ConvNorm(nn.Module):
    """Convolution without bias, a norm (published: 32 groups), and ReLU where asked."""

    def __init__(self, inputs: int, outputs: int, kernel: int, activate: bool, norm: Norm) -> None:
        super().__init__()
        self.activate = activate
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = norm_layer(norm, outputs)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        """A map [B, inputs, h, w] to [B, outputs, h, w]."""
        x = self.norm(self.conv(x))
        return F.relu(x, inplace=True) if self.activate else x


def projection(inputs: int, outputs: int, kernel: int = 1) -> nn.Conv2d:
    """A convolution with bias, initialised uniformly by fan-in as Caffe2's Xavier."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def map_positions(x: Tensor) -> Tensor:
    """The sine positions of a map [B, C, h, w], float32 [1, N, C]; padding is not told from image."""
    everywhere = torch.ones(1, *x.shape[-2:], dtype=torch.bool, device=x.device)
    return sine_positions(everywhere, x.shape[1]).flatten(2).transpose(1, 2)


class FPNPixelDecoder(nn.Module):
    """MaskFormer's feature pyramid: adapters without activation, nearest upsampling, 3x3 after each sum.

    With `encoder_layers` the coarsest map first goes through DETR's encoder ("+6 Enc").

    Args:
        inputs: channels of the backbone's features, by name.
        channels: C.
        mask_channels: D.
        norm: after every convolution but the last.
        mask_kernel: of the last convolution (MaskFormer: 3; Mask2Former's own decoder: 1).
        encoder_layers: of the transformer on res5; 0 = none.
        heads, hidden, dropout: of those layers.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        channels: int,
        mask_channels: int,
        *,
        norm: Norm = "group",
        mask_kernel: int = 3,
        encoder_layers: int = 0,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.project = self.encoder = None
        coarsest = inputs[COARSE_TO_FINE[0]]
        if encoder_layers:
            self.project = projection(coarsest, channels)
            self.encoder = Encoder(channels, heads, hidden, encoder_layers, dropout)
            coarsest = channels
        self.adapters = nn.ModuleList(ConvNorm(inputs[name], channels, 1, False, norm) for name in COARSE_TO_FINE[1:])
        self.layers = nn.ModuleList(
            ConvNorm(coarsest if k == 0 else channels, channels, 3, True, norm) for k in range(len(COARSE_TO_FINE))
        )
        self.mask_features = projection(channels, mask_channels, mask_kernel)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Decoded, Tensor]:
        """The decoded features, and the coarsest map [B, C, h, w] before the pyramid.

        That map is res5 itself, or what the transformer made of it.

        Args:
            features: res2 to res5 of the backbone, by name.
        """
        coarsest = features[COARSE_TO_FINE[0]]
        if self.project is not None and self.encoder is not None:
            x = self.project(coarsest)
            tokens = self.encoder(x.flatten(2).transpose(1, 2), map_positions(x))
            coarsest = tokens.transpose(1, 2).reshape(x.shape)
        levels = [self.layers[0](coarsest)]
        for name, adapter, layer in zip(COARSE_TO_FINE[1:], self.adapters, self.layers[1:], strict=True):
            adapted = adapter(features[name])
            levels.append(layer(adapted + F.interpolate(levels[-1], size=adapted.shape[-2:], mode="nearest")))
        return Decoded(self.mask_features(levels[-1]), levels[:3]), coarsest


class DeformablePixelDecoder(nn.Module):
    """Mask2Former's pixel decoder: deformable attention over strides 32, 16 and 8, one pyramid step to stride 4.

    The reference's comments say that the step upsamples by nearest; its code is bilinear, and so is this.

    Args:
        inputs: channels of the backbone's features, by name.
        channels: C.
        mask_channels: D.
        norm: after every convolution but the last.
        layers, heads, points, hidden, dropout: of the encoder.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        channels: int,
        mask_channels: int,
        *,
        norm: Norm = "group",
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        hidden: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        names = COARSE_TO_FINE[:3]
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs[name], channels, 1), norm_layer(norm, channels)) for name in names
        )
        for conv, _ in self.projections:  # type: ignore[misc]
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.level_embedding = nn.Parameter(torch.randn(len(names), channels))
        self.encoder = DeformableEncoder(channels, heads, hidden, layers, len(names), points, dropout)
        self.adapter = ConvNorm(inputs["res2"], channels, 1, False, norm)
        self.layer = ConvNorm(channels, channels, 3, True, norm)
        self.mask_features = projection(channels, mask_channels)

    def forward(self, features: Mapping[str, Tensor]) -> Decoded:
        """The decoded features.

        Args:
            features: res2 to res5 of the backbone, by name.
        """
        # tokens of three strides, one after the other, and for each its position and the embedding of its level
        maps = [project(features[name]) for name, project in zip(COARSE_TO_FINE, self.projections, strict=False)]
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        positions = [map_positions(x) + level for x, level in zip(maps, self.level_embedding, strict=True)]
        tokens = self.encoder(tokens, torch.cat(positions, 1), sizes)
        levels = _unflatten(tokens, sizes)
        # one step of a pyramid from stride 8 to stride 4
        adapted = self.adapter(features["res2"])
        fine = self.layer(adapted + resize(levels[-1], (adapted.shape[-2], adapted.shape[-1]), False))
        return Decoded(self.mask_features(fine), levels)


def _unflatten(tokens: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tokens [B, N, C] as the maps [B, C, h, w] of the levels."""
    parts = tokens.split([height * width for height, width in sizes], 1)
    return [part.transpose(1, 2).unflatten(2, size).contiguous() for part, size in zip(parts, sizes, strict=True)]
