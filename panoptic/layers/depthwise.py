"""Grouped convolutions that a CPU computes in float32 although the network around them runs in bfloat16."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def keep_depthwise_in_float32(model: nn.Module) -> None:
    """Let grouped convolutions whose backward pass is wrong or slow in bfloat16 compute in float32 on a CPU, in place.

    Wrong are those with a dilation: in torch 2.15, channels last and on maps of 24x40, the gradient of the weights
    held what lay in memory before, up to 1e35, in some steps and not in others. In float32 it was right, and so were
    convolutions without groups.

    Slow are depthwise ones of 5x5 and more and with a stride: oneDNN has no kernel of its own for their gradients.
    Forward and backward of 4 images on one core of an AMD EPYC (Zen 5), channels last: 144 channels of 48x80, 5x5,
    stride 2, takes 7 ms in float32 and 46 in bfloat16; 96 channels of 96x160, 3x3, stride 2, takes 7 and 27; a 3x3 of
    stride 1 takes 6 and 3, and stays. A step of Mask2Former on EfficientNet-Lite0 takes three quarters of the time.

    Weights, their names and the type of what comes out stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and (_is_wrong(module) or _is_slow(module)):
            module.__class__ = _in_float32(type(module))


def _is_wrong(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and max(conv.dilation) > 1


def _is_slow(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    return depthwise and (max(conv.kernel_size) >= 5 or max(conv.stride) > 1)


@functools.cache
def _in_float32(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """A class of convolution (timm has its own, with TensorFlow's padding) that computes outside of autocast."""
    if issubclass(kind, _Float32):
        return kind
    return type(kind.__name__, (_Float32, kind), {})


class _Float32(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        # autocast's type, as any convolution gives: features that were stored come in as float32
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            return super().forward(input.float()).to(kind)
