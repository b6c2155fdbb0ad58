"""The head made of a residual stage: pooling, stages, one detection a region."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from panoptic.backbones import Backbone
from panoptic.backbones.resnet import ResNet
from panoptic.models.jsis_net.c4_head import (
    C4Head,
    StageOptions,
    crop,
    cut_backbone,
    detect_best,
    new_stage,
    pool_regions,
)
from panoptic.rcnn.roi_heads import Detection


def crop_and_resize(features: np.ndarray, box: list[float], side: int) -> np.ndarray:
    """TensorFlow's op, from its documentation; `box` is y0 x0 y1 x1, 1 at the last sample of the map."""
    channels, height, width = features.shape
    found = np.zeros((channels, side, side), np.float32)
    y0, x0, y1, x1 = box
    for i in range(side):
        y = y0 * (height - 1) + i * (y1 - y0) * (height - 1) / (side - 1)
        for j in range(side):
            x = x0 * (width - 1) + j * (x1 - x0) * (width - 1) / (side - 1)
            if not (0 <= y <= height - 1 and 0 <= x <= width - 1):
                continue
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            fy, fx = y - top, x - left
            upper = features[:, top, left] * (1 - fx) + features[:, top, right] * fx
            lower = features[:, bottom, left] * (1 - fx) + features[:, bottom, right] * fx
            found[:, i, j] = upper * (1 - fy) + lower * fy
    return found


def test_crop_is_tensorflows() -> None:
    torch.manual_seed(0)
    features, stride = torch.rand(1, 3, 9, 13), 8
    boxes = torch.tensor([[0.0, 0.0, 104.0, 72.0], [11.0, 7.0, 60.0, 71.0], [50.0, 30.0, 51.0, 31.0]])
    found = crop(features, stride, boxes, 6)
    for box, region in zip(boxes.tolist(), found.numpy(), strict=True):
        normalised = [box[1] / 72, box[0] / 104, box[3] / 72, box[2] / 104]
        np.testing.assert_allclose(region, crop_and_resize(features[0].numpy(), normalised, 6), atol=1e-5)
    assert torch.allclose(found[0, :, [0, 0, -1, -1], [0, -1, 0, -1]], features[0, :, [0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize("pooling", ["align", "crop"])
def test_regions_keep_their_image_and_their_order(pooling) -> None:
    features = torch.stack([torch.full((2, 6, 6), 1.0), torch.full((2, 6, 6), 5.0)])
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([[0.0, 0.0, 48.0, 48.0], [16.0, 8.0, 24.0, 40.0]])]
    pooled = pool_regions(features, 8, boxes, StageOptions(pooling=pooling, side=3))
    assert pooled.shape == (3, 2, 3, 3)
    assert torch.allclose(pooled[:, 0, 1, 1], torch.tensor([1.0, 5.0, 5.0]))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_the_last_stage_keeps_the_size_of_what_it_gets(name: str, output_stride) -> None:
    backbone = Backbone(name, output_stride=output_stride).build()
    cut_backbone(backbone, "res4", True)
    stage = backbone.get_submodule("layer4")
    assert stage(torch.rand(2, backbone.channels["res4"], 7, 7)).shape == (2, backbone.channels["res5"], 7, 7)
    assert all(m.dilation == (1, 1) for m in stage.modules() if isinstance(m, nn.Conv2d))


def test_a_deformable_last_stage_keeps_it_too() -> None:
    backbone = Backbone("resnet50", deformable="v2").build()
    cut_backbone(backbone, "res4", True)
    assert backbone.get_submodule("layer4")(torch.rand(1, 1024, 5, 5)).shape == (1, 2048, 5, 5)


@pytest.mark.parametrize(("shared", "left"), [("res3", 2), ("res4", 3), ("res5", 4)])
def test_stages_that_nobody_uses_are_removed(shared: str, left: int) -> None:
    backbone = Backbone("resnet18").build()
    assert isinstance(backbone, ResNet)
    cut_backbone(backbone, shared, False)
    assert [name for name, _ in backbone.named_children() if name.startswith("layer")] == [
        f"layer{k}" for k in range(1, left + 1)
    ]
    with pytest.raises(ValueError, match="shared_level: res4 needs one of our ResNets"):
        cut_backbone(nn.Conv2d(3, 3, 1), "res4", False)


def test_a_new_stage_has_four_times_its_width() -> None:
    assert new_stage(12, 8, 2, "batch")(torch.rand(3, 12, 4, 4)).shape == (3, 32, 4, 4)


def boxes_of(*rows: list[float], classes: int = 2) -> torch.Tensor:
    return torch.tensor(rows).float().repeat(1, classes)


def test_a_region_is_one_detection_at_most() -> None:
    boxes = boxes_of([0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10])
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.55, 0.25], [0.45, 0.4, 0.15]])
    found = detect_best(boxes, probabilities, (32, 64), Detection(threshold=0.5, nms=0.4), True)
    assert found.classes.tolist() == [0, 1] and found.regions.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.6, 0.55])
    lower = detect_best(boxes, probabilities, (32, 64), Detection(threshold=0.3, nms=0.4), True)
    assert lower.regions.tolist() == [0, 1, 2]  # its second class is above the threshold and still none
    most = detect_best(boxes, probabilities, (32, 64), Detection(threshold=0.3, nms=0.4, most=1), True)
    assert most.regions.tolist() == [0]


