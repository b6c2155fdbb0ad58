"""Panoptic FCN's published key lists through `convert`, and variants of them that were published without a list."""

from __future__ import annotations

import ast
import re

import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.convert import convert, reference_keys
from panoptic.models.panoptic_fcn.model import PanopticFCNConfig
from panoptic.segmentation import Categories


def categories(things: int, stuff: int) -> Categories:
    entries = [{"id": k, "name": f"class {k}", "isthing": int(k >= stuff)} for k in range(things + stuff)]
    return Categories.from_coco(entries)


COCO = categories(80, 53)


def published(shared, name: str) -> dict[str, torch.Tensor]:
    """A state dict of the published shapes that takes no memory."""
    lines = shared(f"specs/keys/{name}.txt").read_text().splitlines()
    shapes = {key: ast.literal_eval(shape) for key, shape in (line.split("\t")[:2] for line in lines)}
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.fixture
def state(shared) -> dict[str, torch.Tensor]:
    return published(shared, "panoptic_fcn_r50_coco")


def loads(config: PanopticFCNConfig, weights: dict[str, torch.Tensor], classes: Categories) -> None:
    with torch.device("meta"):
        own = config.build(classes).state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    assert own.keys() - counters == weights.keys() - counters
    assert all(own[key].shape == weights[key].shape for key in weights)


@pytest.mark.parametrize(
    ("name", "entries", "expected"),
    [
        ("panoptic_fcn_r50_coco", 346, PanopticFCNConfig()),
        ("panoptic_fcn_star_r50_coco", 352, PanopticFCNConfig(encoder_deform=True, encoder_channels=256)),
    ],
)
def test_published_models(shared, name: str, entries: int, expected: PanopticFCNConfig) -> None:
    state = published(shared, name)
    config, weights = convert(state, "panopticfcn", COCO)
    assert config == expected and len(state) == entries
    assert len({*reference_keys(state, "panopticfcn").values()}) == entries
    loads(config, weights, COCO)


def test_deeper_and_deformable_backbones(state) -> None:
    deep = dict(state)
    for key, value in state.items():
        if match := re.fullmatch(r"(backbone\.bottom_up\.res4\.)5(\..*)", key):
            deep |= {f"{match[1]}{block}{match[2]}": value for block in range(6, 23)}
    config, weights = convert(deep, "panopticfcn", COCO)
    assert config.backbone == Backbone("resnet101", stride_in_1x1=True, norm="frozen", freeze=2)
    loads(config, weights, COCO)
    for key in list(deep):
        if match := re.fullmatch(r"(backbone\.bottom_up\.res([345])\.\d+\.)conv2\.weight", key):
            width = deep[key].shape[1]
            deep[f"{match[1]}conv2_offset.weight"] = torch.zeros(()).expand(18, width, 3, 3)
            deep[f"{match[1]}conv2_offset.bias"] = torch.zeros(18)
    config, weights = convert(deep, "panopticfcn", COCO)
    assert config.backbone.deformable == "v1" and config.backbone.deformable_stages == ("res3", "res4", "res5")
    loads(config, weights, COCO)


def test_ablations_are_read_off_the_weights(state) -> None:
    """Plain convolutions without coordinates, two in each head, an encoder of 16 channels, the feature p2."""
    state = {key: value for key, value in state.items() if not key.startswith("semantic_fpn.")}
    for key, value in list(state.items()):
        if "_head_3." in key and key.startswith(("position_head", "kernel_head")):
            del state[key]
        elif key.startswith("position_head.position_head."):
            del state[key]
            if "dcnv2" in key:
                state[key.replace("dcnv2.", "")] = value
        elif key.endswith("kernel_head_head_1.weight"):
            state[key] = value[:, :256]
        elif key.startswith("feature_encoder.") and key.endswith("weight"):
            state[key] = value[:16, : 256 if "head_1" in key else 16]
        elif key.startswith("feature_encoder.") or "embed_extractor" in key:
            state[key] = value[:16]
    config, weights = convert(state, "panopticfcn", COCO)
    assert config == PanopticFCNConfig(
        feature="p2",
        head_convs=2,
        position_deform=False,
        kernel_coordinates=False,
        encoder_channels=16,
        encoder_coordinates=False,
    )
    loads(config, weights, COCO)


@pytest.mark.parametrize(("regions", "count"), [("all", 19), ("with_things", 12), ("stuff", 11)])
def test_cityscapes(state, regions: str, count: int) -> None:
    for part in ("weight", "bias"):
        state[f"position_head.out_inst.{part}"] = state[f"position_head.out_inst.{part}"][:8]
        state[f"position_head.out_sem.{part}"] = state[f"position_head.out_sem.{part}"][:count]
    config, weights = convert(state, "panopticfcn", categories(8, 11))
    assert config.regions == regions and config.mask_weight == (4.0 if regions == "all" else 3.0)
    loads(config, weights, categories(8, 11))


def test_every_key_is_accounted_for(state) -> None:
    for extra in ("position_head.position_head.position_head_head_1.weight", "kernel_head.mystery", "pixel_mean"):
        with pytest.raises(ValueError, match=re.escape(extra)):
            convert({**state, extra: torch.zeros(1)}, "panopticfcn", COCO)
    for lacking, ours in (
        ("backbone.top_block.p7.bias", "pyramid.strided.p7.bias"),
        ("semantic_fpn.p5.4.norm.bias", "semantic.branches.p5.2.norm.bias"),
        ("thing_generator.embed_extractor.weight", "thing_embed.weight"),
    ):
        with pytest.raises(ValueError, match=re.escape(ours)):
            convert({key: value for key, value in state.items() if key != lacking}, "panopticfcn", COCO)
    misshapen = {**state, "kernel_head.out_conv.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"kernel_head\.out_conv\.bias \[3\] instead of \[256\]"):
        convert(misshapen, "panopticfcn", COCO)


def test_other_classes_are_named(state) -> None:
    with pytest.raises(ValueError, match="80 thing classes, the list has 7"):
        convert(state, "panopticfcn", categories(7, 53))
    with pytest.raises(ValueError, match="region head has 54 classes; the list has 9 of stuff and 89 in all"):
        convert(state, "panopticfcn", categories(80, 9))
