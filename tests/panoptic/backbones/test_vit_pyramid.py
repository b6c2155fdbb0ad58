"""Plain ViTs of timm under the simple feature pyramid."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn

from panoptic.backbones import Backbone, vit_pyramid
from panoptic.backbones.stages import STAGES, stage_of
from panoptic.backbones.vit_pyramid import ViTPyramid, pyramid_level, pyramid_name, vit_options
from panoptic.backbones.weights import load_weights
from panoptic.models.panoptic_fpn.model import PanopticFPNConfig
from panoptic.segmentation import Categories
from panoptic.training.optim import Optim, parameter_groups

TINY = "test_vit"
TWO = Categories(("thing", "stuff"), (True, False), (1, 2), ((220, 20, 60), (70, 130, 180)))


def test_the_pyramid_gives_detectron2s_numbers(shared, monkeypatch) -> None:
    path = shared("fixtures/eomt/units.npz")
    spec = importlib.util.spec_from_file_location("eomt_rules", path.parent / "rules.py")
    assert spec is not None and spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(arrays["__meta__"].tobytes())
    monkeypatch.setattr(vit_pyramid, "WIDTH", meta["sfp"]["out"])
    levels = torch.nn.ModuleDict(
        {pyramid_name(level): pyramid_level(level, meta["sfp"]["channels"]) for level in STAGES}
    )
    assert {key: list(value.shape) for key, value in levels.state_dict().items()} == meta["sfp"]["keys"]
    values = {key: rules.fill_value(key, tuple(shape), meta["seed"]) for key, shape in meta["sfp"]["keys"].items()}
    levels.load_state_dict({key: torch.from_numpy(value) for key, value in values.items()})
    with torch.no_grad():
        for level in STAGES:
            made = levels[pyramid_name(level)](torch.from_numpy(arrays["sfp_in"]))
            np.testing.assert_allclose(made.numpy(), arrays[f"sfp_{level.replace('res', 'p')}"], atol=1e-5)
        coarsest = torch.nn.functional.max_pool2d(levels["simfp_5"](torch.from_numpy(arrays["sfp_in"])), 1, 2)
    np.testing.assert_allclose(coarsest.numpy(), arrays["sfp_p6"], atol=1e-5)


def test_patches_and_positions_are_resampled_as_published(shared) -> None:
    with np.load(shared("fixtures/eomt/units.npz")) as file:
        arrays = dict(file)
    patch = resample_patch_embed(torch.from_numpy(arrays["patch"]), [16, 16])
    np.testing.assert_allclose(patch.numpy(), arrays["patch_16"], atol=1e-4)
    for rows, columns in ((10, 10), (5, 9)):
        positions = resample_abs_pos_embed(
            torch.from_numpy(arrays["pos"]), [rows, columns], old_size=[6, 6], num_prefix_tokens=0
        )
        np.testing.assert_allclose(positions.numpy(), arrays[f"pos_{rows}x{columns}"], atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (31, 7)])
def test_levels_have_the_sizes_of_a_convolutional_pyramid(size) -> None:
    backbone = Backbone(TINY).build().eval()
    assert isinstance(backbone, ViTPyramid)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        features = backbone(x)
        whole = torch.nn.functional.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
        normed = backbone.body.forward_features(whole)[:, 1:]  # type: ignore[operator]
        last = backbone.last_map(whole)
    assert torch.allclose(last.flatten(2).transpose(1, 2), normed, atol=1e-5)
    for level in STAGES:
        stride = backbone.strides[level]
        assert features[level].shape == (2, 256, -(-size[0] // stride), -(-size[1] // stride))


def test_only_the_levels_that_are_used_are_made() -> None:
    backbone = Backbone(TINY).build(("res3", "res5"))
    assert list(backbone.channels) == ["res3", "res5"]
    assert {name.split(".")[0] for name, _ in backbone.named_parameters()} == {"body", "simfp_3", "simfp_5"}


@pytest.mark.parametrize(("freeze", "blocks"), [(0, 0), (1, 0), (2, 2), (3, 3), (4, 5), (5, 6)])
def test_frozen_quarters_do_not_learn_and_the_pyramid_always_does(freeze: int, blocks: int) -> None:
    backbone = Backbone(TINY, freeze=freeze).build().train()
    torch.stack([f.square().mean() for f in backbone(torch.rand(2, 3, 64, 64)).values()]).sum().backward()
    learning = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert {name for name in learning if name.startswith("simfp_")} == {
        name for name, _ in backbone.named_parameters() if name.startswith("simfp_")
    }
    kept = {f"body.blocks.{k}" for k in range(blocks, 6)} | ({"body.norm"} if freeze < 5 else set())
    kept |= {"body.cls_token", "body.pos_embed", "body.patch_embed"} if freeze == 0 else set()
    found = {name for name in learning if name.startswith("body.")}
    assert {".".join(name.split(".")[: 3 if "blocks" in name else 2]) for name in found} == kept
    assert all(stage_of(backbone, name) >= freeze for name in found)


def test_the_pyramid_learns_at_the_rate_of_the_heads() -> None:
    model = PanopticFPNConfig(backbone=Backbone(TINY)).build(TWO)
    groups = parameter_groups(model, Optim(lr=1.0, backbone_lr=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    factors = {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}
    assert {factor for name, factor in factors.items() if name.startswith("backbone.body.")} == {0.1}
    assert {factor for name, factor in factors.items() if not name.startswith("backbone.body.")} == {1.0}
    assert any(name.startswith("backbone.simfp_") for name in factors)


def test_weights_of_a_file_fill_the_vit_and_leave_the_pyramid_fresh() -> None:
    whole = timm.create_model(TINY)  # with its classifier
    backbone = Backbone(TINY, freeze=5).build()
    pyramid = {key for key in backbone.state_dict() if key.startswith("simfp_")}
    for form in (whole.state_dict(), {f"backbone.{key}": value for key, value in whole.state_dict().items()}):
        assert set(load_weights(backbone, form)) == pyramid
    own = backbone.state_dict()
    assert all(torch.equal(own[f"body.{key}"], v) for key, v in whole.state_dict().items() if "head" not in key)
    again = Backbone(TINY).build()
    assert load_weights(again, own) == []
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: \['body.blocks.3.norm1.bias'\]"):
        load_weights(again, {key: v for key, v in whole.state_dict().items() if key != "blocks.3.norm1.bias"})


def test_patches_of_14_pixels_are_resampled_to_16_and_keep_their_grid() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    options = {**vit_options(name), "depth": 1, "embed_dim": 24, "num_heads": 2}
    assert options["patch_size"] == 16 and options["img_size"] == (37 * 16, 37 * 16)
    published = timm.create_model(name, num_classes=0, depth=1, embed_dim=24, num_heads=2)
    ours = timm.create_model(name, **options)
    state = checkpoint_filter_fn(published.state_dict(), ours)  # type: ignore[arg-type]
    assert state["patch_embed.proj.weight"].shape == (24, 3, 16, 16)
    assert torch.equal(state["pos_embed"], published.state_dict()["pos_embed"])


@pytest.mark.parametrize(
    "name",
    [
        *("vit_small_patch14_reg4_dinov2.lvd142m", "vit_giant_patch14_reg4_dinov2.lvd142m"),
        *("vit_small_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3_qkvb.lvd1689m", "deit3_small_patch16_224"),
        *("convnext_tiny.dinov3_lvd1689m", "convnext_large.dinov3_lvd1689m"),
    ],
)
def test_names_of_published_backbones_build_a_pyramid(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name).build()
    assert [backbone.strides[level] for level in STAGES] == [4, 8, 16, 32]
    assert isinstance(backbone, ViTPyramid) == name.startswith(("vit", "deit"))
    assert timm.is_model_pretrained(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", None),
        ("vit_base_patch32_224", "patches of 32 pixels.*choose a ViT with patches of 16 pixels"),
        ("mixer_b16_224", "canvases of any size"),
    ],
)
def test_vits_whose_strides_do_not_fit_are_refused(name: str, message: str | None) -> None:
    with torch.device("meta"):
        if message is None:
            Backbone(name).build()
            return
        with pytest.raises(ValueError, match=message):
            Backbone(name).build()
