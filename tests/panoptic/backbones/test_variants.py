"""Res2Net, VGG, the doubled and the deformable ResNet: keys, numbers, strides, freezing, files.

References: torchvision's VGG and ResNet with the same weights, and the published lists of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.backbones.res2net import RES2NETS
from panoptic.backbones.resnet import DEPTHS
from panoptic.backbones.swin import SWINS
from panoptic.backbones.vgg import VGGS
from panoptic.backbones.weights import load_weights
from panoptic.convert.backbones import backbone_config
from panoptic.layers.norm import FrozenBatchNorm

SMALL_IMAGE = (1, 3, 70, 102)

KEY_LISTS = {
    "resnet50": "torchvision_resnet50",
    "resnet101": "torchvision_resnet101",
    "vgg16": "torchvision_vgg16",
    "vgg16_bn": "torchvision_vgg16_bn",
    "res2net50_26w_4s": "res2net50_26w_4s",
    "res2net101_26w_4s": "res2net101_26w_4s",
    "res2net50_v1b_26w_4s": "res2net50_v1b_26w_4s",
    "swin_tiny": "swin_t_original",
}


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights and statistics that differ from layer to layer and keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.dtype == torch.float32:
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if value.dim() == 1 else (noise - 0.5) * (3 / value[0].numel()) ** 0.5)


def images(*shape: int) -> Tensor:
    return torch.rand(shape or SMALL_IMAGE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", KEY_LISTS)
def test_keys_and_shapes_are_the_published_ones(name: str, shared: Callable[[str], Path]) -> None:
    published = {}
    for line in shared(f"specs/keys/{KEY_LISTS[name]}.txt").read_text().splitlines():
        key, shape = line.replace("\t", " ").split(" ", 1)
        published[key] = tuple(int(n) for n in shape.strip("() ").split(",") if n.strip())
    heads = ("fc.", "classifier.")
    wanted = {k: s for k, s in published.items() if not k.startswith(heads) and "relative_position_index" not in k}
    with torch.device("meta"):
        own = Backbone(name).build().state_dict()
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


def test_parameters_are_as_many_as_published() -> None:
    counts = {
        "resnet50": 23_508_032,
        "resnet101": 42_500_160,
        "resnet50_double3x3": 23_508_032 + 11_324_800,
        "vgg16": 14_714_688,
        "res2net50_26w_4s": 25_699_120 - 2_049_000,
        "res2net50_v1b_26w_4s": 25_718_352 - 2_049_000,
        "res2net101_26w_4s": 45_206_688 - 2_049_000,
    }
    with torch.device("meta"):
        parameters = {name: sum(p.numel() for p in Backbone(name).build().parameters()) for name in counts}
    assert parameters == counts


@pytest.mark.parametrize(
    ("name", "first"), [("vgg16", 2), ("vgg16_bn", 2), ("res2net50_26w_4s", 4), ("res2net50_v1b_26w_4s", 4)]
)
def test_channels_and_strides_are_those_of_the_features(name: str, first: int) -> None:
    backbone = Backbone(name).build().eval()
    assert backbone.strides == {"stem": first, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
    with torch.no_grad():
        features = backbone(images(1, 3, 64, 96))
    assert list(features) == list(STEM_AND_STAGES)
    for stage, feature in features.items():
        stride = backbone.strides[stage]
        assert feature.shape == (1, backbone.channels[stage], 64 // stride, 96 // stride)


# VGG


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_equals_torchvision_after_each_pool(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).features
    theirs = theirs.to_empty(device="cpu").eval()
    fill(theirs)
    ours = Backbone(name).build().eval()
    head = {"classifier.6.bias": torch.zeros(1000)}
    assert load_weights(ours, {**{f"features.{k}": v for k, v in theirs.state_dict().items()}, **head}) == []
    with torch.no_grad():
        features, y, pooled = ours(images()), images(), []
        for layer in theirs:
            y = layer(y)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(y)
    assert all(torch.equal(a, b) for a, b in zip(features.values(), pooled, strict=True))


# Res2Net


def plain_res2net_block(block: nn.Module, x: Tensor, stride: int, first: bool) -> Tensor:
    """The published block, written out group by group."""
    y = torch.relu(block.bn1(block.conv1(x)))
    w = y.shape[1] // 4
    x1, x2, x3, x4 = y[:, :w], y[:, w : 2 * w], y[:, 2 * w : 3 * w], y[:, 3 * w :]
    k = [lambda z, i=i: torch.relu(block.bns[i](block.convs[i](z))) for i in range(3)]
    if first:
        parts = [k[0](x1), k[1](x2), k[2](x3), torch.nn.functional.avg_pool2d(x4, 3, stride, 1)]
    else:
        y1 = k[0](x1)
        y2 = k[1](x2 + y1)
        parts = [y1, y2, k[2](x3 + y2), x4]
    shortcut = x if block.downsample is None else block.downsample(x)
    return torch.relu(block.bn3(block.conv3(torch.cat(parts, 1))) + shortcut)


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50_v1b_26w_4s"])
def test_res2net_blocks_follow_their_definition(name: str) -> None:
    backbone = Backbone(name).build().eval()
    fill(backbone)
    x = images()
    with torch.no_grad():
        features = backbone(x)
        y = features["stem"]
        for index, stage in enumerate(STEM_AND_STAGES[1:]):
            for i, block in enumerate(backbone.get_submodule(f"layer{index + 1}")):
                y = plain_res2net_block(block, y, 1 if index == 0 or i else 2, i == 0)
            torch.testing.assert_close(features[stage], y)
    assert backbone.layer1[0].convs[0].weight.shape == (26, 26, 3, 3)
    if "v1b" in name:
        assert backbone.layer2[0].downsample[0].ceil_mode and not backbone.layer2[0].downsample[0].count_include_pad


def test_res2net_as_its_detectron2_fork() -> None:
    backbone = Backbone("res2net50_v1b_26w_4s", stride_in_1x1=True).build().eval()
    for layer in (backbone.layer2, backbone.layer3, backbone.layer4):
        assert layer[0].conv1.stride == (2, 2) and all(conv.stride == (1, 1) for conv in layer[0].convs)
    block = backbone.layer2[0]
    fill(backbone)
    with torch.no_grad():
        x = images(1, 256, 9, 11)
        y = torch.relu(block.bn1(block.conv1(x)))
        groups = torch.split(y, 52, 1)
        parts = [torch.relu(n(c(g))) for n, c, g in zip(block.bns, block.convs, groups[:3], strict=True)]
        expected = torch.relu(block.bn3(block.conv3(torch.cat([*parts, groups[3]], 1))) + block.downsample(x))
        torch.testing.assert_close(block(x), expected)


def fork_name(key: str) -> str:
    """The key that the detectron2 fork of Res2Net v1b gives to ours, written down independently."""
    head, *rest = key.split(".")
    if head in ("conv1", "bn1"):
        return f"stem.{key}"
    stage = f"res{int(head[-1]) + 1}.{rest[0]}"
    if rest[1] == "downsample":
        return f"{stage}.shortcut.1.{'norm.' if rest[2] == '2' else ''}{rest[3]}"
    if rest[1] in ("bn1", "bn3"):
        return f"{stage}.conv{rest[1][-1]}.norm.{rest[2]}"
    return ".".join([stage, *rest[1:]])


def test_the_fork_and_the_published_names_load() -> None:
    source = Backbone("res2net50_v1b_26w_4s").build()
    fill(source, 3)
    state = source.state_dict()
    fork = {f"backbone.bottom_up.{fork_name(k)}": v for k, v in state.items() if not k.endswith("_tracked")}
    for form in (fork, {**state, "fc.weight": torch.zeros(1)}):
        target = Backbone("res2net50_v1b_26w_4s", norm="frozen").build()
        load_weights(target, form)
        assert all(torch.equal(v, state[k]) for k, v in target.state_dict().items() if not k.endswith("_tracked"))
    with pytest.raises(ValueError, match=r"unknown.*conv1.0.weight"):
        load_weights(Backbone("res2net50_26w_4s").build(), state)


@pytest.mark.parametrize("stride", [8, 16])
def test_res2net_trades_stride_for_dilation(stride: int) -> None:
    backbone = Backbone("res2net50_26w_4s", output_stride=stride).build().eval()
    with torch.no_grad():
        features = backbone(images(1, 3, 64, 96))
    assert features["res5"].shape[2:] == (64 // stride, 96 // stride)
    assert backbone.layer4[1].convs[0].dilation == ((2, 2) if stride == 16 else (4, 4))


# ResNet: a second 3x3, deformable 3x3


def test_a_doubled_resnet_loads_an_ordinary_one() -> None:
    ordinary = Backbone("resnet50").build()
    fill(ordinary)
    doubled = Backbone("resnet50_double3x3", norm="frozen").build().eval()
    fresh = load_weights(doubled, ordinary.state_dict())
    assert {key.split(".")[2] for key in fresh} == {"conv2b", "bn2b"} and len(fresh) == 16 * (1 + 4)
    assert all(torch.equal(v, ordinary.state_dict()[k]) for k, v in doubled.state_dict().items() if "2b" not in k)
    assert load_weights(doubled, doubled.state_dict()) == []
    for block in doubled.modules():  # an identity after the first 3x3 leaves the ordinary network
        if getattr(block, "conv2b", None) is not None:
            nn.init.dirac_(block.conv2b.weight)
    with torch.no_grad():
        expected, features = ordinary.eval()(images()), doubled(images())
    assert all(torch.allclose(expected[k], features[k], rtol=1e-4, atol=1e-5) for k in expected)
    broken = {k: v for k, v in doubled.state_dict().items() if k != "layer1.0.conv2b.weight"}
    with pytest.raises(ValueError, match=r"missing: \['layer1.0.conv2b.weight'\]"):
        load_weights(doubled, broken)


def test_the_second_3x3_keeps_size_and_dilation() -> None:
    backbone = Backbone("resnet50_double3x3", output_stride=16).build()
    assert backbone.layer2[0].conv2.stride == (2, 2) and backbone.layer2[0].conv2b.stride == (1, 1)
    assert backbone.layer4[1].conv2b.dilation == backbone.layer4[1].conv2.dilation == (2, 2)


@pytest.mark.parametrize("stride", [32, 16])
def test_deformable_without_offsets_is_the_plain_network(stride: int) -> None:
    plain = Backbone("resnet50", output_stride=stride).build().eval()
    fill(plain)
    first = replace(Backbone("resnet50", output_stride=stride), deformable="v1").build().eval()
    fresh = load_weights(first, plain.state_dict())
    assert {key.split(".")[2] for key in fresh} == {"conv2_offset"} and len(fresh) == (4 + 6 + 3) * 2
    assert not any(key.startswith("layer1.") for key in fresh)
    with torch.no_grad():
        expected, features = plain(images()), first(images())
    assert all(torch.allclose(expected[k], features[k], rtol=1e-4, atol=1e-5) for k in expected)


def test_a_deformable_convolution_samples_at_its_offsets() -> None:
    """Whole-pixel offsets are a shifted image; v2 starts at half of the plain convolution and learns its weights."""
    block = Backbone("resnet50", deformable="v2", deformable_stages=("res4",)).build().layer3[1]
    x = images(2, 256, 7, 9)
    plain = nn.functional.conv2d(x, block.conv2.weight, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(block.conv2(x, block.conv2_offset(x)), plain / 2)
        offsets = torch.zeros(2, 27, 7, 9)
        offsets[:, 0:18:2] = 1  # dy of each tap
        offsets[:, 18:] = 50  # sigmoid: 1
        sampled = block.conv2(x, offsets)
    torch.testing.assert_close(sampled[:, :, :-2], plain[:, :, 1:-1])
    block.conv2(x, block.conv2_offset(x)).square().mean().backward()
    assert block.conv2_offset.weight.grad[18:].abs().sum() > 0 and block.conv2_offset.weight.grad[:18].abs().sum() > 0


def test_deformable_layers_run_in_half_precision() -> None:
    block = Backbone("resnet50", deformable="v2").build().layer4[1]
    with torch.autocast("cpu", torch.bfloat16):
        y = block(images(1, 2048, 4, 4))
    y.float().mean().backward()
    assert torch.isfinite(y).all() and block.conv2_offset.weight.grad is not None


# All of them


@pytest.mark.parametrize("freeze", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "backbone",
    [
        Backbone("vgg16"),
        Backbone("vgg16_bn"),
        Backbone("res2net50_26w_4s"),
        Backbone("res2net50_v1b_26w_4s", norm="group"),
        Backbone("resnet50_double3x3"),
        Backbone("resnet50", deformable="v2"),
        Backbone("swin_tiny"),
    ],
    ids=lambda backbone: backbone.name + backbone.deformable.replace("none", ""),
)
def test_frozen_stages_neither_learn_nor_count(backbone: Backbone, freeze: int) -> None:
    module = replace(backbone, freeze=freeze).build().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    features = module(images(2, 3, 32, 32))
    names = ["stem", "res2", "res3", "res4", "res5"]
    for stage in names[:freeze]:
        assert stage not in features or not features[stage].requires_grad
    owned = [name for stage in module.stage_names()[:freeze] for name in stage]
    inside = tuple(f"{name}." for name in owned)
    assert all(p.requires_grad != k.startswith(inside) for k, p in module.named_parameters()) if inside else True
    if freeze < 5:
        sum(f.square().mean() for f in features.values() if f.requires_grad).backward()
        learning = {k: p for k, p in module.named_parameters() if p.requires_grad}
        assert {k for k, p in learning.items() if p.grad is None} == set()
    after = module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith(inside)) if inside else True
    assert any(isinstance(m, FrozenBatchNorm) for m in module.modules()) == (
        freeze > 0 and any("running_mean" in k for k in before)
    )


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone("vgg16", output_stride=16), "backbone.output_stride: vgg16 does not have this option"),
        (Backbone("vgg16", norm="group"), "backbone.norm"),
        (Backbone("swin_tiny", norm="frozen"), "backbone.norm"),
        (Backbone("resnet50", drop_path=0.1), "backbone.drop_path.*swin_tiny"),
        (Backbone("res2net50_26w_4s", stem="deeplab"), "backbone.stem"),
        (Backbone("res2net50_26w_4s", deformable="v1"), "backbone.deformable"),
        (Backbone("resnet18", deformable="v1"), "no bottlenecks"),
        (Backbone("resnet50", deformable="v1", deformable_stages=("layer2",)), "deformable_stages"),
    ],
)
def test_options_of_other_backbones_are_refused(backbone: Backbone, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone.build()


# Caffe2's files


def caffe2_name(key: str) -> str:
    """Caffe2's name of a ResNet weight, written down independently of `backbone_key`."""
    head, *rest = key.split(".")
    leaves = {"weight": "s", "bias": "b"}
    if head == "conv1":
        return "conv1_w"
    if head == "bn1":
        return f"res_conv1_bn_{leaves[rest[0]]}"
    block, part, leaf = rest[0], rest[1], rest[-1]
    branch = "1" if part == "downsample" else "2" + "abc"[int(part[-1]) - 1]
    norm = part.startswith("bn") or (part == "downsample" and rest[2] == "1")
    return f"res{int(head[-1]) + 1}_{block}_branch{branch}_{'bn_' + leaves[leaf] if norm else 'w'}"


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_caffe2_files_load_where_they_may(name: str) -> None:
    with torch.device("meta"):
        keys = [k for k in Backbone(name).build().state_dict() if not k.endswith(("_tracked", "_mean", "_var"))]
    target = Backbone(name, stride_in_1x1=True, norm="frozen", freeze=2).build()
    own = target.state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {caffe2_name(k): torch.rand(own[k].shape, generator=generator) for k in keys}
    state |= {"fc1000_w": torch.zeros(1000, 2048), "fc1000_b": torch.zeros(1000), "conv1_b": torch.zeros(64)}
    assert load_weights(target, state) == []
    loaded = target.state_dict()
    assert all(torch.equal(loaded[k], state[caffe2_name(k)]) for k in keys)
    assert all((v == 0).all() for k, v in loaded.items() if k.endswith("running_mean"))
    assert all((v == 1).all() for k, v in loaded.items() if k.endswith("running_var"))
    group = {k.replace("_bn_", "_gn_"): v for k, v in state.items()}
    assert load_weights(Backbone(name, norm="group").build(), group) == []
    with pytest.raises(ValueError, match=r"backbone\.norm group"):
        load_weights(target, group)
    with pytest.raises(ValueError, match="stride_in_1x1"):
        load_weights(Backbone(name, norm="frozen").build(), state)
    with pytest.raises(ValueError, match=r"missing: .*layer1.0.conv1.weight"):
        load_weights(target, {k: v for k, v in state.items() if k != "res2_0_branch2a_w"})


@pytest.mark.parametrize(
    "backbone",
    [
        *(Backbone(name) for name in (*DEPTHS, *RES2NETS, *SWINS, *VGGS)),
        Backbone("resnet101", stem="deeplab", deformable="v2", deformable_stages=("res5",)),
        Backbone("resnet50", deformable="v1"),
    ],
    ids=lambda backbone: f"{backbone.name}-{backbone.deformable}",
)
def test_weights_tell_their_backbone(backbone: Backbone) -> None:
    with torch.device("meta"):
        assert backbone_config(backbone.build().state_dict()) == backbone


def test_weights_of_no_known_backbone_are_refused() -> None:
    with torch.device("meta"):
        resnet, swin = (Backbone(name).build().state_dict() for name in ("resnet50", "swin_tiny"))
    for state, part in ((resnet, "layer3.5."), (swin, "layers.2.blocks.5.")):
        with pytest.raises(ValueError, match="is none of"):
            backbone_config({key: value for key, value in state.items() if not key.startswith(part)})
