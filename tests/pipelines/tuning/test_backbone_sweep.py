"""Tables 7 to 9 of "Image Panoptic Segmentation Challenges using COCO Dataset": one option, one name a row."""

from __future__ import annotations

import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.segmentation import Categories
from pipelines.config import Experiment, override

ROWS = ("resnet50", "resnet50_double3x3", "vgg16", "vgg16_bn", "res2net50_26w_4s", "res2net50_v1b_26w_4s")


@pytest.mark.parametrize("name", ROWS)
def test_panoptic_fpn_takes_each_backbone_by_its_name(name: str, small_categories: Categories) -> None:
    base = Experiment(model=PanopticFPNConfig(backbone=Backbone()))
    model = override(base, {"model.backbone.name": name}).model.build(small_categories).eval()
    with torch.no_grad():
        outputs = model.network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert [tuple(outputs[f"p{level}"].shape[2:]) for level in (2, 3, 4, 5)] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_name_that_the_other_options_do_not_suit_is_refused(small_categories: Categories) -> None:
    base = Experiment(model=PanopticFPNConfig(backbone=Backbone(stride_in_1x1=True)))
    changed = override(base, {"model.backbone.name": "vgg16"})
    with pytest.raises(ValueError, match=r"backbone\.stride_in_1x1: vgg16 does not have this option"):
        changed.model.build(small_categories)
