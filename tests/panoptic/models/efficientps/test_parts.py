"""The parts of EfficientPS: norms, backbone, pyramid, heads, anchors; and the names of published weights."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from panoptic.backbones.efficientnet import EfficientNet
from panoptic.convert import convert, reference_keys
from panoptic.layers.norm import AbsoluteBatchNorm, AbsoluteSyncBatchNorm, frozen_batch_norm, synchronise_norms
from panoptic.models.efficientps.config import DETECTOR
from panoptic.models.efficientps.mask_head import SeparableMaskHead
from panoptic.models.efficientps.model import EfficientPSConfig
from panoptic.models.efficientps.semantic_head import DensePredictionCell, SemanticHead
from panoptic.models.efficientps.two_way_fpn import TwoWayFPN
from panoptic.rcnn.rpn import Regions, anchors_of, region_losses
from panoptic.segmentation import Categories

CITYSCAPES = Categories(
    names=tuple(f"class {k}" for k in range(19)),
    is_thing=tuple(k > 10 for k in range(19)),
    ids=tuple(range(19)),
    colours=tuple((k, k, k) for k in range(19)),
)


KEYS = ("running_mean", "running_var", "weight", "bias")


def noisy(norm: AbsoluteBatchNorm) -> AbsoluteBatchNorm:
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def test_a_negative_weight_scales_by_its_absolute_value() -> None:
    norm = noisy(AbsoluteBatchNorm(6, eps=1e-3)).eval()
    assert (norm.weight < 0).any() and (norm.weight > 0).any()
    x = torch.randn(2, 6, 5, 4)
    mean, variance, weight, bias = (norm.state_dict()[key][:, None, None] for key in KEYS)
    expected = (x - mean) / (variance + 1e-3).sqrt() * (weight.abs() + 1e-3) + bias
    torch.testing.assert_close(norm(x), expected)
    frozen = frozen_batch_norm(norm)
    torch.testing.assert_close(frozen(x), expected)
    assert frozen.state_dict().keys() == norm.state_dict().keys()


def test_training_updates_the_statistics_as_batch_norm_does() -> None:
    norm, plain = AbsoluteBatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 4)
    norm(x)
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


def test_the_synchronised_form_keeps_keys_and_results() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), noisy(AbsoluteBatchNorm(6))).eval()
    x = torch.randn(2, 3, 5, 4)
    before, keys = model(x), list(model.state_dict())
    model = synchronise_norms(model)
    assert isinstance(model[1], AbsoluteSyncBatchNorm) and list(model.state_dict()) == keys
    torch.testing.assert_close(model.eval()(x), before)
    torch.testing.assert_close(frozen_batch_norm(model[1])(model[0](x)), before)


@pytest.mark.parametrize("name", ["backbone", "neck", "semantic_head", "mask_head"])
def test_published_names_and_shapes(shared, name: str) -> None:  # type: ignore[no-untyped-def]
    """Every published tensor has a name here, and the shape that the model gives it."""
    lines = shared(f"specs/keys/efficientps_{name}.txt").read_text().splitlines()
    shapes = {
        f"{name}.{key}": tuple(map(int, re.findall(r"\d+", shape))) for key, shape in (x.split(" ", 1) for x in lines)
    }
    names = reference_keys({**shapes, "semantic_head.lateral_convs_ss.0.conv.conv.weight": ()}, "efficientps")  # type: ignore[dict-item]
    with torch.device("meta"):
        own = EfficientPSConfig().build(CITYSCAPES).state_dict()
    for key, shape in shapes.items():
        kept = (shape[0] - 1, *shape[1:]) if key.startswith("mask_head.conv_logits") else shape  # without background
        assert tuple(own[names[key]].shape) == kept, key


PUBLISHED_LEVELS = {
    **{f"pyramid.down.p{k + 2}": f"neck.lateral_convs_top.{k}" for k in range(4)},
    **{f"pyramid.up.p{k + 2}": f"neck.lateral_convs_bottom.{3 - k}" for k in range(4)},
    **{f"pyramid.output.p{k + 2}": f"neck.fpn_convs.{k}" for k in range(4)},
    **{f"semantic.small_scale.p{5 - k}": f"semantic_head.lateral_convs_ss.{k}" for k in range(2)},
    **{f"semantic.large_scale.p{3 - k}": f"semantic_head.lateral_convs_ls.{k}.convs" for k in range(2)},
    **{f"semantic.corrections.p{4 - k}": f"semantic_head.aligning_convs.{k}.convs" for k in range(2)},
}


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model under the published names, with a background in front of the things."""
    back = {}
    for key, value in model.state_dict().items():
        name = key
        for ours, theirs in PUBLISHED_LEVELS.items():
            name = name.replace(ours, theirs)
        for ours, theirs in {
            "semantic.classifier": "semantic_head.conv_logits",
            "detector.regions.conv": "rpn_head.rpn_conv",
            "detector.regions.objectness": "rpn_head.rpn_cls",
            "detector.regions.deltas": "rpn_head.rpn_reg",
            "detector.boxes.fc1": "bbox_head.shared_fcs.0",
            "detector.boxes.fc2": "bbox_head.shared_fcs.1",
            "detector.boxes.classes": "bbox_head.fc_cls",
            "detector.boxes.deltas": "bbox_head.fc_reg",
            "detector.masks.convs": "mask_head.convs",
            "detector.masks.deconv": "mask_head.upsample",
            "detector.masks.predictor": "mask_head.conv_logits",
        }.items():
            name = name.replace(ours, theirs)
        if not name.startswith("backbone."):
            name = name.replace(".join.", ".conv.").replace(".norm.", ".bn.")
            name = name.replace("depthwise.", "depthwise_conv.").replace("pointwise.", "pointwise_conv.")
        if name.startswith(("bbox_head.fc_reg", "mask_head.conv_logits")):
            value = torch.cat([value.new_full((4 if "fc_reg" in name else 1, *value.shape[1:]), 9.0), value])
        if name.startswith("bbox_head.fc_cls"):
            value = value.roll(1, 0)
        back[name] = value
    return back


