"""Published weights in the pipeline: they fit the presets of their names, and jobs take them as checkpoints."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from panoptic.classes import classes
from panoptic.convert import FAMILIES, convert, hub
from pipelines.config import Train
from pipelines.evaluation.evaluate import identify
from pipelines.presets import PRESETS
from pipelines.presets.listing import listing
from pipelines.training.checkpoints import checkpoint_file
from pipelines.training.driver import check_places
from tests.support.stored import write_model

NAMED = sorted(hub.PUBLISHED.keys() & PRESETS.keys())


def test_most_names_are_presets() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize("name", NAMED)
def test_a_name_that_is_a_preset_has_its_architecture_and_view(name: str) -> None:
    published, preset = hub.PUBLISHED[name], PRESETS[name]()
    architecture = type(preset.model).__name__.removesuffix("Config").lower()
    modules = {family.recognise.__module__.rsplit(".", 1)[-1] for family in FAMILIES[published.source]}
    modules = {
        getattr(family.rename, "func", family.rename).__module__ for family in FAMILIES[published.source]
    } | modules
    assert architecture in {module.rsplit(".", 1)[-1].replace("_", "") for module in modules}
    assert published.resize == preset.resize


FILES = {
    "mask2former-r50-coco": "mask2former_r50_original",
    "maskformer-r50-coco": "maskformer_r50_original",
    "detr-r50-coco": "detr_panoptic_original",
    "panoptic-fpn-r50-coco": "panoptic_fpn_r50_coco",
    "panoptic-fcn-star-r50-coco": "panoptic_fcn_star_r50_coco",
    "panoptic-deeplab-r52-coco": "panoptic_deeplab_B_r52_dsconv_coco",
    "panoptic-deeplab-r50-cityscapes": "panoptic_deeplab_A_r50_os32_cityscapes",
}
"""Names and shapes of the published files."""


@pytest.mark.parametrize("name", FILES)
def test_the_preset_of_a_name_takes_its_weights(shared, name: str) -> None:
    """All but the class layer, which fine-tuning makes anew; DETR's has 250 logits of which 133 mean something."""
    state = {}
    for line in shared(f"specs/keys/{FILES[name]}.txt").read_text().splitlines():
        if match := re.match(r"(\S+)\s+(\([^)]*\))", line):
            state[match[1]] = torch.zeros(()).expand(ast.literal_eval(match[2]))
    if "criterion.empty_weight" in state:
        state["criterion.empty_weight"] = torch.tensor([1.0] * (len(state["criterion.empty_weight"]) - 1) + [0.1])
    published, model = hub.PUBLISHED[name], PRESETS[name]().model
    _, weights = convert(state, published.source, classes(published.classes))
    with torch.device("meta"):
        own = replace(model, backbone=replace(model.backbone, weights="none")).build(classes(published.classes))
    differing = {key for key, value in own.state_dict().items() if weights.pop(key).shape != value.shape}
    assert not weights and {key.split(".")[0] for key in differing} <= {"class_head"}
    assert bool(differing) == name.startswith("detr")


def test_the_list_has_them() -> None:
    text = listing(PRESETS)
    for name in hub.PUBLISHED:
        assert f"hub:{name} " in text


def test_a_name_stands_where_a_checkpoint_does(monkeypatch, tmp_path: Path, small_categories) -> None:
    folder = write_model(tmp_path / "step", small_categories)
    monkeypatch.setattr(hub, "find", lambda name: Path(folder) / "checkpoint.pt")
    assert checkpoint_file("hub:tiny") == f"{folder}/checkpoint.pt"
    fixed, identity = identify("hub:tiny")
    assert fixed == "hub:tiny" and identity.startswith("sha256:")


def test_a_name_that_is_none_is_refused_before_anything_starts() -> None:
    from pipelines.config import override
    from pipelines.presets.panoptic_deeplab import demo
    from pipelines.training.preflight import check_weights

    with pytest.raises(ValueError, match=r"train\.weights hub:detr-r50: no such name; near: detr-r50-coco"):
        check_weights(override(demo(), {"train.weights": "hub:detr-r50"}))


def test_a_name_is_no_path_that_machines_must_share(monkeypatch) -> None:
    from pipelines.config import override
    from pipelines.presets.panoptic_deeplab import demo
    from pipelines.training import driver

    told: dict[str, str] = {}
    monkeypatch.setattr(driver, "check_shared", lambda read, written: told.update(read))
    check_places(override(demo(), {"train.weights": "hub:detr-r50-coco"}))
    assert told["--train.weights"] == "" and Train().weights == ""
