"""Options of MaskFormer and Mask2Former as checkpoints hold them."""

from __future__ import annotations

import pytest

from panoptic import models
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.training.plain import from_plain, to_plain

PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
WIDTHS = {"channels": 256, "mask_channels": 256, "norm": "group", "encoder_layers": 6, "heads": 8, "queries": 100}
RULES = {"deep_supervision": True, "no_object_weight": 0.1, "threshold": 0.8, "overlap": 0.8, "top_k": 100}

VERSION_0_1 = {
    MaskFormerConfig: {
        **{"class": "MaskFormerConfig", "divisor": 32, **PIXELS, **WIDTHS, **RULES},
        **{"decoder_layers": 6, "hidden": 2048, "dropout": 0.1, "inside": False},
        **{"class_weight": 1.0, "mask_weight": 20.0, "dice_weight": 1.0, "loss_stride": 1},
    },
    Mask2FormerConfig: {
        **{"class": "Mask2FormerConfig", "divisor": 32, **PIXELS, **WIDTHS, **RULES},
        **{"pixel_decoder": "deformable", "encoder_hidden": 1024, "points_per_level": 4, "full_precision": True},
        **{"decoder_layers": 9, "decoder_hidden": 2048, "dropout": 0.0, "inside": True},
        **{"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0},
        **{"loss_points": 12544, "oversample": 3.0, "importance": 0.75},
    },
}
"""The defaults of version 0.1 as a checkpoint holds them, without the backbone."""


@pytest.mark.parametrize("kind", VERSION_0_1)
def test_configs_of_version_0_1_are_read_as_they_were(kind: type) -> None:
    plain = VERSION_0_1[kind]
    config = from_plain(models.Architecture, plain)
    assert type(config) is kind
    assert to_plain(config) == {**plain, "backbone": to_plain(config.backbone)}
    changed = {"divisor"} if kind is MaskFormerConfig else set()
    assert {name for name, value in to_plain(kind()).items() if name != "backbone" and value != plain[name]} == changed