@pytest.mark.parametrize("separable", [False, True])
def test_a_published_checkpoint_comes_back(separable: bool) -> None:
    heads = replace(DETECTOR.heads, box_side=3, box_width=12, mask_width=16, mask_layers=2)
    config = EfficientPSConfig(width=16, semantic_width=8, separable_pyramid=separable)
    config = replace(
        config,
        backbone=replace(config.backbone, name="efficientps_b0"),
        detector=replace(DETECTOR, heads=heads),
    )
    torch.manual_seed(0)
    model = config.build(CITYSCAPES)
    found, weights = convert(published(model), "efficientps", CITYSCAPES)
    assert found == config
    own = model.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[key], own[key]) for key in own)
    with pytest.raises(ValueError, match="box head has 8 thing classes, the list has 9"):
        convert(published(model), "efficientps", replace(CITYSCAPES, is_thing=tuple(k > 9 for k in range(19))))


def test_a_stride_pads_as_tensorflow_does() -> None:
    """On an even size a 3x3 of stride 2 has one row and column of zeros at the end and none at the beginning."""
    backbone = EfficientNet("efficientps_b0")
    x = torch.randn(1, 3, 32, 48)
    stem, kernel = (backbone.get_submodule(name) for name in ("conv_stem", "blocks.2.0.conv_dw"))
    assert isinstance(stem, nn.Conv2d) and isinstance(kernel, nn.Conv2d) and kernel.kernel_size == (5, 5)
    torch.testing.assert_close(stem(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), stem.weight, stride=2))
    x = torch.randn(1, kernel.in_channels, 16, 16)
    expected = F.conv2d(F.pad(x, (1, 2, 1, 2)), kernel.weight, stride=2, groups=kernel.groups)
    torch.testing.assert_close(kernel(x), expected)


def test_the_pyramid_adds_both_directions() -> None:
    """With convolutions that keep a constant each level is the sum of all levels above it and all below it."""
    fpn = TwoWayFPN({"res2": 1, "res3": 1, "res4": 1, "res5": 1}, 1, "frozen").eval()
    for name, parameter in fpn.named_parameters():
        centre = parameter.shape[-1] // 2
        nn.init.zeros_(parameter)
        assert parameter.ndim == 4, name
        parameter.data[..., centre, centre] = 1
    sides, values = (16, 8, 4, 2), (1.0, 10.0, 100.0, 1000.0)
    features = {f"res{k + 2}": torch.full((1, 1, s, s), v) for k, (s, v) in enumerate(zip(sides, values, strict=True))}
    levels = fpn(features)
    assert list(levels) == ["p2", "p3", "p4", "p5"]
    expected = (1111 + 1, 1110 + 11, 1100 + 111, 1000 + 1111)
    for level, side, value in zip(levels.values(), sides, expected, strict=True):
        torch.testing.assert_close(level, torch.full((1, 1, side, side), float(value)), rtol=1e-4, atol=0)


