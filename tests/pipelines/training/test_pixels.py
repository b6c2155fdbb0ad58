"""Pixels follow the weights of the backbone unless they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import Experiment, override, parse
from pipelines.presets import PRESETS
from pipelines.training.pixels import follow_weights
from pipelines.tuning.trial_config import apply

IMAGENET = {"model.backbone.name": "tf_efficientnet_lite0", "model.backbone.weights": "imagenet"}
LITE = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
TORCHVISION = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.fixture(autouse=True)
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the extra `trunks`, which a machine may lack; nothing is read here."""
    monkeypatch.setattr("panoptic.backbones.imagenet.packaged", lambda name: Path("x") if "lite" in name else None)


def words(changes: dict[str, Any]) -> list[str]:
    return [f"--{path.replace('_', '-')}={value}" for path, value in changes.items()]


def pixels(experiment: Experiment) -> tuple[Any, Any]:
    return experiment.model.pixel_mean, experiment.model.pixel_std


def test_without_weights_nothing_changes() -> None:
    _, experiment = parse(["panoptic-fpn-r50-coco"], PRESETS)
    assert follow_weights(experiment) == (experiment, "")


@pytest.mark.parametrize("preset", ["mask2former-pedestrians", "panoptic-fpn-r50-coco", "demo"])
def test_pixels_of_the_weights_are_taken(preset: str) -> None:
    experiment, line = follow_weights(parse([preset, *words(IMAGENET)], PRESETS)[1])
    assert pixels(experiment) == LITE
    assert not getattr(experiment.model, "bgr", False)
    assert (
        line == "pixels: mean 127 127 127, deviation 128 128 128, RGB, with which the backbone's weights were trained"
    )
    assert follow_weights(experiment) == (experiment, "")


def test_the_usual_pixels_are_said_by_nobody() -> None:
    """timm's torchvision weights go with the default of most models."""
    _, experiment = parse(["mask2former-r50-coco", "--model.backbone.weights=imagenet"], PRESETS)
    assert pixels(experiment) == TORCHVISION
    assert follow_weights(experiment) == (experiment, "")


def test_given_pixels_stay_and_are_said() -> None:
    arguments = ["panoptic-fpn-r50-coco", *words(IMAGENET), "--model.pixel-std", "2", "2", "2"]
    _, given = parse(arguments, PRESETS)
    experiment, line = follow_weights(given)
    assert experiment == given and experiment.model.backbone.own_pixels
    assert line.startswith(
        "pixels: mean 103.53 116.28 123.675, deviation 2 2 2, BGR, as given; the weights were trained"
    )


def test_a_trial_of_a_sweep_follows_its_own_weights() -> None:
    _, base = parse(["panoptic-fpn-r50-coco"], PRESETS)
    assert pixels(follow_weights(apply(base, IMAGENET)[0])[0]) == LITE
    kept = apply(base, {**IMAGENET, "model.bgr": True})[0]
    assert follow_weights(kept)[0] == kept
    _, typed = parse(["panoptic-fpn-r50-coco", "--model.bgr=False"], PRESETS)
    assert pixels(follow_weights(apply(typed, IMAGENET)[0])[0]) == pixels(typed)


def test_weights_for_bgr_images_and_a_model_of_rgb_images(tmp_path: Path) -> None:
    file = tmp_path / "R-50.pth"
    torch.save({"res2_0_branch2a_bn_s": torch.zeros(1), "conv1_w": torch.zeros(1)}, file)
    _, detr = parse(["detr-r50-coco"], PRESETS)
    caffe = override(detr, {"model.backbone.weights": str(file)})
    with pytest.raises(ValueError, match=r"R-50\.pth: they were trained on BGR images, .*own-pixels True"):
        follow_weights(caffe)
    kept = replace(caffe.model, backbone=replace(caffe.model.backbone, own_pixels=True))  # type: ignore[type-var]
    assert "as given" in follow_weights(replace(caffe, model=kept))[1]
    _, rgb = parse(["panoptic-fpn-scenes", f"--model.backbone.weights={file}"], PRESETS)
    assert pixels(follow_weights(rgb)[0]) == ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
    assert follow_weights(rgb)[0].model.bgr  # type: ignore[union-attr]
