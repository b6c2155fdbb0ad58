"""DETR where sets are empty or too large, its options, and its two stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.models.detr.loss import match
from panoptic.models.detr.targets import box_targets
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.freezing import freeze_parameters, training_mode
from panoptic.training.optim import Optim, parameter_groups
from pipelines.presets.detr import DETECTOR
from tests.support.small import SMALL_DETR


def sample(truth: Segmentation, seed: int = 0) -> Sample:
    image = np.random.default_rng(seed).integers(0, 256, (*truth.size, 3), np.uint8)
    return Sample(image, truth, f"photo {seed}.jpg")


def grid(count: int, categories: Categories) -> Segmentation:
    """`count` things of one pixel and more, on stuff."""
    segments = np.ones((64, 64), np.int32)
    for k in range(count):
        segments[4 * (k // 16) : 4 * (k // 16) + 2, 4 * (k % 16) : 4 * (k % 16) + 1 + k % 3] = k + 2
    return Segmentation(segments, np.array([categories.stuff[0]] + [categories.things[0]] * count))


def test_more_segments_than_queries(small_categories) -> None:
    model = replace(SMALL_DETR, queries=5).build(small_categories)
    truth = grid(60, small_categories)
    images, targets = collate([sample(truth)])
    losses, _ = model(images, targets)
    assert torch.isfinite(sum(losses.values()))
    outputs = model.eval().network(images, targets.frame)
    true = box_targets(targets)
    matches = match(outputs["logits"], outputs["boxes"], targets, true, model.classes, model.loss_weights)
    assert true.present.sum() == 61 and sorted(matches.queries.tolist()) == [0, 1, 2, 3, 4]
    (segmentation,) = model.postprocess({**outputs, **model.truth(targets, outputs)}, targets.frame).maps
    assert len(segmentation.labels) == 5


def test_masks_of_chosen_queries_are_those_of_all(small_categories) -> None:
    model = SMALL_DETR.build(small_categories).eval()
    images, targets = collate([sample(grid(3, small_categories), k) for k in (1, 2)])
    with torch.no_grad():
        outputs = model.network(images, targets.frame)
        every = model.query_masks(outputs, targets.frame, 1, torch.arange(12))
        some = model.query_masks(outputs, targets.frame, 1, torch.tensor([7, 2]))
        none = model.query_masks(outputs, targets.frame, 1, torch.arange(0))
    assert every.shape == (12, 16, 16) and len(none) == 0
    torch.testing.assert_close(some, every[[7, 2]], atol=1e-5, rtol=1e-4)


def test_learning_rates_of_the_paper(small_categories) -> None:
    model = SMALL_DETR.build(small_categories)
    groups = parameter_groups(model, Optim(lr=1e-4, backbone_lr=0.1, weight_decay=1e-4, decay="all"))
    factors = {group["lr_factor"]: sum(p.numel() for p in group["params"]) for group in groups}
    backbone = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("backbone.") and p.requires_grad
    )
    assert factors[0.1] == backbone and len(factors) == 2
    early = [p for name, p in model.named_parameters() if name.startswith(("backbone.conv1", "backbone.layer1"))]
    assert early and not any(p.requires_grad for p in early)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 30}, "channels: 30 is no multiple"),
        ({"mask_channels": 40}, "mask_channels: 40"),
        ({"logits": 3}, "3 cannot stand for 5 classes"),
    ],
)
def test_contradictions_are_named(change, message, small_categories) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL_DETR, **change).build(small_categories)


def test_the_second_stage_trains_the_mask_head_alone(small_categories) -> None:
    model = SMALL_DETR.build(small_categories)
    freeze_parameters(model, DETECTOR)
    training_mode(model, frozen_dropout=True)
    assert model.encoder.layers[0].dropout.training
    losses, _ = model(*collate([sample(grid(3, small_categories))]))
    sum(losses.values()).backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"mask_attention", "mask_head"}
    assert losses.keys() >= {"class", "box", "giou", "mask", "dice"}
