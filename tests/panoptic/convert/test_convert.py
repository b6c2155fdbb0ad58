"""Published key lists through `convert`, and files that must be read safely or refused."""

from __future__ import annotations

import argparse
import ast
import io
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from panoptic.backbones import Backbone
from panoptic.convert import convert, convert_backbone, read_checkpoint
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.models.panoptic_fpn.config import CAFFE2
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.segmentation import Categories


def categories(count: int) -> Categories:
    return Categories.from_coco([{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(count)])


def published(shared, name: str) -> dict[str, torch.Tensor]:
    """A state dict of the published shapes that takes no memory."""
    lines = shared(f"specs/keys/{name}.txt").read_text().splitlines()
    shapes = {key: ast.literal_eval(shape) for key, shape in (line.split("\t")[:2] for line in lines)}
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "source", "classes", "entries", "parameters", "expected"),
    [
        (
            "panoptic_deeplab_A_r50_os32_cityscapes",
            "panoptic-deeplab",
            19,
            530,
            55_308_870,
            dict(flavour="standalone", low_level=("res4", "res3", "res2"), rates=(3, 6, 9), dropout=0.5),
        ),
        (
            "panoptic_deeplab_A_r50_os16_base",
            "panoptic-deeplab",
            19,
            494,
            54_997_926,
            dict(low_level=("res3", "res2"), rates=(6, 12, 18), instance_head_channels=128),
        ),
        (
            "panoptic_deeplab_B_r52_dsconv_cityscapes",
            "detectron2",
            19,
            544,
            30_271_350,
            dict(flavour="detectron2", separable=True, aspp_separable=True, centre_separable=False, sigma=10),
        ),
        (
            "panoptic_deeplab_B_r52_cityscapes",
            "detectron2",
            19,
            508,
            59_770_166,
            dict(separable=False, aspp_separable=False, image_pool=(512, 1024), rescale_offset=False),
        ),
        (
            "panoptic_deeplab_B_r52_dsconv_coco",
            "detectron2",
            133,
            544,
            30_300_648,
            dict(divisor=640, image_pool=(640, 640), nms_kernel=41, stuff_area=4096, sigma=8, top_k_fraction=1.0),
        ),
    ],
)
def test_published_models(shared, name, source, classes, entries, parameters, expected) -> None:
    state = published(shared, name)
    config, weights = convert(state, source, categories(classes))
    assert len(state) == len(weights) == entries
    assert isinstance(config, PanopticDeepLabConfig)
    assert {field: getattr(config, field) for field in expected} == expected
    with torch.device("meta"):
        model = config.build(categories(classes))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def kinds(things: int, stuff: int) -> Categories:
    entries = [{"id": i, "name": f"class {i}", "isthing": i < things} for i in range(things + stuff)]
    return Categories.from_coco(entries)


@pytest.fixture
def fpn(shared) -> dict[str, torch.Tensor]:
    return published(shared, "panoptic_fpn_r50_coco")


def test_panoptic_fpn(fpn) -> None:
    config, weights = convert(fpn, "detectron2", kinds(80, 53))
    assert config == PanopticFPNConfig()
    with torch.device("meta"):
        model = config.build(kinds(80, 53))
    assert len(fpn) == 330 and sum(p.numel() for p in model.parameters()) == 45_973_990
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    deeper = dict(fpn)
    for block in range(6, 23):
        for key, value in fpn.items():
            if key.startswith("backbone.bottom_up.res4.5."):
                deeper[key.replace("res4.5.", f"res4.{block}.")] = value
    config, weights = convert(deeper, "detectron2", kinds(80, 53))
    assert config == PanopticFPNConfig(backbone=replace(CAFFE2, name="resnet101"))


