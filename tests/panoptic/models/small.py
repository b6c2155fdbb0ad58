"""Tiny configurations of each architecture, for the tests that run over all of them."""

from __future__ import annotations

from dataclasses import replace

from panoptic.backbones import Backbone
from panoptic.models.panoptic_deeplab import PanopticDeepLabConfig

SMALL_DEEPLAB = PanopticDeepLabConfig(
    backbone=Backbone("resnet18"),
    aspp_channels=16,
    rates=(1, 2),
    semantic_projections=(8, 8, 8),
    instance_projections=(8, 8, 8),
    semantic_channels=16,
    instance_channels=16,
    semantic_head_channels=16,
    instance_head_channels=8,
    stuff_area=0,
    top_k=None,
    threshold=0.0,
)

SMALL = {
    PanopticDeepLabConfig: {
        "standalone": SMALL_DEEPLAB,
        "detectron2": replace(
            SMALL_DEEPLAB,
            flavour="detectron2",
            low_level=("res3", "res2"),
            semantic_projections=(8, 8),
            instance_projections=(8, 8),
            backbone=Backbone("resnet18", stem="deeplab", output_stride=16, dilate_first=True, multigrid=(1, 2, 4)),
            separable=False,
            centre_separable=False,
            aspp_separable=True,
            semantic_loss="cross_entropy",
        ),
        "group_norm_foreground": replace(
            SMALL_DEEPLAB,
            backbone=Backbone("resnet18", norm="group"),
            norm="group",
            foreground=True,
            shared_aspp=True,
            semantic_loss="ohem",
            ohem_min_kept=100,
        ),
        "frozen": replace(SMALL_DEEPLAB, backbone=Backbone("resnet18", freeze=3)),
    }
}
"""By class of configuration, then by name; with thresholds off so that the oracle can be as good as stated."""

ORACLE: dict[type, float] = {}
"""PQ that the truth in place of the outputs reaches at least, where they do not determine the map (see the model's
docstring); 100 where no bound stands here."""
