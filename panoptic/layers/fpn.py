"""Feature pyramids: detectron2's FPN, and the branch that brings its levels to stride 4 and adds them; and PSPNet's
pyramid of averages with the upsampling that JSIS-Net puts behind it.

Lin et al., "Feature Pyramid Networks", arXiv 1612.03144; Kirillov et al., "Panoptic Feature Pyramid
Networks", arXiv 1901.02446, section 3.1; Zhao et al., "Pyramid Scene Parsing Network", arXiv 1612.01105.

Shapes: B images, C channels; "p2" to "p7" have strides 4 to 128.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from panoptic.layers.conv import ConvNormAct, Norm, norm_layer, resize

LEVELS = {"res2": "p2", "res3": "p3", "res4": "p4", "res5": "p5"}
"""Pyramid level of each backbone feature."""

Top = Literal["none", "pool", "convolutions"]
"""Levels above p5: none; p6, every second cell of p5 (Faster R-CNN's); p6 and p7, by strided convolutions from p5."""

Deconvolution = Literal["double", "same", "none"]
"""The transposed convolution of `HybridUpsampling`."""


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down sum of nearest neighbours, 3x3 output convolutions; no activation.

    Args:
        channels: of the backbone's features; those named in `LEVELS` are used.
        width: C of every level.
        norm: after each convolution; None gives them a bias instead, as published.
        top: what stands above p5.
    """

    def __init__(
        self, channels: Mapping[str, int], width: int = 256, norm: Norm | None = None, top: Top = "pool"
    ) -> None:
        super().__init__()
        self.top = top
        self.channels = {level: width for name, level in LEVELS.items() if name in channels}
        self.lateral, self.output = nn.ModuleDict(), nn.ModuleDict()
        for name, level in LEVELS.items():
            if name in channels:
                self.lateral[level] = _conv(channels[name], width, 1, norm)
                self.output[level] = _conv(width, width, 3, norm)
        self.strided = nn.ModuleDict()
        if top == "convolutions":
            for level in ("p6", "p7"):
                self.strided[level] = nn.Conv2d(width, width, 3, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of the backbone to the levels, fine to coarse, each [B, C, h, w]."""
        names = {level: name for name, level in LEVELS.items() if level in self.channels}
        levels: dict[str, Tensor] = {}
        above: Tensor | None = None
        for level in reversed(names):
            here = self.lateral[level](features[names[level]])
            if above is not None:
                here = here + functional.interpolate(above, size=here.shape[-2:], mode="nearest")
            levels[level], above = self.output[level](here), here
        levels = dict(reversed(levels.items()))
        if self.top == "pool":
            levels["p6"] = levels["p5"][:, :, ::2, ::2]
        if self.top == "convolutions":
            levels["p6"] = self.strided["p6"](levels["p5"])
            levels["p7"] = self.strided["p7"](functional.relu(levels["p6"]))
        return levels


class SemanticFPN(nn.Module):
    """p2 to p5 brought to stride 4 by 3x3 convolutions, each with a bilinear doubling after it, and added.

    p2 has one convolution and no doubling, p3 one, p4 two, p5 three.
    """

    def __init__(self, inputs: int, width: int, norm: Norm = "group") -> None:
        super().__init__()
        self.branches = nn.ModuleDict()
        for level, count in {"p2": 1, "p3": 1, "p4": 2, "p5": 3}.items():
            convs = [ConvNormAct(inputs if k == 0 else width, width, 3, norm) for k in range(count)]
            self.branches[level] = nn.ModuleList(convs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, levels: Mapping[str, Tensor]) -> Tensor:
        """Levels [B, inputs, h, w] to [B, width, H / 4, W / 4]."""
        sizes = [(levels[level].shape[-2], levels[level].shape[-1]) for level in self.branches]
        total: Tensor | None = None
        for place, (level, convs) in enumerate(self.branches.items()):
            x = levels[level]
            for step, conv in enumerate(convs):  # type: ignore[arg-type]
                x = resize(conv(x), sizes[max(0, place - step - 1)], False)
            total = x if total is None else total + x
        assert total is not None
        return total


def _conv(inputs: int, outputs: int, kernel: int, norm: Norm | None) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm is None)
    return conv if norm is None else nn.Sequential(conv, norm_layer(norm, outputs))


class PooledSemantics(nn.Module):
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
            resize(branch(functional.adaptive_avg_pool2d(x, cells)), size, True)
            for cells, branch in zip(self.bins, self.branches, strict=True)
        ]
        return self.fuse(torch.cat([x, *pooled], 1))


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
