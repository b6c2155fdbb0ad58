"""Fine-tuning on other classes: what a model knew of a class it still knows under the same name, whatever it is."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories
from panoptic.training import checkpoint
from panoptic.training.transfer import load_for_finetune
from tests.support.small import SMALL

CHOSEN = {
    *("EoMT-dinov2", "MaskFormer-pyramid", "Mask2Former-deformable", "PanopticFPN-group_norm"),
    *("EfficientPS-group_norm", "PanopticFCN-plain", "PanopticFCN-summed_all_classes", "JSISNet-own_stage"),
    *("DETR-panoptic", "PanopticDeepLab-detectron2"),
}
"""Every architecture, and what lays out its class layers in another way."""

VARIANTS = {
    name: variant
    for config, variants in SMALL.items()
    for kind, variant in variants.items()
    if (name := f"{config.__name__.removesuffix('Config')}-{kind}") in CHOSEN
}
VARIANTS["DETR-published"] = replace(VARIANTS["DETR-panoptic"], logits=30)


def test_every_architecture_is_among_them() -> None:
    assert {name.split("-")[0] for name in CHOSEN} == {config.__name__.removesuffix("Config") for config in SMALL}
    assert VARIANTS.keys() > CHOSEN


def classes(*names: str) -> Categories:
    """Names in capitals are things."""
    entries = [{"id": 3 * i + 1, "name": name, "isthing": int(name[0].isupper())} for i, name in enumerate(names)]
    return Categories.from_coco(entries)


BEFORE = classes("Person", "sky", "Car", "road", "Dog", "tree")


def trained(config: Any, categories: Categories) -> dict[str, Any]:
    """The checkpoint of a model whose class layers are no longer alike."""
    torch.manual_seed(3)
    model = config.build(categories)
    with torch.no_grad():
        for layer, rows in model.class_rows(model.state_dict()).items():
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[0] == layer:
                    # without ties, which the order of the classes would decide: FCN's features are in the thousands
                    parameter.normal_(0, 0.002 if "FCN" in type(model).__name__ else 0.5)
                    if name.endswith("bias") and rows[-1][0] == "nothing":
                        parameter[-1] = -20
    if hasattr(model, "classes"):  # DETR's logits are ids of categories
        model.classes.index.copy_(torch.tensor(categories.ids) if config.logits else model.classes.index)
    file = io.BytesIO()
    checkpoint.save(file, config=config, model=model)
    file.seek(0)
    return checkpoint.load(file)


def seen(model: PanopticModel) -> np.ndarray:
    """The class of each pixel of a drawn image by its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96), np.uint8)
    with torch.no_grad():
        _, maps = model.eval()(torch.from_numpy(pixels), segment=True)
    assert maps is not None
    names = np.array(["void", *model.categories.names])
    return np.char.lower(names[1 + maps[0].semantic()])


@pytest.mark.parametrize("name", VARIANTS)
def test_classes_in_another_order_are_the_same_model(name: str) -> None:
    record = trained(VARIANTS[name], BEFORE)
    expected = seen(checkpoint.build_model(record))
    model = replace(VARIANTS[name], **({"logits": 0} if "DETR" in name else {})).build(
        classes("tree", "Dog", "sky", "Person", "road", "Car")
    )
    loaded = load_for_finetune(model, record)
    assert set(loaded.fresh) <= {"classes.index"} and len(loaded.classes) == 6
    np.testing.assert_array_equal(seen(model), expected)
    assert (expected != "void").any()


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_other_classes_are_fresh(name: str) -> None:
    """ "cat" is new, "road" is a thing there and stuff here, "Person" is written in another way."""
    record = trained(VARIANTS[name], classes("PERSON", "sky", "Road", "tree", "Dog"))
    torch.manual_seed(4)
    model = replace(VARIANTS[name], **({"logits": 0} if "DETR" in name else {})).build(
        classes("Cat", "road", "Person", "sky")
    )
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = load_for_finetune(model, record)
    assert loaded.classes == ("Person", "sky")
    known, kept = {2, 3}, 0
    for layer, rows in model.class_rows(model.state_dict()).items():
        key = f"{layer}.bias"
        if key not in fresh:  # a branch that this variant has not got
            continue
        assert key in loaded.fresh or not any(label in (0, 1) for label, _ in rows)
        now, before = model.state_dict()[key], fresh[key]
        for number, (label, _) in enumerate(rows):
            if isinstance(label, int) and label not in known:
                assert now[number] == before[number], (layer, label)
            else:
                assert now[number] != before[number] and now[number] in record["weights"][key], (layer, label)
                kept += 1
    assert kept


def test_the_log_says_what_was_kept() -> None:
    record = trained(VARIANTS["EoMT-dinov2"], BEFORE)
    loaded = load_for_finetune(VARIANTS["EoMT-dinov2"].build(classes("Person", "Cat")), record)
    assert loaded.tell("hub:x", 2) == (
        "starting from hub:x; 1 of 2 classes keep their rows (Person); of other classes or not in it, so fresh: "
        "class_head.bias, class_head.weight"
    )
