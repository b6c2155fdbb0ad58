"""The canvas of a pyramid in whole cells of its coarsest level, up to which a network pads by itself.

Shapes: B images, C channels, H x W canvas.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from panoptic.rcnn.config import COARSEST
from panoptic.segmentation import Frame


def padded_canvas(frame: Frame) -> tuple[int, int]:
    """Height and width of the canvas in whole cells of the coarsest level."""
    height, width = frame.canvas
    return -(-height // COARSEST) * COARSEST, -(-width // COARSEST) * COARSEST


def pad_canvas(x: Tensor) -> Tensor:
    """[B, C, H, W] with zeros to its right and below, up to the size that `padded_canvas` gives."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % COARSEST, 0, -height % COARSEST))
