"""The losses of EfficientPS (arXiv 2004.02307, section 3.3 and 3.4): those of Mask R-CNN and one of the semantic head.

Shapes: B images, K classes, H x W canvas, h x w the map of the semantic head.
"""

from __future__ import annotations

from torch import Tensor

from panoptic import losses
from panoptic.layers.resize import resize
from panoptic.rcnn.canvas import padded_canvas
from panoptic.segmentation import Targets
from panoptic.targets.dense import semantic_map

HARDEST = 0.25
"""Share of the pixels that the semantic loss learns from."""


def semantic_loss(logits: Tensor, targets: Targets) -> Tensor:
    """The cross-entropy of logits [B, K, h, w] at canvas size, a mean over the hardest quarter of all pixels.

    Void and padding count among all pixels, with a loss of 0 (Rota Bulò et al., "Loss Max-Pooling for Semantic Image
    Segmentation", arXiv 1704.02966).
    """
    height, width = targets.frame.canvas
    upsampled = resize(logits, padded_canvas(targets.frame), False)[:, :, :height, :width]
    return losses.top_k_cross_entropy(upsampled, semantic_map(targets), fraction=HARDEST)
