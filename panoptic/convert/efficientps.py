"""Keys and configuration of the authors' EfficientPS (DeepSceneSeg/EfficientPS, a fork of mmdetection 1).

Sizes are read off the weights; options that the weights do not tell are Cityscapes' published ones. The heads' class 0
is the background there: it becomes the last class of the box head, and its box code and its mask, which nothing trains,
are left out. Classes of the semantic head and of the things are in the order of the categories, stuff before things in
Cityscapes' list of 19.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.efficientnet import SCALES, EfficientNet
from panoptic.convert.backbones import count_layers, part
from panoptic.convert.family import Family, Rules, State, our_name, same_classes, weight
from panoptic.models.efficientps.config import DETECTOR, EfficientPSConfig
from panoptic.segmentation import Categories

NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

LEVELS = ("p2", "p3", "p4", "p5")
"""Levels of the pyramid, fine to coarse; the published code counts them so, but for the bottom-up branch."""


def _conv(prefix: str, leaf: str) -> str:
    """Our name of the end of a block's key: `conv.weight`, `bn.weight`."""
    return f"{prefix}.{leaf.replace('bn.', 'norm.')}"


def _separable(prefix: str, match: re.Match[str]) -> str:
    return _conv(f"{prefix}.{match['half']}", match["leaf"])


BLOCK = rf"(?P<leaf>conv\.weight|bn\.{NORM})"
SEPARABLE = rf"(?P<half>depthwise|pointwise)_conv\.{BLOCK}"

