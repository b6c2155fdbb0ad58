"""Keys and configurations of the two published Panoptic-DeepLabs. Options that the weights do not tell:

- `panoptic-deeplab`: output stride 32 with rates 3 6 9 where the decoder uses res4, else 16 with 6 12 18;
  with 133 classes (COCO) plain cross-entropy, else the hardest 20 %; instances scored by class probability.
- `detectron2`: output stride 16, multigrid 1 2 4, rates 6 12 18. With 133 classes COCO's values (crop
  640x640, which is also the divisor, sigma 8, all pixels in the loss, NMS window 41, stuff area 4096), else
  those of Cityscapes (crop 512x1024, sigma 10, hardest 20 %, window 7, stuff area 2048). Offsets are not
  rescaled with the output, as published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from panoptic.backbones.weights import backbone_key
from panoptic.convert.backbones import backbone_config, part
from panoptic.convert.family import COCO_CLASSES, Family, Rules, our_name, same_classes, weight
from panoptic.models.panoptic_deeplab.config import PanopticDeepLabConfig
from panoptic.segmentation import Categories


def _standalone_keys(state: Mapping[str, object]) -> dict[str, str | None]:
    return {key: _standalone_key(key) for key in state}


def _detectron2_keys(state: Mapping[str, object]) -> dict[str, str | None]:
    low = {m[1] for key in state if (m := re.match(r"sem_seg_head\.decoder\.(res[234])\.", key))}
    return {key: _detectron2_key(key, sorted(low, reverse=True)) for key in state}


def _standalone_key(key: str) -> str | None:
    """Our name of a key of bowenc0221/panoptic-deeplab, None if it has no such key."""
    layer = {"0": "conv", "1": "norm"}
    if key.startswith("backbone."):
        return key
    if match := re.fullmatch(r"decoder\.(semantic|instance)_decoder\.(.+)", key):
        branch, rest = match.groups()
        rules: Rules = (
            (r"aspp\.convs\.4\.aspp_pooling\.1\.(weight)", lambda m: f"{branch}_aspp.pool.conv.{m[1]}"),
            (r"aspp\.convs\.([0-3])\.([01])\.(\w+)", lambda m: f"{branch}_aspp.branches.{m[1]}.{layer[m[2]]}.{m[3]}"),
            (r"aspp\.project\.([01])\.(\w+)", lambda m: f"{branch}_aspp.project.{layer[m[1]]}.{m[2]}"),
            (r"project\.(\d)\.([01])\.(\w+)", lambda m: f"{branch}_decoder.projections.{m[1]}.{layer[m[2]]}.{m[3]}"),
            (r"fuse\.(\d)\.0\.(.+)", lambda m: _separable_key(f"{branch}_decoder.fuse.{m[1]}", m[2])),
        )
        return our_name(rules, rest)
    if match := re.fullmatch(r"decoder\.\w+_head\.classifier\.(semantic|center|offset)\.(.+)", key):
        head = f"{match[1].replace('center', 'centre')}_head"
        if predictor := re.fullmatch(r"1\.(weight|bias)", match[2]):
            return f"{head}.predictor.{predictor[1]}"
        if block := re.fullmatch(r"0\.0\.(.+)", match[2]):
            return _separable_key(f"{head}.block", block[1])
    return None


def _separable_key(prefix: str, rest: str) -> str | None:
    """`0.0.x`, `0.1.x`: depthwise convolution and norm; `1.x`, `2.x`: pointwise."""
    if match := re.fullmatch(r"0\.([01])\.(\w+)", rest):
        return f"{prefix}.depthwise.{('conv', 'norm')[int(match[1])]}.{match[2]}"
    if match := re.fullmatch(r"([12])\.(\w+)", rest):
        return f"{prefix}.pointwise.{('conv', 'norm')[int(match[1]) - 1]}.{match[2]}"
    return None


def _detectron2_key(key: str, low: list[str]) -> str | None:
    """Our name of a key of detectron2's Panoptic-DeepLab, None if it has no such key."""
    if key.startswith("backbone."):
        return f"backbone.{backbone_key(key.removeprefix('backbone.'))}"
    match = re.fullmatch(r"(sem_seg_head|ins_embed_head)\.(.+)", key)
    if match is None:
        return None
    branch = "semantic" if match[1] == "sem_seg_head" else "instance"
    rest = match[2]
    if predictor := re.fullmatch(r"(?:(center|offset)_)?predictor\.(weight|bias)", rest):
        return f"{_head(predictor[1])}.predictor.{predictor[2]}"
    if head := re.fullmatch(r"(?:(center|offset)_)?head\.(.+)", rest):
        return _layer_key(f"{_head(head[1])}.block", head[2])
    if aspp := re.fullmatch(r"decoder\.res5\.project_conv\.(.+)", rest):
        if pool := re.fullmatch(r"convs\.4\.1\.(weight|bias)", aspp[1]):
            return f"{branch}_aspp.pool.conv.{pool[1]}"
        if dilated := re.fullmatch(r"convs\.([0-3])\.(.+)", aspp[1]):
            return _layer_key(f"{branch}_aspp.branches.{dilated[1]}", dilated[2])
        return _layer_key(f"{branch}_aspp", aspp[1]) if aspp[1].startswith("project.") else None
    if (level := re.fullmatch(r"decoder\.(res[234])\.(project|fuse)_conv\.(.+)", rest)) and level[1] in low:
        part = {"project": "projections", "fuse": "fuse"}[level[2]]
        return _layer_key(f"{branch}_decoder.{part}.{low.index(level[1])}", level[3])
    return None


