"""The module of a backbone from its options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from panoptic.backbones import imagenet
from panoptic.backbones.config import STAGES, STEM_AND_STAGES, Backbone
from panoptic.backbones.efficientnet import SCALES, EfficientNet
from panoptic.backbones.res2net import RES2NETS, Res2Net
from panoptic.backbones.resnet import DEPTHS, ResNet
from panoptic.backbones.swin import SWINS, Swin
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.vgg import VGG, VGGS
from panoptic.backbones.vit_pyramid import ViTPyramid, patch_and_grid, vit_options
from panoptic.backbones.weights import load_weights
from panoptic.layers.norm import freeze

Built = ResNet | Res2Net | VGG | Swin | EfficientNet | TimmBackbone | ViTPyramid
"""A backbone's module."""

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


def build(config: Backbone, levels: Collection[str] = STAGES) -> Built:
    """The module, with its first stages frozen. Weights of a file are loaded afterwards, by `load_weights`.

    Args:
        config: options of the backbone.
        levels: features that the model uses. The pyramid of a plain ViT makes no others, and models of timm have no
            stage beyond the last of them.

    Raises:
        ValueError: an unknown name, an option that the backbone does not have, freeze outside 0..5, or ImageNet
            weights that are not to be had.
    """
    if not 0 <= config.freeze <= len(STEM_AND_STAGES):
        raise ValueError(f"backbone.freeze: {config.freeze} is not within 0..5 ({', '.join(STEM_AND_STAGES)})")
    _refuse_foreign_options(config)
    if config.name not in OPTIONS and patch_and_grid(config.name) is not None:
        vit = ViTPyramid(config.name, levels)
        if config.weights in imagenet.NAMES:
            load_weights(vit, imagenet.imagenet_weights(config.name, **vit_options(config.name)))
        vit.freeze_stages(config.freeze)
        return vit
    if config.name not in OPTIONS:
        pyramid = TimmBackbone(config.name, config.output_stride, max(levels, key=STEM_AND_STAGES.index))
        if config.weights in imagenet.NAMES:
            load_weights(pyramid, imagenet.imagenet_weights(config.name, features_only=True))
        pyramid.freeze_stages(config.freeze)
        return pyramid
    module = _own(config)
    if config.weights in imagenet.NAMES and config.stride_in_1x1:
        raise ValueError(
            "backbone.weights imagenet: timm's bottlenecks stride in the 3x3: set backbone.stride_in_1x1 false "
            "(and the model's pixels to RGB with mean 123.675 116.28 103.53, deviation 58.395 57.12 57.375)"
        )
    if config.weights in imagenet.NAMES:  # its names are those of the published files
        load_weights(module, imagenet.imagenet_weights(config.timm_name))
    freeze(module, [name for stage in module.stage_names()[: config.freeze] for name in stage])
    if isinstance(module, Swin):
        module.fix_stages(config.freeze)
    return module


def _own(config: Backbone) -> ResNet | Res2Net | VGG | Swin | EfficientNet:
    """One of our own backbones, untrained."""
    if config.name in VGGS:
        return VGG(config.norm if config.name == "vgg16_bn" else None)
    if config.name in SWINS:
        return Swin(config.name, config.drop_path)
    if config.name in SCALES:
        return EfficientNet(config.name, config.norm)
    if config.name in RES2NETS:
        return Res2Net(
            config.name,
            config.norm,
            output_stride=config.output_stride,
            dilate_first=config.dilate_first,
            stride_in_1x1=config.stride_in_1x1,
        )
    return ResNet(
        config.name,
        config.norm,
        deeplab_stem=config.stem == "deeplab",
        output_stride=config.output_stride,
        dilate_first=config.dilate_first,
        multigrid=config.multigrid,
        stride_in_1x1=config.stride_in_1x1,
        deformable=config.deformable,
        deformable_stages=config.deformable_stages,
    )


def _refuse_foreign_options(config: Backbone) -> None:
    """Refuse options that differ from their default though the backbone does not have them.

    Raises:
        ValueError: names the option and the backbones that have it.
    """
    plain = config.name not in OPTIONS and patch_and_grid(config.name) is not None
    if plain and config.output_stride != 32:
        raise ValueError(
            f"backbone.output_stride: {config.output_stride}, but the levels that are made of a plain ViT's one map "
            f"({config.name}) have strides 4, 8, 16 and 32; set it to 32"
        )
    has = () if plain else OPTIONS.get(config.name, ("output_stride",))
    for option in fields(config):
        if option.name in ALWAYS or option.name in has or getattr(config, option.name) == option.default:
            continue
        others = ", ".join(name for name, options in OPTIONS.items() if option.name in options)
        raise ValueError(f"backbone.{option.name}: {config.name} does not have this option; {others} do")
