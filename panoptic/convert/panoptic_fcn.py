"""Keys and configuration of dvlab-research/PanopticFCN, plain and starred, and of its fork for Cityscapes.

Depth, deformable convolutions, coordinates, widths and the number of convolutions are read off keys and shapes, and
the region classes off their number. Options that the weights do not tell are the published ones: blue, green, red
with the mean of red, green, blue and scale 1, the stride of a bottleneck in its first 1x1, fixed batch norms, a frozen
stem and res2, thresholds for COCO as `PanopticFCNConfig` has them. A head for every class is the fork's for Cityscapes,
with its scales and thresholds. The "FAST" variants differ in thresholds only: thing_threshold 0.2, region_threshold
0.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from panoptic.backbones.weights import backbone_key
from panoptic.convert.backbones import backbone_config, count_layers, frozen_backbone, part
from panoptic.convert.family import Family, State, weight
from panoptic.models.panoptic_fcn.config import PanopticFCNConfig, Regions
from panoptic.segmentation import Categories

LAYERS = {
    "position_head.out_inst": "thing_head",
    "position_head.out_sem": "region_head",
    "kernel_head.out_conv": "kernel_head",
    "thing_generator.embed_extractor": "thing_embed",
    "stuff_generator.embed_extractor": "stuff_embed",
    "backbone.top_block.p6": "pyramid.strided.p6",
    "backbone.top_block.p7": "pyramid.strided.p7",
}
"""Layers that have another name here and nothing else."""

CONV_STACKS = {"position_head.position_head": "position_tower", "kernel_head.kernel_head": "kernel_tower"} | {
    "feature_encoder.encode_head": "encoder"
}

CITYSCAPES: dict[str, Any] = {
    "scales": ((1, 128), (64, 256), (128, 512), (256, 1024), (512, 2048)),
    "most_things": 150,
    "mask_weight": 4.0,
    "thing_threshold": 0.01,
    "region_threshold": 0.1,
    "most_kernels": 200,
    "mask_threshold": 0.5,
    "fusion_threshold": 0.97,
    "stuff_area": 2048,
}
"""The fork's configuration, where it is not COCO's."""


def _rename(state: Mapping[str, object]) -> dict[str, str | None]:
    """Our name of each of the reference's.

    The reference has no plain convolution in a layer that holds a deformable one, so such names are not known.
    """
    deformable = {key.rpartition(".offset_mask_conv.")[0] for key in state if ".offset_mask_conv." in key}
    names = {key: _key(key) for key in state}
    for key in state:
        if any(re.fullmatch(rf"{re.escape(layer)}\.(weight|bias|norm\..*)", key) for layer in deformable):
            names[key] = None
    return names


def _key(key: str) -> str | None:
    """Our name of one of the reference's, None if it has no such key."""
    if key.startswith("backbone.bottom_up."):
        return f"backbone.{backbone_key(key.removeprefix('backbone.bottom_up.'))}"
    layer, _, leaf = key.rpartition(".")
    if layer in LAYERS:
        return f"{LAYERS[layer]}.{leaf}" if leaf in ("weight", "bias") else None
    if match := re.fullmatch(r"backbone\.fpn_(lateral|output)([2-5])\.(weight|bias)", key):
        return f"pyramid.{match[1]}.p{match[2]}.{match[3]}"
    if match := re.fullmatch(r"semantic_fpn\.(p[2-5])\.([024])\.(weight|norm\.weight|norm\.bias)", key):
        leaf = match[3] if match[3].startswith("norm.") else f"conv.{match[3]}"
        return f"semantic.branches.{match[1]}.{int(match[2]) // 2}.{leaf}"
    if match := re.fullmatch(r"(\w+\.(\w+))\.\2_head_([1-9])\.(.+)", key):
        tower, conv = CONV_STACKS.get(match[1]), int(match[3]) - 1
        leaf = re.fullmatch(r"(offset_mask_conv|dcnv2\.norm|norm|dcnv2)?\.?(weight|bias)", match[4])
        names = {"offset_mask_conv": "offset", "dcnv2.norm": "norm", "norm": "norm", "dcnv2": "conv", None: "conv"}
        return f"{tower}.convs.{conv}.{names[leaf[1]]}.{leaf[2]}" if tower and leaf else None
    return None


def _build(weights: State, categories: Categories) -> tuple[PanopticFCNConfig, State]:
    things = len(weight(weights, "thing_head.weight"))
    if things != len(categories.things):
        raise ValueError(
            f"categories: the checkpoint has {things} thing classes, the list has {len(categories.things)}; give the "
            "categories of the published model in its order (to train on others, fine-tune from the result)"
        )
    regions = _regions(len(weight(weights, "region_head.weight")), categories)
    pyramid = weight(weights, "pyramid.output.p3.weight").shape[0]
    semantic = weights.get("semantic.branches.p2.0.conv.weight")
    entering = pyramid if semantic is None else semantic.shape[0]
    head_convs = count_layers(weights, "position_tower.convs.")
    if count_layers(weights, "kernel_tower.convs.") != head_convs:
        raise ValueError("convert: position head and kernel head differ in their number of convolutions")
    backbone = backbone_config(part(weights, "backbone."))
    config = PanopticFCNConfig(
        backbone=frozen_backbone(backbone),
        width=pyramid,
        feature="p2" if semantic is None else "semantic_fpn",
        feature_channels=PanopticFCNConfig.feature_channels if semantic is None else entering,
        head_convs=head_convs,
        head_channels=weight(weights, "kernel_head.weight").shape[0],
        position_deform=_deform(weights, "position_tower."),
        position_coordinates=_entering(weights, "position_tower.") > pyramid,
        kernel_deform=_deform(weights, "kernel_tower."),
        kernel_coordinates=_entering(weights, "kernel_tower.") > pyramid,
        encoder_convs=count_layers(weights, "encoder.convs."),
        encoder_channels=weight(weights, "thing_embed.weight").shape[0],
        encoder_deform=_deform(weights, "encoder."),
        encoder_coordinates=_entering(weights, "encoder.") > entering,
        encoder_norm="encoder.convs.0.norm.weight" in weights,
        regions=regions,
        **(CITYSCAPES if regions == "all" else {}),
    )
    return config, weights


def _regions(count: int, categories: Categories) -> Regions:
    """The kind of region classes of which there are `count`.

    Raises:
        ValueError: there is none.
    """
    sizes: dict[int, Regions] = {
        len(categories): "all",
        len(categories.stuff): "stuff",
        len(categories.stuff) + 1: "with_things",
    }
    if count not in sizes:
        raise ValueError(
            f"categories: the checkpoint's region head has {count} classes; the list has {len(categories.stuff)} of "
            f"stuff and {len(categories)} in all; give the categories of the published model in its order"
        )
    return sizes[count]


def _deform(weights: State, prefix: str) -> bool:
    """The convolutions of a stack are deformable."""
    return f"{prefix}convs.0.offset.weight" in weights


def _entering(weights: State, prefix: str) -> int:
    """The input channels of a stack."""
    return weight(weights, f"{prefix}convs.0.conv.weight").shape[1]


PANOPTICFCN = Family(
    recognise=lambda state: any(key.startswith("thing_generator.") for key in state),
    rename=_rename,
    build=_build,
)
"""dvlab-research/PanopticFCN; its fork for Cityscapes has the same keys."""
