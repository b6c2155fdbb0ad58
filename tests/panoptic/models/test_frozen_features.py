"""Features of a frozen backbone that were computed before take its place: same losses, same gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.segmentation import Sample, collate
from panoptic.training.frozen_backbone import backbone_digest, learning_parameters, refuse_changing
from tests.support.small import PLAIN_VIT, SMALL, SMALL_DEEPLAB, SMALL_FPN, SMALL_JSIS, VITS

CONVOLUTIONAL = [pytest.param(next(iter(SMALL[kind].values())), id=kind.__name__) for kind in VITS]
CASES = [
    *CONVOLUTIONAL,
    *(pytest.param(VITS[kind], id=f"{kind.__name__}-vit") for kind in (type(SMALL_DEEPLAB), type(SMALL_JSIS))),
    pytest.param(replace(SMALL_JSIS, trunks="separate"), id="separate"),
]


def frozen(config):
    return replace(config, backbone=replace(config.backbone, freeze=5))


@pytest.mark.parametrize("config", CASES)
def test_losses_and_gradients_are_those_of_the_images(config, small_categories, random_segmentation) -> None:
    torch.manual_seed(0)
    model = frozen(config).build(small_categories).train()
    assert not learning_parameters(model)
    rng = np.random.default_rng(0)
    truths = [random_segmentation(np.random.default_rng(k), 65, 97, small_categories) for k in (1, 2)]
    images = [rng.integers(0, 256, (65, 97, 3), np.uint8) for _ in truths]
    samples = [Sample(image, truth, f"{k}") for k, (image, truth) in enumerate(zip(images, truths, strict=True))]
    batch, targets = collate(samples, model.divisor)
    with torch.no_grad():
        maps = model.frozen_features(model.normalised(batch, targets.frame))
    black = [
        replace(s, image=np.zeros_like(s.image), features={name: m[k].numpy() for name, m in maps.items()})
        for k, s in enumerate(samples)
    ]
    found = []
    for pixels, told in ((batch, targets), collate(black, model.divisor)):
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        losses, _ = model(pixels, told)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append(({name: loss.item() for name, loss in losses.items()}, gradients))
    (losses, gradients), (again, same) = found
    assert losses == again
    assert gradients.keys() == same.keys() and all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert model.given is None


def test_the_digest_is_that_of_all_that_features_follow_from(small_categories) -> None:
    def digest(config, change=None) -> str:
        torch.manual_seed(0)
        model = config.build(small_categories)
        if change:
            change(model)
        return backbone_digest(model)

    def scale(name: str):
        return lambda model: model.get_parameter(name).data.mul_(2)

    config = frozen(SMALL_FPN)
    own = digest(config)
    assert digest(config) == digest(config, scale("classifier.weight")) == own
    others = [
        digest(config, scale("backbone.conv1.weight")),
        digest(replace(config, pixel_mean=(1.0, 2.0, 3.0))),
        digest(replace(config, bgr=not config.bgr)),
        digest(replace(config, divisor=64)),
        digest(replace(frozen(SMALL_DEEPLAB), backbone=Backbone("resnet18", norm="group", freeze=5))),
    ]
    assert len({own, *others}) == 1 + len(others)
    vit = frozen(replace(SMALL_FPN, backbone=PLAIN_VIT))
    assert digest(vit) == digest(vit, scale("backbone.simfp_2.0.weight"))  # it learns
    assert digest(vit) != digest(vit, scale("backbone.body.blocks.0.attn.qkv.weight"))


def test_backbones_that_change_are_told(small_categories) -> None:
    assert learning_parameters(replace(SMALL_FPN, backbone=Backbone("resnet18", freeze=4)).build(small_categories))
    followed = replace(SMALL_FPN, backbone=Backbone("resnet18")).build(small_categories).requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"statistics of backbone\.bn1 follow every batch.*--model\.backbone\.freeze 5"
    ):
        refuse_changing(followed, dropout=False)
    refuse_changing(frozen(SMALL_FPN).build(small_categories), dropout=True)
    model = frozen(replace(SMALL_FPN, backbone=PLAIN_VIT)).build(small_categories)
    model.get_submodule("backbone.body.pos_drop").p = 0.1  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"backbone\.body\.pos_drop drops something else in every step"):
        refuse_changing(model, dropout=True)
    refuse_changing(model, dropout=False)
