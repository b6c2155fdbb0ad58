"""The configuration of a backbone, read off the names and shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.build import OPTIONS
from panoptic.backbones.config import STAGES
from panoptic.backbones.res2net import RES2NETS
from panoptic.backbones.resnet import DEPTHS
from panoptic.backbones.swin import SWINS


def backbone_config(backbone: Mapping[str, Tensor]) -> Backbone:
    """Kind, depth, stem and deformable stages of a backbone under the published names (a ResNet's are torchvision's).

    Strides, dilations and stochastic depth leave no trace.

    Raises:
        ValueError: the blocks are those of no known backbone.
    """
    if "patch_embed.proj.weight" in backbone:
        return Backbone(name=_swin(backbone))
    if "features.0.weight" in backbone:
        return Backbone(name="vgg16_bn" if "features.1.running_mean" in backbone else "vgg16")
    counts = _counts(backbone, "layer{}.", 1)
    if "layer1.0.convs.0.weight" in backbone:
        deep = "conv1.0.weight" in backbone
        return Backbone(name=_name({n: (k.deep, k.blocks) for n, k in RES2NETS.items()}, (deep, counts)))
    shape = ("layer1.0.conv3.weight" in backbone, "layer1.0.conv2b.weight" in backbone, counts)
    name = _name({n: (d.bottleneck, d.double, d.blocks) for n, d in DEPTHS.items()}, shape)
    plain = Backbone(name=name, stem="deeplab" if "conv3.weight" in backbone else "conv7")
    return replace(plain, **_deformable(backbone))


def _swin(backbone: Mapping[str, Tensor]) -> str:
    """The name of a Swin."""
    table = backbone.get("layers.0.blocks.0.attn.relative_position_bias_table")
    window = 0 if table is None else (math.isqrt(len(table)) + 1) // 2
    shape = (len(backbone["patch_embed.proj.weight"]), _counts(backbone, "layers.{}.blocks.", 0), window)
    return _name({name: (size.width, size.blocks, size.window) for name, size in SWINS.items()}, shape)


def _counts(backbone: Mapping[str, Tensor], layer: str, first: int) -> tuple[int, ...]:
    """Blocks of the four stages, whose prefixes are `layer` with the numbers from `first` on."""
    return tuple(count_layers(backbone, layer.format(first + k)) for k in range(4))


def _name(known: Mapping[str, Any], shape: Any) -> str:
    """The name of the backbone of that shape.

    Raises:
        ValueError: there is none.
    """
    for name, other in known.items():
        if other == shape:
            return name
    raise ValueError(f"convert: a backbone of the shape {shape} is none of {', '.join(known)}")


def _deformable(backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of deformable stages, read off the layers that give their offsets."""
    offsets = {key: value for key, value in backbone.items() if key.endswith(".conv2_offset.weight")}
    if not offsets:
        return {}
    stages = tuple(stage for k, stage in enumerate(STAGES, 1) if any(key.startswith(f"layer{k}.") for key in offsets))
    return {"deformable": "v2" if len(next(iter(offsets.values()))) == 27 else "v1", "deformable_stages": stages}


def frozen_backbone(backbone: Backbone) -> Backbone:
    """The backbone as detectron2 trains it: fixed norms, stem and res2 frozen, the stride in the first 1x1.

    Among Res2Nets only the fork's v1b strides there.
    """
    published = {"norm": "frozen", "stride_in_1x1": backbone.name not in RES2NETS or "v1b" in backbone.name}
    has = OPTIONS.get(backbone.name, ())
    return replace(backbone, freeze=2, **{name: value for name, value in published.items() if name in has})


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def count_layers(weights: Mapping[str, object], prefix: str) -> int:
    """The number of layers below `prefix`, which ends in a dot."""
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})
