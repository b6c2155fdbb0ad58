"""The description in an exported file: classes, view, and the rules by which `panoptic.runtime` merges the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from panoptic.models.base import PanopticModel
from panoptic.models.detr.model import DETR
from panoptic.models.efficientps.model import EfficientPS
from panoptic.models.eomt.model import EoMT
from panoptic.models.jsis_net.model import JSISNet
from panoptic.models.mask_transformer.model import MaskTransformer
from panoptic.models.panoptic_deeplab.model import PanopticDeepLab
from panoptic.models.panoptic_fcn.model import PanopticFCN
from panoptic.models.panoptic_fcn.targets import LEVELS
from panoptic.models.panoptic_fpn.model import PanopticFPN
from panoptic.rcnn.config import COARSEST
from panoptic.rcnn.mask_rcnn import Detector
from panoptic.rcnn.rpn import Regions, cells_of
from panoptic.runtime.runner import FORMAT
from panoptic.training.plain import to_plain
from panoptic.transforms import Resize


def describe(model: PanopticModel, resize: Resize, graphs: Sequence[str], batch: bool) -> dict[str, Any]:
    """The description of an exported model, of plain values.

    Args:
        model: any of ours.
        resize: of a photograph before the network.
        graphs: names of all graphs, the network first.
        batch: the network takes any number of images; else one.
    """
    config = to_plain(model.config)
    return {
        "format": FORMAT,
        "architecture": type(model).__name__,
        "graphs": list(graphs),
        "batch": "any" if batch else 1,
        "categories": model.categories.to_coco(),
        "resize": asdict(resize),
        "divisor": model.divisor,
        "pixels": {"mean": config["pixel_mean"], "std": config["pixel_std"], "bgr": config.get("bgr", False)},
        "merge": rules(model),
        "config": config,
    }


def rules(model: PanopticModel) -> dict[str, Any]:
    """The rule of the merge, by its name in `panoptic.runtime.runner.MERGES`, and its options.

    Raises:
        ValueError: the architecture has no rules outside of torch.
    """
    config = model.config
    if isinstance(model, MaskTransformer):
        step = config.patch if isinstance(model, EoMT) else 1
        return {"rule": "queries", "step": step, **_picked(config, "threshold", "overlap", "inside")}
    if isinstance(model, PanopticDeepLab):
        return {
            "rule": "centres",
            "standalone": model.standalone,
            "stride": model.stride,
            "kernel": config.nms_kernel,
            **_picked(config, "threshold", "top_k", "stuff_area", "rescale_offset"),
        }
    if isinstance(model, DETR):
        classes = model.classes.to_classes(torch.arange(model.classes.logits + 1)).tolist()[:-1]
        masks = model.mask_head is not None
        return {"rule": "detr", "classes": classes, "masks": masks, **_picked(config, "threshold", "min_area")}
    if isinstance(model, PanopticFCN):
        return {
            "rule": "kernels",
            "levels": list(LEVELS),
            "region_classes": list(model.regions),
            "own_cells": config.stuff_kernel == "region",
            "centres": config.stuff_positions == "centres",
            **_picked(config, "pool", "thing_threshold", "region_threshold", "most_kernels", "fusion_threshold"),
            **_picked(config, "class_aware", "mask_threshold", "lowest_score", "merged_score", "most_overlap"),
            **_picked(config, "stuff_area", "merge"),
        }
    if isinstance(model, PanopticFPN):
        own = _picked(config, "confidence", "overlap", "stuff_area")
        return {"rule": "fpn", "step": COARSEST, **_detector(model.detector), **own}
    if isinstance(model, EfficientPS):
        return {"rule": "efficientps", "step": COARSEST, **_detector(model.detector), **asdict(config.fusion)}
    if isinstance(model, JSISNet):
        detection = _picked(config.detection, "code", "nms", "most")
        detection |= {
            "threshold": min(config.detection.threshold, config.instance_threshold),
            "merged_threshold": config.detection.threshold,
            "across_classes": config.head.across_classes,
        }
        return {
            "rule": "jsis",
            "regions": _regions(config.regions, [model.stride]),
            "detection": detection,
            "conflicts": asdict(config.conflicts),
            **_picked(config, "background_wins", "align_corners"),
        }
    raise ValueError(f"{type(model).__name__}: no rules are known that merge its outputs without torch")


def _picked(config: Any, *names: str) -> dict[str, Any]:
    """Some fields of a configuration as plain values."""
    return {name: to_plain(getattr(config, name)) for name in names}


def _detector(detector: Detector) -> dict[str, Any]:
    """The rules of proposals and detections."""
    strides = detector.strides
    return {
        "pooled": list(detector.pooled),
        "pooled_strides": [strides[name] for name in detector.pooled],
        "regions": _regions(detector.config.regions, list(strides.values())) | {"levels": list(strides)},
        "detection": _picked(detector.config.detection, "code", "threshold", "nms", "most"),
    }


def _regions(regions: Regions, strides: Sequence[int]) -> dict[str, Any]:
    """The rules of proposals on levels of the given strides."""
    cells, offset = cells_of(regions, strides)
    return {
        "cells": [level.tolist() for level in cells],
        "strides": list(strides),
        "offset": offset,
        "before": regions.test_before,
        "after": regions.test_after,
        **_picked(regions, "nms", "least_side"),
    }
