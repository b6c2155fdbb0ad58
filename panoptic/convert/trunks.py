"""What a ResNet's weights say of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.resnet import DEPTHS, STAGES


def trunk_config(trunk: Mapping[str, Tensor]) -> Backbone:
    """Depth, stem and deformable stages of a ResNet with torchvision's names; strides and dilations leave no trace.

    Raises:
        ValueError: the blocks are those of no known ResNet.
    """
    counts = tuple(len({k.split(".")[1] for k in trunk if k.startswith(f"layer{layer}.")}) for layer in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in trunk
    for name, depth in DEPTHS.items():
        if (depth.bottleneck, depth.blocks) == (bottleneck, counts):
            plain = Backbone(name=name, stem="deeplab" if "conv3.weight" in trunk else "conv7")
            return replace(plain, **_deformable(trunk))
    raise ValueError(f"convert: a backbone of {list(counts)} residual blocks is none of {', '.join(DEPTHS)}")


def _deformable(trunk: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of deformable stages, read off the layers that give their offsets."""
    offsets = {key: value for key, value in trunk.items() if key.endswith(".conv2_offset.weight")}
    if not offsets:
        return {}
    stages = tuple(stage for k, stage in enumerate(STAGES, 1) if any(key.startswith(f"layer{k}.") for key in offsets))
    return {"deformable": "v2" if len(next(iter(offsets.values()))) == 27 else "v1", "deformable_stages": stages}


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
