"""Feature pyramids: detectron2's FPN, and the branch that brings its levels to stride 4 and adds them.

Lin et al., "Feature Pyramid Networks", arXiv 1612.03144; Kirillov et al., "Panoptic Feature Pyramid Networks", arXiv
1901.02446, section 3.1.

Shapes: B images, C channels; "p2" to "p7" have strides 4 to 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.conv import ConvNormAct
from panoptic.layers.norm import norm_layer
from panoptic.layers.resize import resize

LEVELS = {"res2": "p2", "res3": "p3", "res4": "p4", "res5": "p5"}
"""Pyramid level of each backbone feature."""

Top = Literal["none", "pool", "convolutions"]
"""Levels above p5: none; p6, every second cell of p5 (Faster R-CNN's); p6 and p7, by strided convolutions from p5."""


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
                here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            levels[level], above = self.output[level](here), here
        levels = dict(reversed(levels.items()))
        if self.top == "pool":
            levels["p6"] = levels["p5"][:, :, ::2, ::2]
        if self.top == "convolutions":
            levels["p6"] = self.strided["p6"](levels["p5"])
            levels["p7"] = self.strided["p7"](F.relu(levels["p6"]))
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
