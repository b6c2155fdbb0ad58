"""JSIS-Net's semantic branch: PSPNet's pyramid pooling, a classifier and hybrid upsampling.

Shapes: B images, C channels, h x w a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.conv import ConvNormAct
from panoptic.layers.resize import resize
from panoptic.models.jsis_net.config import Deconvolution


class SemanticBranch(nn.Module):
    """JSIS-Net's semantic branch: pyramid pooling, a classifier of `width` channels, hybrid upsampling.

    Args:
        inputs: channels of the map.
        width: of the pyramid pooling's result.
        classes: C.
        deconvolution: of `HybridUpsampling`.
        bins, bin_channels, norm: of `PyramidPooling`.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        classes: int,
        deconvolution: Deconvolution,
        bins: Sequence[int],
        bin_channels: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.ppm = PyramidPooling(inputs, width, bins, bin_channels, norm)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.upsample = HybridUpsampling(classes, deconvolution)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to logits [B, C, 2 h, 2 w] (or [B, C, h, w])."""
        return self.upsample(self.classifier(self.ppm(x)))


class PyramidPooling(nn.Module):
    """The pyramid pooling module of PSPNet (Zhao et al., arXiv 1612.01105).

    The map and its averages over 1, 4, 9 and 36 cells (each projected by a 1x1 and resized with its corners on
    the map's corners) are concatenated and fused by a 3x3.

    Args:
        inputs: channels of the map.
        outputs: channels of the result.
        bins: cells along each axis of each average.
        channels: to which each average is projected; 0 shares out the map's evenly, as PSPNet does.
        norm: of every convolution.

    Raises:
        ValueError: group norm would see single values where a map has one cell.
    """

    def __init__(self, inputs: int, outputs: int, bins: Sequence[int], channels: int, norm: Norm) -> None:
        super().__init__()
        channels = channels or inputs // len(bins)
        if norm == "group" and 1 in bins and channels <= math.gcd(32, channels):
            raise ValueError(
                f"bin_channels: {channels} channels are {channels} groups of one, and a group of one value has no "
                "deviation where the map has one cell; take 64 channels or more, or another norm"
            )
        self.bins, self.batch_norm = tuple(bins), norm == "batch"
        self.branches = nn.ModuleList(ConvNormAct(inputs, channels, 1, norm) for _ in bins)
        self.fuse = ConvNormAct(inputs + len(bins) * channels, outputs, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h, w].

        Raises:
            ValueError: batch norm is asked for the statistics of a single value.
        """
        if self.training and self.batch_norm and len(x) == 1 and 1 in self.bins:
            raise ValueError(
                "pyramid pooling: batch norm over one image has one value to normalise; give each worker two images or "
                "more at once (train.batch, train.micro_batch), or choose model.norm sync or group"
            )
        size = (x.shape[-2], x.shape[-1])
        pooled = [
            resize(branch(_averages(x, cells)), size, True)
            for cells, branch in zip(self.bins, self.branches, strict=True)
        ]
        return self.fuse(torch.cat([x, *pooled], 1))


def _averages(x: Tensor, cells: int) -> Tensor:
    """The means [B, C, cells, cells] of the parts of [B, C, h, w], which overlap where they do not come out even."""
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, cells)
    # adaptive average pooling as two products with matrices, which every runtime computes for maps of any size
    down, across = (_shares(side, cells, x) for side in x.shape[-2:])
    return down @ x @ across.T


def _shares(side: int, cells: int, like: Tensor) -> Tensor:
    """The share of each position of an axis in each mean, float32 [cells, side]."""
    place, cell = torch.arange(side, device=like.device), torch.arange(cells, device=like.device)[:, None]
    first = torch.div(cell * side, cells, rounding_mode="floor")
    last = torch.div(cell * side + side + cells - 1, cells, rounding_mode="floor")
    inside = ((place >= first) & (place < last)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class HybridUpsampling(nn.Module):
    """Class logits upsampled first by a transposed convolution of all classes, then (by the caller) bilinearly.

    Meletis and Dubbelman, arXiv 1803.05675. "double" is their 4x4 of stride 2; "same" the 3x3 of stride 1 in the
    code of JSIS-Net's successor; "none" leaves it to the bilinear step. Both begin as what they replace: bilinear
    interpolation of each class, or the identity.
    """

    def __init__(self, classes: int, kind: Deconvolution) -> None:
        super().__init__()
        self.deconvolution: nn.ConvTranspose2d | None = None
        if kind == "none":
            return
        kernel, stride = (4, 2) if kind == "double" else (3, 1)
        self.deconvolution = nn.ConvTranspose2d(classes, classes, kernel, stride, padding=1)
        along = torch.tensor([0.25, 0.75, 0.75, 0.25]) if kind == "double" else torch.tensor([0.0, 1.0, 0.0])
        weight = torch.zeros_like(self.deconvolution.weight)
        weight[range(classes), range(classes)] = along[:, None] * along
        with torch.no_grad():
            self.deconvolution.weight.copy_(weight)
        nn.init.zeros_(self.deconvolution.bias)  # type: ignore[arg-type]

    def forward(self, logits: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, 2 h, 2 w] ("double") or to the same size."""
        return logits if self.deconvolution is None else self.deconvolution(logits)
