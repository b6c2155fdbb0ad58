"""JSIS-Net: its seven losses against their definitions, branches alone and joined, options, edge cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.backbones.weights import load_weights
from panoptic.models.jsis_net.c4_head import StageOptions
from panoptic.models.jsis_net.config import REGIONS
from panoptic.models.jsis_net.model import JSISNet, JSISNetConfig
from panoptic.rcnn.rpn import region_losses
from panoptic.segmentation import IGNORE, Categories, Frame, Sample, Segmentation, Targets, collate
from panoptic.training.optim import Optim, build_optimiser
from tests.support.small import SMALL, SMALL_JSIS

TERMS = ("objectness", "region", "class", "box", "mask", "semantic", "regularisation")

WEIGHTS = (
    *("objectness_weight", "region_weight", "class_weight", "box_weight"),
    *("mask_weight", "semantic_weight", "regularisation"),
)


def batch(random_segmentation, categories: Categories, seeds: tuple[int, ...] = (1, 2)) -> tuple[Tensor, Targets]:
    samples = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        truth = random_segmentation(rng, 64, 96, categories, things=6)
        samples.append(Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), truth, f"drawn {seed}"))
    return collate(samples, 16)


def build(config: JSISNetConfig, categories: Categories) -> JSISNet:
    torch.manual_seed(0)
    return config.build(categories)


def losses(config: JSISNetConfig, categories: Categories, images: Tensor, targets: Targets) -> dict[str, float]:
    model = build(config, categories)
    torch.manual_seed(3)
    terms, _ = model(images, targets)
    assert terms is not None
    return {name: float(term.detach()) for name, term in terms.items()}


def test_seven_terms_have_the_weights_of_the_paper(small_categories, random_segmentation) -> None:
    assert [getattr(JSISNetConfig(), name) for name in WEIGHTS] == [1.0, 1.0, 1.0, 0.15, 0.3, 1.0, 5.5e-5]
    images, targets = batch(random_segmentation, small_categories)
    config = replace(SMALL_JSIS, regularisation=5.5e-5)
    once = losses(config, small_categories, images, targets)
    assert tuple(once) == TERMS and all(value > 0 for value in once.values())
    for name, weight in zip(TERMS, WEIGHTS, strict=True):
        twice = losses(replace(config, **{weight: 2 * getattr(config, weight)}), small_categories, images, targets)
        assert twice == pytest.approx({**once, name: 2 * once[name]})


@pytest.mark.parametrize(("branches", "terms"), [("semantic", TERMS[5:]), ("instances", (*TERMS[:5], TERMS[6]))])
def test_a_branch_alone_has_its_own_terms_and_weights(branches, terms, small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories)
    config = replace(SMALL_JSIS, branches=branches, regularisation=5.5e-5)
    assert tuple(losses(config, small_categories, images, targets)) == terms
    kinds = {name.split(".")[0] for name, _ in build(config, small_categories).named_parameters()}
    assert kinds == {"backbone", *(("semantic",) if branches == "semantic" else ("regions", "head"))}


def test_losses_of_proposals_by_hand() -> None:
    """Two images of two anchors: one positive and one negative; and no thing at all."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    pairs = torch.tensor([[[0.2, 0.7], [1.0, -1.0]], [[0.0, 0.5], [0.3, 0.1]]])  # background, thing
    deltas = torch.tensor([[[0.1, 0.0, 3.0, 0.0], [9.0, 9.0, 9.0, 9.0]]]).repeat(2, 1, 1)
    truth = [torch.tensor([[0.0, 0.0, 10.0, 8.0]]), torch.zeros(0, 4)]
    found = region_losses([pairs[:, :, 1] - pairs[:, :, 0]], [deltas], [anchors], truth, REGIONS)
    entropy = F.cross_entropy(pairs.view(-1, 2), torch.tensor([1, 0, 0, 0]), reduction="none")
    assert found[0].item() == pytest.approx(float(entropy[:2].sum() / 2 + entropy[2:].sum() / 2) / 2, rel=1e-6)
    # the truth's centre lies 1 of 10 higher, its height is 0.8; smooth L1 is a parabola below 1
    wanted = torch.tensor([0.0, -0.1, 0.0, float(np.log(0.8))])
    error = (deltas[0, 0] - wanted).abs()
    smooth = torch.where(error < 1, error**2 / 2, error - 0.5).sum()
    assert found[1].item() == pytest.approx(float(smooth / 2) / 2, rel=1e-5)


def test_mask_losses_are_added_up_or_averaged_over_images(small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories, (1, 2, 3))
    summed, mean = (
        losses(replace(SMALL_JSIS, mask_reduction=how), small_categories, images, targets) for how in ("sum", "mean")
    )
    assert summed["mask"] == pytest.approx(3 * mean["mask"])
    assert {**summed, "mask": 0} == pytest.approx({**mean, "mask": 0})


