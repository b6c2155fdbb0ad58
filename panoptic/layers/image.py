"""Normalisation of the input image inside the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panoptic.segmentation import Frame


class ImageNormalisation(nn.Module):
    """uint8 RGB to normalised floats; batch padding becomes 0 after normalisation, as the references pad.

    Args:
        mean, std: of each channel, on the scale 0..255 and in the order of the output channels.
        bgr: turn the channels round.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, H, W]; what lies outside `frame.sizes` is 0."""
        if self.bgr:
            images = images.flip(1)
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        # without a branch on the sizes, which would break a compiled graph
        return x if frame is None else x * frame.valid(x.device)[:, None]