def test_panoptic_fpn_of_other_sizes_and_ages(fpn) -> None:
    heads = {
        "roi_heads.box_predictor.cls_score.weight": (9, 1024),
        "roi_heads.box_predictor.cls_score.bias": (9,),
        "roi_heads.box_predictor.bbox_pred.weight": (32, 1024),
        "roi_heads.box_predictor.bbox_pred.bias": (32,),
        "roi_heads.mask_head.predictor.weight": (8, 256, 1, 1),
        "roi_heads.mask_head.predictor.bias": (8,),
        "sem_seg_head.predictor.weight": (12, 128, 1, 1),
        "sem_seg_head.predictor.bias": (12,),
    }
    old = {key: value for key, value in fpn.items() if not key.endswith((".running_mean", ".running_var"))}
    old |= {key: torch.zeros(()).expand(shape) for key, shape in heads.items()}
    old |= {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    old |= {f"proposal_generator.anchor_generator.cell_anchors.{k}": torch.zeros(3, 4) for k in range(5)}
    config, weights = convert(old, "detectron2", kinds(8, 11))
    assert config == PanopticFPNConfig()
    assert weights["backbone.layer3.2.bn1.running_var"].eq(1).all()  # not 1 - eps, as a fresh norm has
    assert config.build(kinds(8, 11)).load_state_dict(weights).missing_keys == []


def test_panoptic_fpn_of_other_backbones(fpn) -> None:
    """Whose fork read red, green, blue, and which backbones stride where."""
    rest = {key: value for key, value in fpn.items() if not key.startswith("backbone.bottom_up.")}
    for name, stride, bgr in (
        ("res2net50_v1b_26w_4s", True, False),
        ("res2net50_26w_4s", False, False),
        ("resnet50_double3x3", True, True),
        ("vgg16_bn", False, True),
    ):
        norms = {} if name == "vgg16" else {"norm": "frozen"}
        backbone = Backbone(name, **norms).build()
        state = {f"backbone.bottom_up.{key}": value for key, value in backbone.state_dict().items()}
        lateral = {
            f"backbone.fpn_lateral{k}.weight": torch.zeros(256, backbone.channels[f"res{k}"], 1, 1) for k in range(2, 6)
        }
        config, _ = convert({**rest, **state, **lateral}, "detectron2", kinds(80, 53))
        options = config.backbone
        assert (options.name, options.stride_in_1x1, options.freeze, options.norm) == (name, stride, 2, "frozen")
        assert (config.bgr, config.pixel_mean[0]) == (bgr, 103.53 if bgr else 123.675)


def test_panoptic_fpn_refuses_what_it_does_not_know(fpn) -> None:
    with pytest.raises(ValueError, match="80 thing and 53 stuff classes, the list has 8 and 11"):
        convert(fpn, "detectron2", kinds(8, 11))
    with pytest.raises(ValueError, match=r"not known to have: roi_heads\.box_head\.0\.fc1\.weight"):
        convert({**fpn, "roi_heads.box_head.0.fc1.weight": torch.zeros(1)}, "detectron2", kinds(80, 53))
    lacking = {key: value for key, value in fpn.items() if key != "sem_seg_head.p4.2.weight"}
    with pytest.raises(ValueError, match=r"missing .*semantic\.branches\.p4\.1\.conv\.weight"):
        convert(lacking, "detectron2", kinds(80, 53))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet50", 23_508_032), ("resnet101", 42_500_160), ("vgg16", 14_714_688), ("vgg16_bn", 14_723_136)],
)
def test_torchvision_backbones(shared, name: str, parameters: int) -> None:
    config, weights = convert_backbone(published(shared, f"torchvision_{name}"))
    assert config == Backbone(name)
    assert not any(key.startswith(("fc.", "classifier.")) for key in weights)
    assert sum(v.numel() for k, v in weights.items() if not k.endswith(("_mean", "_var", "_tracked"))) == parameters


@pytest.fixture
def state(shared) -> dict[str, torch.Tensor]:
    return published(shared, "panoptic_deeplab_A_r50_os32_cityscapes")


