"""Stacks of 3x3 convolutions in front of a predictor, with coordinate channels and deformable ones where asked.

Deformable: Zhu et al., "Deformable ConvNets v2", arXiv 1811.11168. Coordinates: Liu et al., "An Intriguing
Failing of Convolutional Neural Networks and the CoordConv Solution", arXiv 1807.03247.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.deformable import deformable_conv
from panoptic.layers.norm import norm_layer

TAPS = 9
"""Taps of a 3x3 convolution: each has an offset (dy, dx) and a factor."""


class ConvStack(nn.Module):
    """A stack of `count` convolutions, each with normalisation and ReLU; only the first one sees coordinates.

    Without a norm the convolutions have a bias.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        count: int,
        *,
        norm: Norm | None = "group",
        deform: bool = False,
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        first = inputs + 2 * coordinates
        kind = ModulatedConv if deform else PlainConv
        self.convs = nn.ModuleList(kind(first if k == 0 else width, width, norm) for k in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, width, h, w]."""
        if self.coordinates:
            x = with_coordinates(x)
        for conv in self.convs:
            x = conv(x)
        return x


class PlainConv(nn.Module):
    """3x3 convolution, normalisation, ReLU; torch's own initialisation."""

    def __init__(self, inputs: int, outputs: int, norm: Norm | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm is None)
        self.norm = nn.Identity() if norm is None else norm_layer(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class ModulatedConv(nn.Module):
    """Deformable 3x3 convolution with a factor a tap, then normalisation and ReLU; in float32 whatever the autocast.

    Offsets and factors come from a plain convolution that starts from torch's own random weights, as Panoptic
    FCN's does, and not from zero.
    """

    def __init__(self, inputs: int, outputs: int, norm: Norm | None) -> None:
        super().__init__()
        self.offset = nn.Conv2d(inputs, 3 * TAPS, 3, padding=1)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm is None)
        self.norm = nn.Identity() if norm is None else norm_layer(norm, outputs)
        nn.init.kaiming_uniform_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w]."""
        moved, factor = self.offset(x).float().split([2 * TAPS, TAPS], 1)
        x = deformable_conv(x, moved, self.conv.weight, self.conv.bias, factors=factor.sigmoid())
        return F.relu(self.norm(x), inplace=True)


def with_coordinates(x: Tensor) -> Tensor:
    """[B, C, h, w] to [B, C + 2, h, w]: the row, then the column, each from -1 to 1."""
    height, width = x.shape[-2:]
    rows, columns = _evenly_spaced(height, x), _evenly_spaced(width, x)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], 1)


def _evenly_spaced(count: int, like: Tensor) -> Tensor:
    """Evenly spaced numbers [`count`] from -1 to 1, on the device of `like` and of its type."""
    if torch.compiler.is_compiling():
        # linspace would make the count a constant of the graph, and every size of image a compilation of its own
        steps = torch.arange(count, device=like.device, dtype=torch.float32)
        return (steps * (2 / max(count - 1, 1)) - 1).to(like.dtype)
    return torch.linspace(-1, 1, count, device=like.device, dtype=like.dtype)


def predictor(inputs: int, outputs: int, side: int, bias: float = 0.0) -> nn.Conv2d:
    """A convolution of weights from N(0, 0.01) that keeps the size."""
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]
    return conv