def test_the_pyramid_reduces_by_the_nearest_neighbour() -> None:
    fpn = TwoWayFPN({"res2": 1, "res3": 1, "res4": 1, "res5": 1}, 1, "frozen").eval()
    for parameter in fpn.parameters():
        nn.init.zeros_(parameter)
        parameter.data[..., parameter.shape[-1] // 2, parameter.shape[-1] // 2] = 1
    fine = torch.rand(1, 1, 16, 16)
    features = {"res2": fine} | {f"res{k}": torch.zeros(1, 1, 32 >> (k - 1), 32 >> (k - 1)) for k in (3, 4, 5)}
    torch.testing.assert_close(fpn(features)["p3"], fine[:, :, ::2, ::2], rtol=1e-4, atol=0)


def test_a_cell_sees_its_sources() -> None:
    """a (1, 6) on the input; (1, 1), (6, 21) and (18, 15) on a; (6, 3) on the fourth: arXiv 1809.04184, figure 5."""
    cell = DensePredictionCell(4, 3, "frozen").eval()
    convs = [cell.get_submodule(f"convs.{k}.depthwise.conv") for k in range(5)]
    assert [(c.dilation, c.padding) for c in convs] == [(d, d) for d in ((1, 6), (1, 1), (6, 21), (18, 15), (6, 3))]
    x = torch.randn(1, 4, 8, 8)
    a = cell.convs[0](x)
    d = cell.convs[3](a)
    parts = [a, cell.convs[1](a), cell.convs[2](a), d, cell.convs[4](d)]
    torch.testing.assert_close(cell(x), cell.join(torch.cat(parts, 1)))


def test_the_logits_see_p4_without_p5() -> None:
    """The sum of p4 and p5 reaches the logits through the finer levels only."""
    torch.manual_seed(0)
    head = SemanticHead(8, 4, 3, "frozen").eval()
    levels = {f"p{k}": torch.randn(1, 8, 64 >> k, 64 >> k) for k in (2, 3, 4, 5)}
    up = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # noqa: E731
    p5, p4 = head.small_scale["p5"](levels["p5"]), head.small_scale["p4"](levels["p4"])
    fused = head.corrections["p4"](p4 + up(p5, (4, 4)))
    p3 = head.large_scale["p3"](levels["p3"]) + up(fused, (8, 8))
    p2 = head.large_scale["p2"](levels["p2"]) + up(head.corrections["p3"](p3), (16, 16))
    expected = head.classifier(torch.cat([p2, up(p3, (16, 16)), up(p4, (16, 16)), up(p5, (16, 16))], 1))
    torch.testing.assert_close(head(levels), expected)


def test_no_region_leaves_the_statistics() -> None:
    head = SeparableMaskHead(4, 4, 2, 3, "batch").train()
    before = {key: value.clone() for key, value in head.state_dict().items()}
    logits = head(torch.zeros(0, 4, 14, 14), torch.zeros(0, dtype=torch.int64))
    logits.sum().backward()
    assert logits.shape == (0, 28, 28) and all(p.grad is not None for p in head.parameters())
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    head(torch.randn(2, 4, 14, 14), torch.zeros(2, dtype=torch.int64))
    assert any(not torch.equal(value, before[key]) for key, value in head.state_dict().items())


def test_anchors_have_the_corners_of_mmdetection() -> None:
    """Corners are the pixels centre -+ (size - 1) / 2, rounded, where a box includes its far corner."""
    regions = DETECTOR.regions
    logits = [torch.zeros(1, 3, 2, 3) for _ in range(4)]
    for anchors, stride in zip(anchors_of(logits, (4, 8, 16, 32), regions), (4, 8, 16, 32), strict=True):
        expected = []
        for row in range(2):
            for column in range(3):
                for ratio in (0.5, 1.0, 2.0):
                    sides = 8 * stride * torch.tensor([ratio**-0.5, ratio**0.5])  # width, height
                    centre = (stride - 1) / 2
                    inclusive = torch.cat([centre - 0.5 * (sides - 1), centre + 0.5 * (sides - 1)]).round()
                    shift = torch.tensor([column, row, column, row]) * stride
                    expected.append(inclusive + shift + torch.tensor([0, 0, 1, 1]))  # half-open
        torch.testing.assert_close(anchors, torch.stack(expected), rtol=0, atol=0)


def test_anchors_beyond_the_image_do_not_learn() -> None:
    anchors = [torch.tensor([[-4.0, 0, 12, 16], [0, 0, 16, 16], [8, 8, 24, 24], [16, 16, 33, 32]])]
    truth, sizes = [torch.tensor([[0.0, 0, 16, 16]])], torch.tensor([[32, 32]])
    logits = [torch.tensor([[5.0, 0.0, 0.0, 5.0]])]
    deltas = [torch.zeros(1, 4, 4)]
    rules = Regions(inside=True, divide="batch", negative=0.3)
    objectness, _ = region_losses(logits, deltas, anchors, truth, rules, sizes)
    # one positive (the second) and one negative (the third); both with logit 0
    assert float(objectness) == pytest.approx(float(torch.log(torch.tensor(2.0))))
    outside, _ = region_losses(logits, deltas, anchors, truth, replace(rules, inside=False), sizes)
    assert float(outside) > float(objectness)


def test_a_thing_that_no_anchor_fits_has_no_positive() -> None:
    anchors = [torch.tensor([[0.0, 0, 16, 16], [16, 16, 32, 32]])]
    truth = [torch.tensor([[0.0, 0, 16, 4]])]  # overlaps the first anchor by 1/4
    logits, deltas = [torch.tensor([[3.0, 3.0]])], [torch.zeros(1, 2, 4)]
    some = region_losses(logits, deltas, anchors, truth, Regions(divide="batch"))
    none = region_losses(logits, deltas, anchors, truth, Regions(divide="batch", low_quality_overlap=0.3))
    assert float(some[1]) > 0 and float(none[1]) == 0