RULES: Rules = (
    (r"backbone\.(?!classifier|blocks\.\d+\.\d+\.se\.)(.+)", lambda m: f"backbone.{m[1]}"),
    (rf"neck\.lateral_convs_top\.(?P<k>[0-3])\.{BLOCK}", lambda m: _conv(f"pyramid.down.{_level(m)}", m["leaf"])),
    (
        rf"neck\.lateral_convs_bottom\.(?P<k>[0-3])\.{BLOCK}",  # stored from coarse to fine
        lambda m: _conv(f"pyramid.up.{LEVELS[3 - int(m['k'])]}", m["leaf"]),
    ),
    (rf"neck\.fpn_convs\.(?P<k>[0-3])\.{BLOCK}", lambda m: _conv(f"pyramid.output.{_level(m)}", m["leaf"])),
    (
        rf"neck\.fpn_convs\.(?P<k>[0-3])\.{SEPARABLE}",
        lambda m: _separable(f"pyramid.output.{_level(m)}", m),
    ),
    (
        rf"semantic_head\.lateral_convs_ss\.(?P<k>[01])\.convs\.(?P<n>\d)\.{SEPARABLE}",
        lambda m: _separable(f"semantic.small_scale.{('p5', 'p4')[int(m['k'])]}.convs.{m['n']}", m),
    ),
    (
        rf"semantic_head\.lateral_convs_ss\.(?P<k>[01])\.conv\.{BLOCK}",
        lambda m: _conv(f"semantic.small_scale.{('p5', 'p4')[int(m['k'])]}.join", m["leaf"]),
    ),
    (
        rf"semantic_head\.lateral_convs_ls\.(?P<k>[01])\.convs\.(?P<n>[01])\.{SEPARABLE}",
        lambda m: _separable(f"semantic.large_scale.{('p3', 'p2')[int(m['k'])]}.{m['n']}", m),
    ),
    (
        rf"semantic_head\.aligning_convs\.(?P<k>[01])\.convs\.(?P<n>[01])\.{SEPARABLE}",
        lambda m: _separable(f"semantic.corrections.{('p4', 'p3')[int(m['k'])]}.{m['n']}", m),
    ),
    (r"semantic_head\.conv_logits\.(weight|bias)", lambda m: f"semantic.classifier.{m[1]}"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", lambda m: f"detector.regions.conv.{m[1]}"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", lambda m: f"detector.regions.objectness.{m[1]}"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", lambda m: f"detector.regions.deltas.{m[1]}"),
    (r"bbox_head\.shared_fcs\.([01])\.(weight|bias)", lambda m: f"detector.boxes.fc{int(m[1]) + 1}.{m[2]}"),
    (r"bbox_head\.fc_cls\.(weight|bias)", lambda m: f"detector.boxes.classes.{m[1]}"),
    (r"bbox_head\.fc_reg\.(weight|bias)", lambda m: f"detector.boxes.deltas.{m[1]}"),
    (rf"mask_head\.convs\.(?P<n>\d)\.{SEPARABLE}", lambda m: _separable(f"detector.masks.convs.{m['n']}", m)),
    (r"mask_head\.upsample\.(weight|bias)", lambda m: f"detector.masks.deconv.{m[1]}"),
    (r"mask_head\.conv_logits\.(weight|bias)", lambda m: f"detector.masks.predictor.{m[1]}"),
)
"""The published names and ours."""


def _level(match: re.Match[str]) -> str:
    return LEVELS[int(match["k"])]


def _translate(state: State) -> State:
    """The state with the background as the last class of the box head, and as no class of boxes and masks."""
    changed = dict(state)
    for leaf in ("weight", "bias"):
        for key, dropped in (("bbox_head.fc_reg", 4), ("mask_head.conv_logits", 1)):
            if (name := f"{key}.{leaf}") in changed:
                changed[name] = torch.as_tensor(changed[name])[dropped:]
        if (name := f"bbox_head.fc_cls.{leaf}") in changed:
            changed[name] = torch.as_tensor(changed[name]).roll(-1, 0)
    return changed


def _rename(state: Mapping[str, object]) -> dict[str, str | None]:
    return {key: our_name(RULES, key) for key in state}


def _build(weights: State, categories: Categories) -> tuple[EfficientPSConfig, State]:
    same_classes(len(weight(weights, "semantic.classifier.weight")), categories)
    things = len(weight(weights, "detector.boxes.classes.weight")) - 1
    if things != len(categories.things):
        raise ValueError(
            f"categories: the checkpoint's box head has {things} thing classes, the list has "
            f"{len(categories.things)}; give the categories of the published model in its order"
        )
    box = weight(weights, "detector.boxes.fc1.weight")
    width = weight(weights, "detector.regions.conv.weight").shape[0]
    heads = replace(
        DETECTOR.heads,
        box_side=round((box.shape[1] / width) ** 0.5),
        box_width=box.shape[0],
        mask_width=weight(weights, "detector.masks.predictor.weight").shape[1],
        mask_layers=count_layers(weights, "detector.masks.convs."),
    )
    config = EfficientPSConfig(
        backbone=_backbone(part(weights, "backbone.")),
        width=width,
        separable_pyramid=any(key.startswith("pyramid.output.p2.depthwise.") for key in weights),
        semantic_width=weight(weights, "semantic.classifier.weight").shape[1] // 4,
        detector=replace(DETECTOR, heads=heads),
    )
    return config, weights


def _backbone(weights: Mapping[str, Tensor]) -> Backbone:
    """The EfficientNet that has weights of these shapes."""
    shapes = {key: value.shape for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    for name in SCALES:
        with torch.device("meta"):
            own = EfficientNet(name).state_dict()
        if shapes == {key: value.shape for key, value in own.items() if not key.endswith("num_batches_tracked")}:
            return Backbone(name=name, norm="absolute")
    raise ValueError(f"convert: the backbone is none of {', '.join(SCALES)}; is the checkpoint complete?")


ORIGINAL = Family(
    recognise=lambda state: any(key.startswith("semantic_head.lateral_convs_ss.") for key in state),
    rename=_rename,
    build=_build,
    translate=_translate,
)
"""DeepSceneSeg/EfficientPS: Cityscapes and KITTI."""
