"""Coarse maps at the sizes at which Panoptic-DeepLab's two flavours compare and merge them.

Shapes: h x w the maps of the network, H x W the canvas, which they cover.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from panoptic.layers.resize import resize
from panoptic.segmentation import Frame


@dataclass(frozen=True)
class Upsampling:
    """Bilinear to the canvas, cut to the image, and bilinear to the size at which the flavour merges."""

    standalone: bool
    """bowenc0221: corners aligned, merged at the size of the image; else detectron2: merged at that of the output."""
    stride: int
    """Stride of the maps."""

    def canvas(self, x: Tensor, canvas: tuple[int, int]) -> Tensor:
        """[B, C, h, w] to [B, C, H, W]; what has that size already stays as it is."""
        return resize(x, self.whole(x, canvas), self.standalone)[..., : canvas[0], : canvas[1]]

    def whole(self, x: Tensor, canvas: tuple[int, int]) -> tuple[int, int]:
        """The size to which [..., h, w] is upsampled; the canvas is its upper left part."""
        if tuple(x.shape[-2:]) == tuple(canvas) or self.standalone:
            return canvas
        return x.shape[-2] * self.stride, x.shape[-1] * self.stride

    def image(self, x: Tensor, frame: Frame, b: int) -> Tensor:
        """[1, C, h, w] of image b at canvas resolution without its batch padding."""
        height, width = frame.size(b)
        return self.canvas(x, frame.canvas)[..., :height, :width]

    def size(self, frame: Frame, b: int) -> tuple[int, int]:
        """The size at which image b is merged."""
        return frame.size(b) if self.standalone else frame.output_size(b)

    def merged(self, x: Tensor, frame: Frame, b: int) -> Tensor:
        """[1, C, h, w] of image b at the size at which it is merged."""
        return resize(self.image(x, frame, b), self.size(frame, b), False)