def _head(name: str | None) -> str:
    return {None: "semantic_head", "center": "centre_head", "offset": "offset_head"}[name]


def _layer_key(prefix: str, rest: str) -> str | None:
    """detectron2's convolution holds its norm: `x.weight` is ours `x.conv.weight`, `x.norm.bias` the same."""
    match = re.fullmatch(r"((?:(?:depthwise|pointwise|project|[01])\.)?)(weight|norm\.\w+)", rest)
    if match is None:
        return None
    leaf = match[2] if match[2].startswith("norm.") else f"conv.{match[2]}"
    return f"{prefix}.{match[1]}{leaf}"


def _standalone(weights: Mapping[str, Tensor]) -> PanopticDeepLabConfig:
    """The configuration of bowenc0221/panoptic-deeplab."""
    sizes = _sizes(weights)
    coarse = len(sizes["low_level"]) == 3
    coco = len(weight(weights, "semantic_head.predictor.weight")) == COCO_CLASSES
    return PanopticDeepLabConfig(
        flavour="standalone",
        backbone=replace(backbone_config(part(weights, "backbone.")), output_stride=32 if coarse else 16),
        norm_momentum=0.01,
        rates=(3, 6, 9) if coarse else (6, 12, 18),
        dropout=0.5,
        semantic_loss="cross_entropy" if coco else "top_k",
        instance_score="semantic",
        **sizes,
    )


def _detectron2(weights: Mapping[str, Tensor]) -> PanopticDeepLabConfig:
    """The configuration of detectron2's project."""
    coco = len(weight(weights, "semantic_head.predictor.weight")) == COCO_CLASSES
    backbone = backbone_config(part(weights, "backbone."))
    return PanopticDeepLabConfig(
        flavour="detectron2",
        backbone=replace(backbone, output_stride=16, dilate_first=True, multigrid=(1, 2, 4)),
        divisor=640 if coco else 1,
        rates=(6, 12, 18),
        image_pool=(640, 640) if coco else (512, 1024),
        dropout=0.1,
        top_k_fraction=1.0 if coco else 0.2,
        sigma=8 if coco else 10,
        nms_kernel=41 if coco else 7,
        stuff_area=4096 if coco else 2048,
        rescale_offset=False,
        **_sizes(weights),
    )


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that shapes and keys determine in both flavours."""
    levels = len({key.split(".")[2] for key in weights if key.startswith("semantic_decoder.projections.")})
    stages = {"res4": 3, "res3": 2, "res2": 1}
    widths = {name: _stage_width(part(weights, "backbone."), layer) for name, layer in stages.items()}
    inputs = [weight(weights, f"semantic_decoder.projections.{i}.conv.weight").shape[1] for i in range(levels)]
    separable = "semantic_head.block.pointwise.conv.weight" in weights
    last = "pointwise" if separable else "1"
    centre_separable = "centre_head.block.pointwise.conv.weight" in weights
    decoder = [weight(weights, f"{b}_decoder.fuse.0.{last}.conv.weight").shape[0] for b in ("semantic", "instance")]
    return {
        "low_level": tuple(name for width in inputs for name, other in widths.items() if other == width),
        "semantic_projections": _projections(weights, "semantic", levels),
        "instance_projections": _projections(weights, "instance", levels),
        "aspp_channels": weight(weights, "semantic_aspp.project.conv.weight").shape[0],
        "separable": separable,
        "aspp_separable": "semantic_aspp.branches.1.pointwise.conv.weight" in weights,
        "centre_separable": centre_separable,
        "semantic_channels": decoder[0],
        "instance_channels": decoder[1],
        "semantic_head_channels": weight(weights, "semantic_head.predictor.weight").shape[1],
        "instance_head_channels": weight(weights, "offset_head.predictor.weight").shape[1],
    }


def _projections(weights: Mapping[str, Tensor], branch: str, levels: int) -> tuple[int, ...]:
    """The output channels of a branch's projections of low-level features."""
    return tuple(weight(weights, f"{branch}_decoder.projections.{i}.conv.weight").shape[0] for i in range(levels))


def _stage_width(backbone: Mapping[str, Tensor], layer: int) -> int:
    """The output channels of a ResNet's stage."""
    last = "conv3" if "layer1.0.conv3.weight" in backbone else "conv2"
    return weight(backbone, f"layer{layer}.0.{last}.weight").shape[0]


def _build(
    weights: Mapping[str, Tensor],
    categories: Categories,
    config: Callable[[Mapping[str, Tensor]], PanopticDeepLabConfig],
) -> tuple[PanopticDeepLabConfig, Mapping[str, Tensor]]:
    same_classes(len(weight(weights, "semantic_head.predictor.weight")), categories)
    return config(weights), weights


STANDALONE = Family(
    recognise=lambda state: True,
    rename=_standalone_keys,
    build=lambda weights, categories: _build(weights, categories, _standalone),
)
"""bowenc0221/panoptic-deeplab."""

DETECTRON2 = Family(
    recognise=lambda state: any(key.startswith("ins_embed_head.") for key in state),
    rename=_detectron2_keys,
    build=lambda weights, categories: _build(weights, categories, _detectron2),
)
"""detectron2's project."""
