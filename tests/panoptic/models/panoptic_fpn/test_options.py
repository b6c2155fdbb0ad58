"""Promises of Panoptic FPN beside the contract of every model: crowded images, given detections, its options."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panoptic.backbones import Backbone
from panoptic.models.panoptic_fpn.model import PanopticFPN, PanopticFPNConfig
from panoptic.models.panoptic_fpn.postprocess import semantic_classes
from panoptic.segmentation import IGNORE, Categories, Frame, Segmentation, collate
from tests.panoptic.models.test_contract import as_sample, build
from tests.support.small import SMALL

CONFIG = SMALL[PanopticFPNConfig]["group_norm"]
assert isinstance(CONFIG, PanopticFPNConfig)


@pytest.fixture
def model(small_categories) -> PanopticFPN:
    return build(CONFIG, small_categories).eval()  # type: ignore[return-value]


def crowded(categories: Categories, count: int = 300) -> Segmentation:
    """So many things of 5 x 4 pixels on stuff."""
    segments = np.ones((96, 128), np.int32)
    for k in range(count):
        row, column = divmod(k, 24)
        segments[row * 6 : row * 6 + 5, column * 5 : column * 5 + 4] = k + 2
    labels = [categories.stuff[0], *(categories.things[k % len(categories.things)] for k in range(count))]
    return Segmentation(segments, np.array(labels))


def test_three_hundred_things_teach_every_head(small_categories) -> None:
    model = build(CONFIG, small_categories).train()
    truths = [crowded(small_categories), Segmentation(np.zeros((96, 128), np.int32), np.zeros(0, np.int64))]
    images, targets = collate([as_sample(t, k) for k, t in enumerate(truths)], model.divisor)
    losses, maps = model(images, targets, segment=True)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.startswith("detector.masks.predictor"), name
    assert len(maps) == 2


def test_true_boxes_in_place_of_detections_are_masked_and_merged(model, small_categories, random_segmentation) -> None:
    truth = random_segmentation(np.random.default_rng(2), 64, 96, small_categories, things=4, void=False)
    images, targets = collate([as_sample(truth)], model.divisor)
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
    given = outputs | {"detections": model.truth(targets, outputs)["detections"]}
    found = model.detector.detect(given, targets.frame)
    assert torch.equal(found["detections"], given["detections"])
    listed = found["detections"][0, :, 5] != IGNORE
    assert found["masks"][0, listed].amax((1, 2)).min() > 0 and not found["masks"][0, ~listed].any()
    (instances,) = model.postprocess(found, targets.frame, ["instances"]).instances
    assert sorted(instances.labels) == sorted(label for label in truth.labels if label in small_categories.things)
    assert (instances.scores == 1).all()


def test_what_is_found_once_is_not_looked_for_again(model, monkeypatch) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    frame = Frame.full(images)
    with torch.no_grad():
        outputs = model.network(images)
    once = model.detector.detect(outputs, frame)
    expected = model.postprocess(outputs, frame).maps[0]
    monkeypatch.setattr(model.detector, "_run_box_head", None)
    monkeypatch.setattr(model.detector, "_run_mask_head", None)
    assert np.array_equal(model.postprocess(once, frame).maps[0].segments, expected.segments)
    assert len(model.postprocess(once, frame, ["instances"]).instances[0].labels) > 0


def test_proposals_come_at_the_output_size(model) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [40, 60]])
    with torch.no_grad():
        outputs = model.network(images, Frame((64, 96), sizes, sizes))
    small = model.postprocess(outputs, Frame((64, 96), sizes, sizes), ["proposals"]).proposals
    large = model.postprocess(outputs, Frame((64, 96), sizes, sizes * torch.tensor([3, 2])), ["proposals"]).proposals
    for b, (height, width) in enumerate(sizes.tolist()):
        torch.testing.assert_close(large[b], small[b] * torch.tensor([2.0, 3, 2, 3]))
        assert len(small[b]) and (small[b].amax(0) <= torch.tensor([width, height, width, height])).all()


def test_padding_of_the_canvas_changes_nothing(model) -> None:
    """One image as it is, and with the batch padding that the network would have added itself."""
    images = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    padded = F.pad(images, (0, 26, 0, 14))
    sizes = torch.tensor([[50, 70]])
    with torch.no_grad():
        first, second = model.network(images), model.network(padded, Frame((64, 96), sizes, sizes))
    assert all(torch.equal(first[name], second[name]) for name in first)
    maps = [
        model.postprocess(first, Frame.full(images)).maps,
        model.postprocess(second, Frame((64, 96), sizes, sizes)).maps,
    ]
    assert np.array_equal(maps[0][0].segments, maps[1][0].segments)


def test_stuff_is_evaluated_by_its_branch_and_things_by_the_map(model, small_categories) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    frame = Frame.full(images)
    with torch.no_grad():
        outputs = model.network(images)
    merged, (found,) = (
        model.postprocess(outputs, frame).maps[0].semantic(),
        model.postprocess(outputs, frame, ["semantics"]).semantics,
    )
    branch = semantic_classes(outputs["semantic"], frame, 0)
    assert np.array_equal(found[branch > 0], np.array(small_categories.stuff)[branch[branch > 0] - 1])
    things = np.isin(merged, small_categories.things)
    assert np.array_equal(found[(branch == 0) & things], merged[(branch == 0) & things])
    assert (found[(branch == 0) & ~things] == IGNORE).all()


def test_weights_of_losses(small_categories, random_segmentation) -> None:
    images, targets = collate([as_sample(random_segmentation(np.random.default_rng(1), 64, 64, small_categories))], 32)
    found = []
    for factor in (1.0, 2.0):
        config = replace(CONFIG, instance_weight=factor, semantic_weight=0.5 * factor)
        model = build(config, small_categories).eval()
        torch.manual_seed(5)
        found.append(model.loss(model.network(images, targets.frame), targets))
    ratios = {name: (found[1][name] / found[0][name]).item() for name in found[0]}
    expected = {"semantic": 2, "objectness": 1, "region": 1, "class": 2, "box": 2, "mask": 2}
    assert ratios == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(divisor=16), "divisor: 16 is no multiple of 32"),
        (dict(backbone=Backbone("resnet18", output_stride=16)), r"backbone\.output_stride: 16"),
        (
            dict(detector=replace(CONFIG.detector, regions=replace(CONFIG.detector.regions, sizes=(32, 64)))),
            r"regions\.sizes: 2 sizes cannot be shared out over 5 levels",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(small_categories, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change).build(small_categories)


def test_without_things_there_is_nothing_to_detect() -> None:
    with pytest.raises(ValueError, match="no thing class"):
        CONFIG.build(Categories(("sky",), (False,), (1,), ((0, 0, 0),)))
    only_things = Categories(("cat",), (True,), (1,), ((0, 0, 0),))
    assert build(CONFIG, only_things).classifier.out_channels == 1


def test_any_pyramid_of_timm_is_a_backbone(small_categories) -> None:
    model = build(replace(CONFIG, backbone=Backbone("resnet10t")), small_categories).eval()
    with torch.no_grad():
        outputs = model.network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert outputs["semantic"].shape == (1, 3, 16, 16)
