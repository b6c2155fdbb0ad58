"""Freezing, weights of other projects, and timm's pyramids behind one config."""

from __future__ import annotations

import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.backbones.timm import TimmBackbone
from panoptic.backbones.weights import backbone_key, load_weights
from panoptic.layers.norm import FrozenBatchNorm


@pytest.mark.parametrize("freeze", range(6))
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_frozen_stages_do_not_move(name: str, freeze: int) -> None:
    backbone = Backbone(name, freeze=freeze).build().train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features = backbone(torch.rand(2, 3, 64, 64))
    total = sum(f.square().mean() for f in features.values())
    learning = [p for p in backbone.parameters() if p.requires_grad]
    assert bool(learning) == (freeze < 5)
    if learning:
        total.backward()
        torch.optim.SGD(learning, 0.1).step()
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    if freeze == 5:
        assert not moved
    if name == "resnet18":
        owners = {"conv1": "stem", "bn1": "stem", **{f"layer{i}": f"res{i + 1}" for i in range(1, 5)}}
        assert {owners[key.split(".")[0]] for key in moved} == set(STEM_AND_STAGES[freeze:])
        assert {owners[k.split(".")[0]] for k, m in backbone.named_modules() if isinstance(m, FrozenBatchNorm)} == set(
            STEM_AND_STAGES[:freeze]
        )
    for stage in STEM_AND_STAGES[:freeze]:
        assert stage not in features or features[stage].requires_grad is False  # convnext has no stem of its own


