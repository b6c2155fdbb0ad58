"""The canvas of a pyramid in whole cells of its coarsest level, up to which a network pads by itself.

Shapes: H x W canvas.
"""

from __future__ import annotations

from panoptic.rcnn.config import COARSEST
from panoptic.segmentation import Frame


def padded_canvas(frame: Frame) -> tuple[int, int]:
    """Height and width of the canvas in whole cells of the coarsest level."""
    height, width = frame.canvas
    return -(-height // COARSEST) * COARSEST, -(-width // COARSEST) * COARSEST
