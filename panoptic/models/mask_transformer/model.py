"""The common part of MaskFormer, Mask2Former and EoMT: a backbone, queries with a class and a mask each, their merge.

Shapes: B images, Q queries, K classes, D mask channels, h x w stride-4 maps, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from panoptic.layers.image import ImageNormalisation
from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.models.mask_transformer.config import MaskClassificationConfig
from panoptic.models.mask_transformer.postprocess import postprocess
from panoptic.models.mask_transformer.truth import truth_outputs
from panoptic.segmentation import Categories, Frame, Targets


class MaskTransformer(PanopticModel):
    """A model whose queries have a class and a mask each.

    Outputs: "classes" [B, Q, K + 1] ("no object" last), "embeddings" [B, Q, D] and "features" [B, D, h, w]; the mask
    logits of a query are the product of its embedding with the features, and are made only of the queries that need
    one. "auxiliary_classes" [L - 1, B, Q, K + 1] and "auxiliary_embeddings" [L - 1, B, Q, D] are those of the earlier
    layers. "features_i" [B, D, h, w], of every i below L - 1, are those of earlier layers that have features of their
    own; else all layers share the last one's. `postprocess` also takes "masks" [B, Q, ...] in place of the products:
    logits over the canvas at any resolution, or bool.
    """

    config: MaskClassificationConfig
    class_layers = MappingProxyType({"class_head": ("classes", "nothing")})

    def __init__(self, config: MaskClassificationConfig, categories: Categories, backbone: Any = None) -> None:
        """`backbone`, a module, is that of the configuration by default, as a pyramid."""
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std)
        self.backbone = config.backbone.build() if backbone is None else backbone

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 images [B, 3, H, W] to the outputs that the class describes."""
        return self.forward_normalised(self.normalised(images, frame))

    @abstractmethod
    def forward_normalised(self, pixels: Tensor) -> Outputs:
        """The network on normalised pixels, float [B, 3, H, W]."""

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Maps, instances and class maps; masks are made once, of the queries that anything needs."""
        return postprocess(outputs, frame, want, self.categories, self.config)

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The outputs "classes" and "masks" of the ground truth, in the queries that are nearest to it."""
        return truth_outputs(targets, outputs)