@pytest.mark.parametrize(("across", "left"), [(True, [0]), (False, [0, 1])])
def test_classes_suppress_each_other_or_not(across: bool, left: list[int]) -> None:
    boxes = boxes_of([0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8])
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
    found = detect_best(boxes, probabilities, (32, 32), Detection(threshold=0.5, nms=0.4), across)
    assert found.regions.tolist() == left


def test_boxes_are_cut_to_the_image_and_bad_ones_dropped() -> None:
    boxes = boxes_of([-5, -5, 10, 10], [40, 0, 50, 10], [0, 0, float("nan"), 10])
    probabilities = torch.tensor([[0.9, 0.1, 0.0]]).repeat(3, 1)
    found = detect_best(boxes, probabilities, (8, 32), Detection(threshold=0.5, nms=0.4), True)
    assert found.boxes.tolist() == [[0, 0, 10, 8]]


@pytest.mark.parametrize(
    "options",
    [
        StageOptions(width=4, blocks=1, side=3, mask_channels=8, mask_side=14),
        StageOptions(width=4, blocks=1, side=3, mask_channels=8, mask_side=12, mask_upsampling="deconvolution"),
        StageOptions(width=4, blocks=1, side=3, mask_channels=8, mask_side=14, precision="bfloat16"),
    ],
)
def test_detecting_and_outlining_in_parts_is_the_same(options: StageOptions, monkeypatch) -> None:
    torch.manual_seed(0)
    head = C4Head(16, 0, 3, options, "group").eval()
    features = torch.rand(1, 16, 8, 8)
    corners = torch.rand(9, 2, 2) * 60
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 2], 1)
    detection = replace(Detection(), threshold=0.0, nms=1.0)
    whole, background = head.detect(features, 8, boxes, (64, 64), detection, None)
    masks = head.mask_probabilities(features, 8, whole.boxes, whole.classes, None)
    assert masks.shape == (9, options.mask_side, options.mask_side) and masks.dtype == torch.float32
    assert ((masks > 0) & (masks < 1)).all() and torch.isfinite(background).all()
    monkeypatch.setattr("panoptic.models.jsis_net.c4_head.AT_ONCE", 4)
    parts, _ = head.detect(features, 8, boxes, (64, 64), detection, None)
    assert torch.allclose(parts.boxes, whole.boxes, atol=1e-3) and torch.equal(parts.classes, whole.classes)
    again = head.mask_probabilities(features, 8, whole.boxes, whole.classes, None)
    assert torch.allclose(again, masks, atol=1e-5 if options.precision == "float32" else 1e-2)
    assert head.mask_probabilities(features, 8, whole.boxes[:0], whole.classes[:0], None).shape == (0, *masks.shape[1:])
