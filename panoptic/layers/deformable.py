"""Deformable convolution: taps sample bilinearly at offsets from their places (Dai et al., arXiv 1703.06211)."""

from __future__ import annotations

import torch
from torch import Tensor


def deformable_conv(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    factors: Tensor | None = None,
) -> Tensor:
    """A deformable 3x3 convolution, in float32 whatever the autocast: the kernel knows no other type on every device.

    Where an offset is not a number nothing of the result is one: torchvision's kernel for CPUs would read memory
    that is not the map's there, and end the process.

    Args:
        x: [B, C, h, w].
        offsets: [B, 18, h / stride, w / stride], rows and columns of each tap in turn.
        weight: [D, C, 3, 3].
        bias: [D].
        factors: [B, 9, h / stride, w / stride] on each tap (arXiv 1811.11168).

    Returns:
        [B, D, h / stride, w / stride].
    """
    from torchvision.ops import deform_conv2d  # torchvision takes seconds, and most processes need nothing of it

    with torch.autocast(x.device.type, enabled=False):
        offsets = offsets.float()
        unknown = offsets.isnan()
        result = deform_conv2d(
            x.float(),
            offsets.masked_fill(unknown, 0.0),
            weight.float(),
            None if bias is None else bias.float(),
            stride=(stride, stride),
            padding=(dilation, dilation),
            dilation=(dilation, dilation),
            mask=None if factors is None else factors.float(),
        )
        return result.masked_fill(unknown.any(), torch.nan)
