"""Backbones: ResNet, Res2Net, VGG, Swin, EfficientPS's own, any pyramid or plain ViT of timm, in one config.

A built backbone maps normalised images [B, 3, H, W] to a dict of features "res2" to "res5" (and
"stem" where it has one) and says their `channels` and `strides`. `model.backbone.name` alone sweeps the
backbones of "Image Panoptic Segmentation Challenges using COCO Dataset": resnet50_double3x3 (its table 7),
vgg16 (8), res2net50_26w_4s or another Res2Net (9).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Interval

from panoptic.backbones import imagenet
from panoptic.backbones.efficientnet import SCALES, EfficientNet
from panoptic.backbones.res2net import RES2NETS, Res2Net
from panoptic.backbones.resnet import DEPTHS, Deformable, ResNet
from panoptic.backbones.stages import STAGES, STEM_AND_STAGES
from panoptic.backbones.swin import SWINS, Swin
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.vgg import VGG, VGGS
from panoptic.backbones.vit_pyramid import ViTPyramid, patch_and_grid, vit_options
from panoptic.backbones.weights import load_weights
from panoptic.layers.norm import Norm, freeze
from panoptic.ranges import NOT_EMPTY, Decay, PositiveInt

ALWAYS = ("name", "weights", "own_pixels", "freeze")
"""Options that every backbone has."""

OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        DEPTHS,
        (
            *("output_stride", "stem", "stride_in_1x1", "dilate_first", "multigrid", "norm"),
            *("deformable", "deformable_stages"),
        ),
    ),
    **dict.fromkeys(RES2NETS, ("output_stride", "stride_in_1x1", "dilate_first", "norm")),
    "vgg16": (),
    "vgg16_bn": ("norm",),
    **dict.fromkeys(SWINS, ("drop_path",)),
    **dict.fromkeys(SCALES, ("norm",)),
}
"""Options beside `ALWAYS` of each of our own backbones; a pyramid of timm has the output stride, a plain ViT none."""

TIMM_NAMES = {
    **{name: f"{name}.tv_in1k" for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
    "res2net50_v1b_26w_4s": "res2net50d",
    "res2net101_v1b_26w_4s": "res2net101d",
    "resnet50_double3x3": "resnet50.tv_in1k",
    "resnet101_double3x3": "resnet101.tv_in1k",
    **{name: f"tf_efficientnet_{name[-2:]}.{'ra' if name[-2:] in ('b5', 'b7') else 'aa'}_in1k" for name in SCALES},
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window12_384.ms_in22k",
    "swin_large": "swin_large_patch4_window12_384.ms_in22k",
}
"""timm's names of our backbones, where they differ.

They choose the weights that the published models began with, not those of timm's own recipes."""


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
        return TIMM_NAMES.get(self.name, self.name)

    def build(
        self, levels: Collection[str] = STAGES
    ) -> ResNet | Res2Net | VGG | Swin | EfficientNet | TimmBackbone | ViTPyramid:
        """The module, with its first stages frozen. Weights of a file are loaded afterwards, by `load_weights`.

        Args:
            levels: features that the model uses. The pyramid of a plain ViT makes no others; all other backbones need
                every stage on the way to the last.

        Raises:
            ValueError: an unknown name, an option that the backbone does not have, freeze outside 0..5, or ImageNet
                weights that are not to be had.
        """
        if not 0 <= self.freeze <= len(STEM_AND_STAGES):
            raise ValueError(f"backbone.freeze: {self.freeze} is not within 0..5 ({', '.join(STEM_AND_STAGES)})")
        self._refuse_foreign_options()
        if self.name not in OPTIONS and patch_and_grid(self.name) is not None:
            vit = ViTPyramid(self.name, levels)
            if self.weights in imagenet.NAMES:
                load_weights(vit, imagenet.imagenet_weights(self.name, **vit_options(self.name)))
            vit.freeze_stages(self.freeze)
            return vit
        if self.name not in OPTIONS:
            pyramid = TimmBackbone(self.name, output_stride=self.output_stride)
            if self.weights in imagenet.NAMES:
                load_weights(pyramid, imagenet.imagenet_weights(self.name, features_only=True))
            pyramid.freeze_stages(self.freeze)
            return pyramid
        module = self._own()
        if self.weights in imagenet.NAMES and self.stride_in_1x1:
            raise ValueError(
                "backbone.weights imagenet: timm's bottlenecks stride in the 3x3: set backbone.stride_in_1x1 false "
                "(and the model's pixels to RGB with mean 123.675 116.28 103.53, deviation 58.395 57.12 57.375)"
            )
        if self.weights in imagenet.NAMES:  # its names are those of the published files
            load_weights(module, imagenet.imagenet_weights(self.timm_name))
        freeze(module, [name for stage in module.stage_names()[: self.freeze] for name in stage])
        if isinstance(module, Swin):
            module.fix_stages(self.freeze)
        return module

    def _own(self) -> ResNet | Res2Net | VGG | Swin | EfficientNet:
        """One of our own backbones, untrained."""
        if self.name in VGGS:
            return VGG(self.norm if self.name == "vgg16_bn" else None)
        if self.name in SWINS:
            return Swin(self.name, self.drop_path)
        if self.name in SCALES:
            return EfficientNet(self.name, self.norm)
        if self.name in RES2NETS:
            return Res2Net(
                self.name,
                self.norm,
                output_stride=self.output_stride,
                dilate_first=self.dilate_first,
                stride_in_1x1=self.stride_in_1x1,
            )
        return ResNet(
            self.name,
            self.norm,
            deeplab_stem=self.stem == "deeplab",
            output_stride=self.output_stride,
            dilate_first=self.dilate_first,
            multigrid=self.multigrid,
            stride_in_1x1=self.stride_in_1x1,
            deformable=self.deformable,
            deformable_stages=self.deformable_stages,
        )

    def _refuse_foreign_options(self) -> None:
        """Refuse options that differ from their default though the backbone does not have them.

        Raises:
            ValueError: names the option and the backbones that have it.
        """
        plain = self.name not in OPTIONS and patch_and_grid(self.name) is not None
        if plain and self.output_stride != 32:
            raise ValueError(
                f"backbone.output_stride: {self.output_stride}, but the levels that are made of a plain ViT's one map "
                f"({self.name}) have strides 4, 8, 16 and 32; set it to 32"
            )
        has = () if plain else OPTIONS.get(self.name, ("output_stride",))
        for option in fields(self):
            if option.name in ALWAYS or option.name in has or getattr(self, option.name) == option.default:
                continue
            others = ", ".join(name for name, options in OPTIONS.items() if option.name in options)
            raise ValueError(f"backbone.{option.name}: {self.name} does not have this option; {others} do")