def test_a_frozen_norm_computes_what_the_batch_norm_did() -> None:
    free = Backbone("resnet18").build()
    frozen = Backbone("resnet18", freeze=5).build()
    free.train()(torch.rand(4, 3, 64, 64))  # statistics worth keeping
    frozen.load_state_dict(free.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, features = free.eval()(x), frozen.train()(x)
    assert all(torch.allclose(expected[k], features[k], atol=1e-6) for k in expected)


def detectron2_name(key: str) -> str:
    """torchvision's name of a ResNet weight as detectron2's, written down independently of `backbone_key`."""
    head, *rest = key.split(".")
    if head in ("conv1", "bn1"):
        return f"stem.conv1.{'norm.' if head == 'bn1' else ''}{rest[0]}"
    stage = f"res{int(head[-1]) + 1}.{rest[0]}"
    if rest[1] == "downsample":
        return f"{stage}.shortcut.{'norm.' if rest[2] == '1' else ''}{rest[3]}"
    norm = "norm." if rest[1].startswith("bn") else ""
    return f"{stage}.conv{rest[1][-1]}.{norm}{rest[2]}"


def test_weights_are_recognised_by_their_keys() -> None:
    source = Backbone("resnet18").build()
    state = source.state_dict()
    torchvision_form = {**state, "fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)}
    detectron2_form = {
        f"backbone.bottom_up.{detectron2_name(k)}": v for k, v in state.items() if not k.endswith("_tracked")
    }
    for form in (torchvision_form, detectron2_form, {f"module.{k}": v for k, v in state.items()}):
        target = Backbone("resnet18", freeze=2).build()
        load_weights(target, form)
        assert all(torch.equal(target.state_dict()[k], v) for k, v in state.items())
    assert {backbone_key(detectron2_name(k)) for k in state} == set(state)


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    state = Backbone("resnet18").build().state_dict()
    target = Backbone("resnet18").build()
    with pytest.raises(ValueError, match=r"missing: \['layer1.0.conv1.weight'\]"):
        load_weights(target, {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"})
    with pytest.raises(ValueError, match=r"unknown: \['layer9.weight'\]"):
        load_weights(target, {**state, "layer9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"bn1.bias \(3,\) instead of \(64,\)"):
        load_weights(target, {**state, "bn1.bias": torch.zeros(3)})


@pytest.mark.parametrize("name", ["resnet18d", "mobilenetv3_small_050", "regnety_002", "convnext_atto"])
def test_timm_pyramids(name: str) -> None:
    backbone = Backbone(name).build().eval()
    assert isinstance(backbone, TimmBackbone)
    assert [backbone.strides[s] for s in STEM_AND_STAGES[1:]] == [4, 8, 16, 32]
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 96))
    for stage in STEM_AND_STAGES[1:]:
        stride = backbone.strides[stage]
        assert features[stage].shape == (1, backbone.channels[stage], 64 // stride, 96 // stride)


def test_timm_output_stride_and_weights() -> None:
    import timm

    whole = timm.create_model("resnet18", pretrained=False)
    backbone = TimmBackbone("resnet18", output_stride=16)
    assert backbone.strides["res5"] == 16
    load_weights(backbone, whole.state_dict())
    assert torch.equal(backbone.body.get_submodule("layer4.1.conv2").weight, whole.layer4[1].conv2.weight)
    flattened = timm.create_model("convnext_atto", pretrained=False)
    backbone = TimmBackbone("convnext_atto")
    load_weights(backbone, flattened.state_dict())
    loaded = backbone.state_dict()["body.stages_1.blocks.0.conv_dw.weight"]
    assert torch.equal(loaded, flattened.state_dict()["stages.1.blocks.0.conv_dw.weight"])


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("efficientnet_lite0", "res4"),
        ("regnety_002", "res3"),
        ("convnext_atto", "res4"),
        ("mobilenetv3_small_050", "res3"),
    ],
)
def test_a_timm_pyramid_ends_with_the_last_level_that_is_wanted(name: str, last: str) -> None:
    """The same features as of the whole, from its weights, with no stage beyond; and it freezes as a whole."""
    x = torch.rand(1, 3, 64, 96)
    whole, part = Backbone(name).build().eval(), Backbone(name).build((last,)).eval()
    assert isinstance(whole, TimmBackbone) and isinstance(part, TimmBackbone)
    assert list(part.channels)[-1] == last and list(part.channels) == list(whole.channels)[: len(part.channels)]
    load_weights(part, whole.body.state_dict())
    with torch.no_grad():
        features, expected = part(x), whole(x)
    assert list(features) == list(part.channels)
    assert all(torch.equal(value, expected[level]) for level, value in features.items())
    # every parameter serves the last level: none is computed in vain, and workers wait for no gradient
    part(x)[last].sum().backward()
    assert all(parameter.grad is not None for parameter in part.parameters())
    stages = [part.stage_of(key) for key, _ in part.named_parameters()]
    assert stages == sorted(stages) and stages[-1] == STEM_AND_STAGES.index(last)
    frozen = Backbone(name, freeze=STEM_AND_STAGES.index(last) + 1).build((last,))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    learning = Backbone(name, freeze=STEM_AND_STAGES.index(last)).build((last,))
    assert {learning.stage_of(key) for key, parameter in learning.named_parameters() if parameter.requires_grad} == {
        STEM_AND_STAGES.index(last)
    }


def test_weights_from_timm_fill_our_resnet(monkeypatch) -> None:
    import timm

    create, asked = timm.create_model, []

    def offline(name: str, pretrained: bool) -> torch.nn.Module:
        asked.append((name, pretrained))
        return whole

    whole = create("resnet18", pretrained=False)
    monkeypatch.setattr(timm, "create_model", offline)
    backbone = Backbone("resnet18", weights="timm", freeze=1).build()
    assert asked == [("resnet18.tv_in1k", True)]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in backbone.state_dict().items())
    with pytest.raises(ValueError, match="check backbone"):
        Backbone("resnet18", weights="timm", stem="deeplab").build()
    with pytest.raises(ValueError, match=r"stride in the 3x3: set backbone\.stride_in_1x1 false"):
        Backbone("resnet50", weights="timm", stride_in_1x1=True).build()


def test_the_weights_that_timm_is_asked_for_are_published() -> None:
    import timm

    from panoptic.backbones.build import TIMM_NAMES

    assert all(name in timm.list_pretrained(f"{name}*") for name in TIMM_NAMES.values() if "." in name)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone("resnet52"), "cannot build 'resnet52'"),
        (Backbone("vit_tiny_patch16_224", output_stride=16), "set it to 32"),
        (Backbone("vit_tiny_patch16_224", norm="group"), "backbone.norm"),
        (Backbone("resnet18", freeze=6), "not within 0..5"),
        (Backbone("convnext_atto", stem="deeplab"), "backbone.stem"),
        (Backbone("convnext_atto", norm="group"), "backbone.norm"),
    ],
)
def test_mistakes_are_named(backbone: Backbone, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone.build()
