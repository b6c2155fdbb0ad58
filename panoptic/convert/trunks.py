"""What a ResNet's weights say of its configuration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.resnet import DEPTHS


def trunk_config(trunk: Mapping[str, Tensor]) -> Backbone:
    """Depth and stem of a ResNet with torchvision's names; strides and dilations leave no trace in weights.

    Raises:
        ValueError: the blocks are those of no known ResNet.
    """
    counts = tuple(len({k.split(".")[1] for k in trunk if k.startswith(f"layer{layer}.")}) for layer in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in trunk
    for name, depth in DEPTHS.items():
        if (depth.bottleneck, depth.blocks) == (bottleneck, counts):
            return Backbone(name=name, stem="deeplab" if "conv3.weight" in trunk else "conv7")
    raise ValueError(f"convert: a backbone of {list(counts)} residual blocks is none of {', '.join(DEPTHS)}")


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