def test_regularisation_sees_kernels_only_and_is_weight_decay(small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories)
    config, updated = SMALL[JSISNetConfig]["last_stage"], []
    model = build(config, small_categories)
    kernels = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and module.weight.requires_grad
    ]
    expected = sum(float(kernel.detach().double().square().sum()) for kernel in kernels) / 2
    assert float(model(images, targets)[0]["regularisation"]) == pytest.approx(5.5e-5 * expected, rel=1e-5)
    for regularisation, decay in ((0.5, 0.0), (0.0, 0.5)):
        model = build(replace(config, regularisation=regularisation), small_categories)
        optimiser = build_optimiser(model, Optim(optimiser="sgd", lr=0.01, weight_decay=decay))
        torch.manual_seed(1)
        sum(model(images, targets)[0].values()).backward()
        optimiser.step()
        updated.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(*updated, atol=1e-6)


def many(categories: Categories, height: int = 160, width: int = 192) -> Segmentation:
    """300 things of 8 x 8 pixels on stuff, and one of a single pixel."""
    segments = np.ones((height, width), np.int32)
    for k in range(300):
        row, column = divmod(k, 20)
        segments[10 * row + 1 : 10 * row + 9, 9 * column + 1 : 9 * column + 9] = k + 2
    segments[0, 0] = 302
    labels = [categories.stuff[0], *(categories.things[k % len(categories.things)] for k in range(301))]
    return Segmentation(segments, np.array(labels, np.int64))


@pytest.mark.parametrize("name", ["own_stage", "last_stage", "crop", "instances"])
@pytest.mark.parametrize("append", [True, False])
def test_three_hundred_objects(name: str, append: bool, small_categories) -> None:
    config = SMALL[JSISNetConfig][name]
    config = replace(config, detection=replace(config.detection, append_truth=append))
    model = build(config, small_categories).train()
    samples = [
        Sample(np.random.default_rng(k).integers(0, 256, (160, 192, 3), np.uint8), many(small_categories), "many")
        for k in range(2)
    ]
    images, targets = collate(samples, model.divisor)
    terms, maps = model(images, targets, segment=True)
    total = sum(terms.values())
    assert torch.isfinite(total) and maps
    total.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
    if append:
        learning = [p for p in model.head.parameters() if p.requires_grad]
        assert terms["mask"] > 0 and terms["box"] > 0 and all(p.grad.abs().sum() > 0 for p in learning)


def test_without_a_thing_the_masks_cost_nothing_and_keep_their_gradients(small_categories) -> None:
    segments = np.ones((64, 64), np.int32)
    samples = [
        Sample(np.zeros((64, 64, 3), np.uint8), Segmentation(segments, np.array([small_categories.stuff[0]])), "")
    ]
    model = build(SMALL_JSIS, small_categories).train()
    terms, _ = model(*collate(samples * 2, model.divisor))
    assert terms["mask"] == 0 and terms["region"] == 0 and terms["box"] == 0 and terms["objectness"] > 0
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_proposals_that_all_vanish_leave_the_whole_image(small_categories, random_segmentation) -> None:
    config = replace(SMALL_JSIS, regions=replace(SMALL_JSIS.regions, least_side=10_000.0))
    images, targets = batch(random_segmentation, small_categories)
    model = build(config, small_categories).train()
    terms, maps = model(images, targets, segment=True)
    sum(terms.values()).backward()
    assert maps and all(p.grad is not None for p in model.parameters())
    frame = Frame((64, 96), torch.tensor([[64, 96], [32, 48]]), torch.tensor([[128, 192], [32, 48]]))
    assert [p.tolist() for p in model.postprocess(model.network(images), frame, ["proposals"]).proposals] == [
        [[0, 0, 192, 128]],
        [[0, 0, 48, 32]],
    ]


def test_proposals_come_in_pixels_of_the_output(small_categories, random_segmentation) -> None:
    images, _ = batch(random_segmentation, small_categories)
    model = build(SMALL_JSIS, small_categories).eval()
    sizes = torch.tensor([[64, 96], [64, 96]])
    with torch.no_grad():
        outputs = model.network(images)
        same, larger = (
            model.postprocess(outputs, Frame((64, 96), sizes, sizes * factor), ["proposals"]).proposals
            for factor in (1, 3)
        )
    assert same is not None and larger is not None
    assert all(0 < len(part) <= SMALL_JSIS.regions.test_after for part in same)
    assert all(torch.allclose(3 * a, b) for a, b in zip(same, larger, strict=True))
    semantic = build(replace(SMALL_JSIS, branches="semantic"), small_categories)
    assert semantic.postprocess(semantic.network(images), Frame.full(images), ["proposals"]).proposals is None


