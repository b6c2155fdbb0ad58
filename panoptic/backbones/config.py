"""Backbones: ResNet, Res2Net, VGG, Swin, EfficientPS's own, any pyramid or plain ViT of timm, in one config.

A built backbone maps normalised images [B, 3, H, W] to a dict of features "res2" to "res5" (and
"stem" where it has one) and says their `channels` and `strides`. `model.backbone.name` alone sweeps the
backbones of "Image Panoptic Segmentation Challenges using COCO Dataset": resnet50_double3x3 (its table 7),
vgg16 (8), res2net50_26w_4s or another Res2Net (9).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval

from panoptic.layers.config import Norm
from panoptic.ranges import NOT_EMPTY, Decay, PositiveInt

if TYPE_CHECKING:
    from panoptic.backbones.build import Built

STAGES: tuple[str, ...] = ("res2", "res3", "res4", "res5")
"""The four stages, fine to coarse, as detectron2 names them: strides 4, 8, 16 and 32 where nothing is dilated."""

STEM_AND_STAGES: tuple[str, ...] = ("stem", *STAGES)
"""The stages and the layers before them, whose feature map most backbones give, too; `freeze` counts these."""

Deformable = Literal["none", "v1", "v2"]
"""v1: a 3x3 samples at offsets that a convolution before it gives; v2: the convolution weighs each sample, too."""


@dataclass(frozen=True)
class Backbone:
    """The backbone: its architecture, weights, strides, norms and frozen stages."""

    name: str = "resnet50"
    """resnet18 34 50 101, resnet50_double3x3, vgg16, vgg16_bn, res2net50_26w_4s, res2net50_v1b_26w_4s (101 too),
    resnet14, resnet14_double3x3, res2net14_26w_4s (a bottleneck a stage, for CPU cores, without published weights),
    swin_tiny small base large, efficientps_b0 to b7, or any timm model whose features have strides 4 to 32. A plain ViT
    of timm with patches of 16 pixels (of 14, which are resampled to 16) gets a pyramid of 256 channels (ViTDet's)."""
    weights: str = "none"
    """none (from scratch), imagenet (the published ones: of an installed package, else timm's cache, else downloaded by
    timm; of ResNets torchvision's first, of Swin the papers'), or a file that the pipeline opens and `load_weights`
    reads. timm is the former spelling of imagenet."""
    own_pixels: bool = False
    """Keep the model's pixel_mean, pixel_std and bgr where the weights were trained with others. Without it the
    pipeline takes those of the weights where it knows them; naming one of the three sets it."""
    output_stride: Literal[8, 16, 32] = 32
    """Stride of the last feature map; below 32 the last stages trade their stride for dilation."""
    stem: Literal["conv7", "deeplab"] = "conv7"
    """First layers: one 7x7 convolution (conv7), or three 3x3 convolutions (deeplab, the R-52 of detectron2)."""
    stride_in_1x1: bool = False
    """Bottlenecks stride in the first 1x1 (Caffe's and detectron2's MSRA weights), not in the 3x3 (torchvision's)."""
    dilate_first: bool = False
    """The first block of a dilated stage is dilated too (detectron2); torchvision keeps the previous dilation there."""
    multigrid: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (1, 1, 1)
    """Factors of the dilations of the last stage's blocks (DeepLabV3)."""
    deformable: Deformable = "none"
    """Deformable 3x3 in the bottlenecks: learned offsets (v1), learned weights too (v2); ResNet-50 and deeper."""
    deformable_stages: tuple[str, ...] = STAGES[1:]
    """Stages whose bottlenecks are deformable."""
    norm: Norm = "batch"
    """Normalisation of every convolution (vgg16 and swin have none to choose, a timm model keeps its own)."""
    drop_path: Decay = 0.0
    """Probability of skipping Swin's last block in training, less for earlier ones (0.3 in MaskFormer)."""
    freeze: Annotated[int, Interval(ge=0, le=5)] = 0
    """Freeze the stem (1) and res2 to res_n (n up to 5): no gradients, fixed batch-norm statistics. Of a plain ViT the
    patches, positions and tokens (1), then quarters of its blocks; its pyramid always learns."""

    @property
    def timm_name(self) -> str:
        """timm's name of the model whose ImageNet weights this backbone takes."""
        from panoptic.backbones.build import TIMM_NAMES

        return TIMM_NAMES.get(self.name, self.name)

    def build(self, levels: Collection[str] = STAGES) -> Built:
        """The module; see `panoptic.backbones.build.build`."""
        from panoptic.backbones.build import build

        return build(self, levels)
