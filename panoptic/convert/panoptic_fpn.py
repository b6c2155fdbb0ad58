"""Keys and configuration of detectron2's Panoptic FPN. Options that the weights do not tell are COCO's published ones:

blue, green, red with Caffe2's mean and scale 1, the stride of a bottleneck in its first 1x1, fixed batch norms, a
frozen stem and res2, anchors, thresholds and merge rule as `PanopticFPNConfig` has them. Sizes of all layers are read
off the weights. Res2Net's fork is recognised and takes red, green, blue with ImageNet's mean and deviation; for weights
that began as torchvision's, `dataclasses.replace` their order, mean and stride.

Buffers that hold no weights (anchors, pixel mean and deviation of older files) are left out. Norms without
statistics, as files of Caffe2 origin have them, get mean 0 and variance 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from panoptic.backbones.res2net import RES2NETS
from panoptic.backbones.weights import backbone_key
from panoptic.convert.backbones import backbone_config, count_layers, frozen_backbone, part
from panoptic.convert.family import Family, State, weight
from panoptic.models.panoptic_fpn.config import PanopticFPNConfig
from panoptic.rcnn.config import DetectorConfig, Heads
from panoptic.segmentation import Categories

HEADS = {
    "proposal_generator.rpn_head.conv": "detector.regions.conv",
    "proposal_generator.rpn_head.objectness_logits": "detector.regions.objectness",
    "proposal_generator.rpn_head.anchor_deltas": "detector.regions.deltas",
    "roi_heads.box_head.fc1": "detector.boxes.fc1",
    "roi_heads.box_head.fc2": "detector.boxes.fc2",
    "roi_heads.box_predictor.cls_score": "detector.boxes.classes",
    "roi_heads.box_predictor.bbox_pred": "detector.boxes.deltas",
    "roi_heads.mask_head.deconv": "detector.masks.deconv",
    "roi_heads.mask_head.predictor": "detector.masks.predictor",
    "sem_seg_head.predictor": "classifier",
}
"""Layers that have another name here and nothing else."""

RGB = {"bgr": False, "pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
"""The pixels of Res2Net's fork."""

CONSTANTS = re.compile(r"pixel_(mean|std)|proposal_generator\.anchor_generator\.cell_anchors\.\d+")
"""Buffers that older files hold and no weight depends on."""


def _translate(state: State) -> State:
    """The state without constants, and with the statistics that Caffe2's norms leave out."""
    kept = {key: value for key, value in state.items() if not CONSTANTS.fullmatch(key)}
    if any(key.endswith((".running_mean", ".running_var")) for key in kept):
        return kept
    for key, value in list(kept.items()):
        if key.startswith("backbone.bottom_up.") and key.endswith(".norm.weight"):
            stem, shape = key.removesuffix("weight"), torch.as_tensor(value).shape
            kept[f"{stem}running_mean"], kept[f"{stem}running_var"] = torch.zeros(shape), torch.ones(shape)
    return kept


def _rename(state: Mapping[str, object]) -> dict[str, str | None]:
    return {key: _key(key) for key in state}


def _key(key: str) -> str | None:
    """Our name of one of detectron2's, None if it has no such key."""
    if key.startswith("backbone.bottom_up."):
        return f"backbone.{backbone_key(key.removeprefix('backbone.bottom_up.'))}"
    layer, _, leaf = key.rpartition(".")
    if layer in HEADS:
        return f"{HEADS[layer]}.{leaf}" if leaf in ("weight", "bias") else None
    if match := re.fullmatch(r"backbone\.fpn_(lateral|output)([2-5])\.(weight|bias)", key):
        return f"pyramid.{match[1]}.p{match[2]}.{match[3]}"
    if match := re.fullmatch(r"roi_heads\.mask_head\.mask_fcn([1-9])\.(weight|bias)", key):
        return f"detector.masks.convs.{int(match[1]) - 1}.{match[2]}"
    if match := re.fullmatch(r"sem_seg_head\.(p[2-5])\.([024])\.(weight|norm\.weight|norm\.bias)", key):
        leaf = match[3] if match[3].startswith("norm.") else f"conv.{match[3]}"
        return f"semantic.branches.{match[1]}.{int(match[2]) // 2}.{leaf}"
    return None


def _build(weights: State, categories: Categories) -> tuple[PanopticFPNConfig, State]:
    things, stuff = (len(weight(weights, f"{head}.weight")) - 1 for head in ("detector.boxes.classes", "classifier"))
    _same_kinds(things, stuff, categories)
    width = weight(weights, "detector.regions.conv.weight").shape[0]
    box = weight(weights, "detector.boxes.fc1.weight")
    heads = Heads(
        box_side=round((box.shape[1] / width) ** 0.5),
        box_width=box.shape[0],
        mask_width=weight(weights, "detector.masks.predictor.weight").shape[1],
        mask_layers=count_layers(weights, "detector.masks.convs."),
    )
    backbone = backbone_config(part(weights, "backbone."))
    config = PanopticFPNConfig(
        backbone=frozen_backbone(backbone),
        **(RGB if backbone.name in RES2NETS else {}),
        width=width,
        semantic_width=weight(weights, "classifier.weight").shape[1],
        detector=DetectorConfig(heads=heads),
    )
    return config, weights


def _same_kinds(things: int, stuff: int, categories: Categories) -> None:
    """Compare the classes of the heads with the categories.

    Raises:
        ValueError: they differ.
    """
    if (things, stuff) != (len(categories.things), len(categories.stuff)):
        raise ValueError(
            f"categories: the checkpoint's heads have {things} thing and {stuff} stuff classes, the list has "
            f"{len(categories.things)} and {len(categories.stuff)}; give the categories of the published model in its "
            "order (to train on others, fine-tune from the result)"
        )


DETECTRON2 = Family(
    recognise=lambda state: any(key.startswith("proposal_generator.") for key in state),
    rename=_rename,
    build=_build,
    translate=_translate,
)
"""detectron2's model zoo, R50 and R101."""