def test_two_logits_count_by_their_difference(small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories)
    model = build(SMALL_JSIS, small_categories).eval()
    with torch.no_grad():
        outputs = model.network(images)
        moved = outputs | {"objectness": outputs["objectness"] + 3.0}
        turned = outputs | {"objectness": outputs["objectness"] + torch.tensor([1.0, -1.0]).repeat(9).view(-1, 1, 1)}
        found = []
        for given in (outputs, moved, turned):
            torch.manual_seed(0)
            found.append(float(model.loss(given, targets)["objectness"]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[2], rel=1e-3)


def given(outputs: dict[str, Tensor], scores: list[float], background: list[float]) -> dict[str, Tensor]:
    """Outputs with instances side by side, 8 pixels wide, of the first thing."""
    rows = [[8.0 * k, 0.0, 8.0 * k + 8, 16.0, score, 0.0] for k, score in enumerate(scores)]
    empty = [0.0, 0.0, 1.0, 1.0, 0.9, float(IGNORE)]
    return outputs | {
        "detections": torch.tensor([[*rows, empty]] * len(outputs["features"])),
        "masks": torch.ones(len(outputs["features"]), len(rows) + 1, 28, 28),
        "background": torch.tensor([[*background, 0.0]] * len(outputs["features"])),
    }


def test_maps_and_instances_have_thresholds_of_their_own(small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories)
    config = replace(SMALL_JSIS, detection=replace(SMALL_JSIS.detection, threshold=0.4))
    model = build(config, small_categories).eval()
    with torch.no_grad():
        outputs = given(model.network(images), [0.9, 0.45, 0.42, 0.4, 0.2], [0.0, 0.44, 0.46, 0.0, 0.0])
    kinds = [
        m.labels.tolist().count(small_categories.things[0]) for m in model.postprocess(outputs, targets.frame).maps
    ]
    assert kinds == [2, 2]  # the third one is more probably background, the fourth one no better than the threshold
    assert [len(found.labels) for found in model.postprocess(outputs, targets.frame, ["instances"]).instances] == [5, 5]
    model = build(replace(config, background_wins=False), small_categories).eval()
    kinds = [
        m.labels.tolist().count(small_categories.things[0]) for m in model.postprocess(outputs, targets.frame).maps
    ]
    assert kinds == [3, 3]


def test_the_head_outlines_detections_that_came_without_masks(small_categories, random_segmentation) -> None:
    images, targets = batch(random_segmentation, small_categories)
    model = build(SMALL_JSIS, small_categories).eval()
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
        true = model.truth(targets, outputs)
        masks = model.instance_branch.masks(outputs, true["detections"])
        instances = model.postprocess(outputs | {"detections": true["detections"]}, targets.frame, ["instances"])
    assert masks.shape == true["masks"].shape
    there = true["detections"][:, :, 5] != IGNORE
    assert (masks[there] > 0).all() and (masks[~there] == 0).all()
    assert [len(part.labels) for part in instances.instances] == there.sum(1).tolist()


@pytest.mark.parametrize("branches", ["both", "semantic"])
def test_weights_of_a_published_backbone_fill_what_is_left_of_it(branches, small_categories) -> None:
    published = Backbone("resnet18").build()
    state = {**published.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    config = replace(SMALL[JSISNetConfig]["last_stage"], branches=branches, backbone=Backbone("resnet18"))
    model = build(config, small_categories)
    load_weights(model.get_submodule("backbone"), state)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert ("layer4.0.conv1.weight" in model.backbone.state_dict()) == (branches == "both")


def test_options_that_contradict_each_other_are_named(small_categories) -> None:
    with pytest.raises(ValueError, match="shared_level: the ResNet's last stage follows res4, not res3"):
        JSISNetConfig(shared_level="res3").build(small_categories)
    with pytest.raises(ValueError, match="shared_level: res4 needs one of our ResNets"):
        replace(SMALL_JSIS, backbone=Backbone("vgg16")).build(small_categories)
    with pytest.raises(
        ValueError, match=r"head\.width: 0 takes a ResNet's last stage, and efficientnet_lite0 is timm's"
    ):
        JSISNetConfig(Backbone("efficientnet_lite0")).build(small_categories)
    stuff = Categories(("sky",), (False,), (1,), ((0, 0, 0),))
    with pytest.raises(ValueError, match="branches: there is no thing"):
        SMALL_JSIS.build(stuff)
    assert replace(SMALL_JSIS, branches="semantic").build(stuff).background == 0


def test_any_backbone_serves_whole(small_categories) -> None:
    config = replace(
        SMALL_JSIS, shared_level="res5", backbone=Backbone("vgg16"), head=StageOptions(width=8, blocks=1, side=2)
    )
    model = build(config, small_categories).eval()
    with torch.no_grad():
        outputs = model.network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert outputs["features"].shape == (1, 512, 2, 2)


def test_a_model_of_timm_shares_a_level_before_its_last(small_categories, random_segmentation) -> None:
    backbone = Backbone("efficientnet_lite0", output_stride=8)
    model = build(replace(SMALL_JSIS, shared_level="res4", backbone=backbone), small_categories)
    assert model.stride == 8 and model.backbone.channels["res4"] == 112 and "res5" not in model.backbone.channels
    terms, _ = model(*batch(random_segmentation, small_categories))
    assert terms is not None
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