def test_every_key_is_accounted_for(state) -> None:
    extra = {**state, "decoder.semantic_decoder.mystery.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"decoder\.semantic_decoder\.mystery\.weight"):
        convert(extra, "panoptic-deeplab", categories(19))
    # a name that only looks right: one block more than ResNet-50 has
    extra = {**state, "backbone.layer1.0.conv4.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown: backbone\.layer1\.0\.conv4\.weight"):
        convert(extra, "panoptic-deeplab", categories(19))
    lacking = {k: v for k, v in state.items() if k != "decoder.instance_head.classifier.center.1.bias"}
    with pytest.raises(ValueError, match=r"missing .*centre_head\.predictor\.bias"):
        convert(lacking, "panoptic-deeplab", categories(19))
    misshapen = {**state, "decoder.instance_head.classifier.center.1.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"center\.1\.bias \[3\] instead of \[1\]"):
        convert(misshapen, "panoptic-deeplab", categories(19))


def test_other_mistakes_are_named(state) -> None:
    with pytest.raises(ValueError, match="19 classes, the list has 7"):
        convert(state, "panoptic-deeplab", categories(7))
    with pytest.raises(ValueError, match="no architecture of detectron2 has keys like these: backbone"):
        convert(state, "detectron2", categories(19))
    with pytest.raises(ValueError, match="'keras' is not one of"):
        convert(state, "keras", categories(19))


def test_prefix_of_distributed_training_and_absent_counters(state) -> None:
    wrapped = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    config, weights = convert(wrapped, "panoptic-deeplab", categories(19))
    assert replace(config, dropout=0.0).build(categories(19)).load_state_dict(weights).missing_keys == []


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.num_batches_tracked": torch.tensor(3)}


def check(read: dict[str, torch.Tensor]) -> None:
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[key], value) for key, value in WEIGHTS.items())


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("tensors", [True, False])
def test_pickled_weights_are_read(protocol: int, tensors: bool) -> None:
    weights = WEIGHTS if tensors else {key: value.numpy() for key, value in WEIGHTS.items()}
    record = {"model": weights, "__author__": "somebody", "args": argparse.Namespace(lr=0.1), "matching": {1, 2}}
    check(read_checkpoint(io.BytesIO(pickle.dumps(record, protocol=protocol))))


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("wrapper", ["state_dict", None])
def test_torch_files_are_read(archive: bool, wrapper: str | None) -> None:
    file = io.BytesIO()
    extra = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "history": np.ones(3)}
    torch.save({wrapper: WEIGHTS, **extra} if wrapper else WEIGHTS, file, _use_new_zipfile_serialization=archive)
    file.seek(0)
    check(read_checkpoint(file))


def test_safetensors_are_read() -> None:
    data = safetensors.torch.save(WEIGHTS, {"format": "pt"})
    check(read_checkpoint(io.BytesIO(data)))
    with pytest.raises(ValueError, match="cut short or broken"):
        read_checkpoint(io.BytesIO(data[:-3]), "model.safetensors")


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "archive", "legacy"])
def test_a_file_cannot_execute_anything(tmp_path, form: str) -> None:
    trap = str(tmp_path / "executed")
    record = {"model": {"a.weight": np.ones(2)}, "extra": Malicious(trap)}
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump(record, file)
    else:
        torch.save(record, file, _use_new_zipfile_serialization=form == "archive")
    file.seek(0)
    with pytest.raises(ValueError, match=r"weights\.pkl: refused.*mkdir"):
        read_checkpoint(file, "weights.pkl")
    assert not os.path.exists(trap)
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap does work where nobody stops it
    assert os.path.exists(trap)


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open"])
def test_builtins_that_act_are_refused(name: str) -> None:
    program = f"cbuiltins\n{name}\n(S'1'\ntR.".encode()
    with pytest.raises(ValueError, match=f"refused.*{name}"):
        read_checkpoint(io.BytesIO(program))


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK no archive", b"\x80\x04cut"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"photo\.jpg"):
        read_checkpoint(io.BytesIO(content), "photo.jpg")


@pytest.mark.parametrize("record", [[1, 2], {}, {"model": {"a": "text", "b": np.array([None])}}])
def test_files_without_weights_are_refused(record) -> None:
    with pytest.raises(ValueError, match=r"holds no weights|no arrays: a, b"):
        read_checkpoint(io.BytesIO(pickle.dumps(record)))
