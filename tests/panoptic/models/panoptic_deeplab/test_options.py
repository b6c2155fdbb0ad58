"""Options of Panoptic-DeepLab that no published number covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.models.panoptic_deeplab.model import PanopticDeepLab, PanopticDeepLabConfig
from panoptic.segmentation import Frame, Sample, Segmentation, collate

SMALL = PanopticDeepLabConfig(
    backbone=Backbone("resnet18"),
    aspp_channels=8,
    rates=(1,),
    semantic_projections=(4, 4, 4),
    instance_projections=(4, 4, 4),
    semantic_channels=8,
    instance_channels=8,
    semantic_head_channels=8,
    instance_head_channels=8,
    stuff_area=0,
)


def two_things(small_categories) -> tuple[torch.Tensor, object]:
    """Two persons of 8x8 pixels in a void image."""
    segments = np.zeros((32, 48), np.int32)
    segments[4:12, 4:12], segments[20:28, 30:38] = 1, 2
    truth = Segmentation(segments, np.array([small_categories.things[0]] * 2))
    return collate([Sample(np.zeros((32, 48, 3), np.uint8), truth, "two")])


def test_foreground_keeps_instances_off_ignored_regions(small_categories) -> None:
    model = SMALL.build(small_categories).eval()
    images, targets = two_things(small_categories)
    outputs = model.truth(targets, model.network(images))
    # a network that knows no void calls everything a person
    outputs["semantic"] = torch.zeros_like(outputs["semantic"])
    outputs["semantic"][:, small_categories.things[0]] = 1
    masked = model.postprocess(outputs, targets.frame).maps[0]
    np.testing.assert_array_equal(masked.segments, targets.segments[0])
    del outputs["foreground"]
    assert (model.postprocess(outputs, targets.frame).maps[0].segments > 0).all()


def test_void_is_trained_as_background(small_categories) -> None:
    model = replace(SMALL, foreground=True).build(small_categories)
    images, targets = two_things(small_categories)
    outputs = model.network(images)
    void = (targets.segments == 0)[:, None]
    logits = {"right": torch.where(void, -5.0, 5.0), "wrong": torch.where(void, 5.0, 5.0)}
    losses = {name: model.loss(outputs | {"foreground": x}, targets)["foreground"] for name, x in logits.items()}
    assert losses["right"] < 0.01 < 1 < losses["wrong"]


@pytest.mark.parametrize("flavour", ["standalone", "detectron2"])
def test_maps_of_another_size_keep_their_instances(flavour: str, small_categories) -> None:
    model = replace(SMALL, flavour=flavour).build(small_categories).eval()
    images, targets = two_things(small_categories)
    outputs = model.truth(targets, model.network(images))
    frame = Frame((32, 48), targets.frame.sizes, targets.frame.sizes * 3)
    merged = model.postprocess(outputs, frame).maps[0]
    people = np.flatnonzero(merged.labels == small_categories.things[0]) + 1
    sizes = [int((merged.segments == k).sum()) for k in people]
    assert len(sizes) == 2
    assert sizes == pytest.approx([24 * 24] * 2, rel=0.15)


def test_offsets_that_are_not_rescaled_miss_their_centres(small_categories) -> None:
    """detectron2's published behaviour, which its converted checkpoints keep."""
    segments = np.ones((64, 96), np.int32)
    segments[:, 16:] = 2
    truth = Segmentation(segments, np.array([small_categories.things[0]] * 2))
    images, targets = collate([Sample(np.zeros((64, 96, 3), np.uint8), truth, "halves")])
    frame = Frame((64, 96), targets.frame.sizes, targets.frame.sizes * 3)  # an odd factor, or the peak is doubled
    wrong = {}
    for rescale in (True, False):
        config = replace(SMALL, flavour="detectron2", rescale_offset=rescale)
        model = config.build(small_categories).eval()
        outputs = model.truth(targets, model.network(images))
        merged = model.postprocess(outputs, frame).maps[0]
        expected = np.kron(segments, np.ones((3, 3), np.int32))
        wrong[rescale] = float((merged.segments != expected).mean())
    assert wrong[True] < 0.01 < 0.02 < wrong[False]


def test_offsets_are_in_pixels_of_the_canvas(small_categories) -> None:
    for flavour, height, scale in (("standalone", 16, 5), ("standalone", 97, 4), ("detectron2", 16, 4)):
        model = replace(SMALL, flavour=flavour).build(small_categories).eval()
        torch.nn.init.zeros_(model.offset_head.predictor.weight)
        torch.nn.init.ones_(model.offset_head.predictor.bias)
        with torch.no_grad():
            outputs = model.network(torch.zeros(1, 3, height, 64, dtype=torch.uint8))
        assert torch.equal(outputs["offset"], torch.full_like(outputs["offset"], scale))


def test_many_classes_are_compared_in_chunks(small_categories) -> None:
    model = SMALL.build(small_categories)
    logits = torch.randint(0, 4, (1, 50, 33, 49)).float()  # ties in plenty
    frame = Frame((33, 49), torch.tensor([[30, 40]]), torch.tensor([[30, 40]]))
    (classes,) = model.postprocess({"semantic": logits}, frame, ["semantics"]).semantics
    np.testing.assert_array_equal(classes, logits[0, :, :30, :40].argmax(0))


def test_one_pyramid_pooling_serves_both_decoders(small_categories) -> None:
    single = replace(SMALL, shared_aspp=True).build(small_categories)
    dual = SMALL.build(small_categories)
    extra = {key for key in dual.state_dict() if key.startswith("instance_aspp")}
    assert extra and dual.state_dict().keys() - single.state_dict().keys() == extra


def test_initialisation_of_the_flavours(small_categories) -> None:
    torch.manual_seed(0)
    wide = replace(SMALL, aspp_channels=64, semantic_channels=64)
    first = wide.build(small_categories)
    assert first.semantic_aspp.project.conv.weight.std().item() == pytest.approx(0.001, rel=0.1)
    second: PanopticDeepLab = replace(wide, flavour="detectron2").build(small_categories)
    project = second.semantic_aspp.project.conv.weight
    assert project.abs().max().item() == pytest.approx((3 / project.shape[1]) ** 0.5, rel=0.01)
    depthwise = second.semantic_decoder.fuse[0].depthwise.conv.weight
    assert depthwise.std().item() == pytest.approx((2 / (25 * len(depthwise))) ** 0.5, rel=0.2)
    assert second.semantic_head.predictor.weight.std().item() < 0.003
    assert not second.centre_head.predictor.bias.any() and not second.semantic_aspp.pool.conv.bias.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(low_level=("res3", "res2")), "low_level"),
        (dict(low_level=("res4", "res3", "res1")), "'res1'"),
        (dict(image_pool=(100, 128)), "100x128"),
    ],
)
def test_contradictions_are_named(changes, message: str, small_categories) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes).build(small_categories)
