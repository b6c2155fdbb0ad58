"""Convolution, normalisation and activation in one block, and the weights that convolutions begin with.

Shapes: B images, C channels, H x W canvas, h x w a feature map.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.norm import norm_layer


class ConvNormAct(nn.Module):
    """Convolution without bias, normalisation, ReLU. Padding keeps the size where the stride is 1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        norm: Norm,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = norm_layer(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, outputs, h / stride, w / stride]."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


def initialise_convs(module: nn.Module) -> None:
    """He et al.'s initialisation in every convolution: normal weights of variance 2 / fan-out, biases of zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
