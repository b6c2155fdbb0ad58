"""The mask head of EfficientPS: Mask R-CNN's, with separable convolutions and norms (arXiv 2004.02307, section 3.4).

Shapes: R regions, C channels, s x s pooled features, S = 2 s the side of a mask.
"""

from __future__ import annotations

from torch import Tensor, nn

from panoptic.layers.config import Norm
from panoptic.layers.conv import initialise_convs
from panoptic.layers.norm import BATCH_NORMS
from panoptic.models.efficientps.blocks import SeparableConv
from panoptic.rcnn.roi_heads import MaskHead


class SeparableMaskHead(MaskHead):
    """Separable 3x3 convolutions on pooled features, one upsampling, a mask for each class.

    Args:
        inputs: channels of the features.
        channels: of the hidden layers.
        layers: how many separable convolutions.
        classes: K.
        norm: after each convolution.
    """

    def __init__(self, inputs: int, channels: int, layers: int, classes: int, norm: Norm) -> None:
        super().__init__(inputs, channels, layers, classes)
        self.convs = nn.ModuleList(SeparableConv(inputs if k == 0 else channels, channels, norm) for k in range(layers))
        initialise_convs(self)

    def hidden(self, pooled: Tensor) -> Tensor:
        """[R, C, s, s] through the convolutions.

        Without a region batch norms have no statistics to learn from: a worker's own ones keep what they have.
        Synchronised ones take part all the same, since the other workers wait for them.
        """
        norms = [m for m in self.convs.modules() if isinstance(m, BATCH_NORMS[0]) and m.training and not len(pooled)]
        for norm in norms:
            norm.eval()
        for conv in self.convs:
            pooled = conv(pooled)
        for norm in norms:
            norm.train()
        return pooled
