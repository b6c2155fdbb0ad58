"""Plain ViTs block by block: as timm runs them whole, and their resampled weights as the references resample them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from panoptic.backbones.vit import ViT, resample_patch_kernel, resample_positions, rotary_positions
from panoptic.backbones.weights import load_weights
from tests.support.eomt_fixtures import load

NAMES = (
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3_qkvb",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
)


def small(name: str, canvas: tuple[int, int] = (64, 96), patch: int = 16, **options: Any) -> Any:
    torch.manual_seed(0)
    return ViT(name, canvas, patch, **{"width": 48, "depth": 5, "heads": 4, "hidden": 64} | options)


def lively(module: Any) -> Any:
    """With layer scales and positions that are worth comparing."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("gamma", "gamma_1", "gamma_2")):
                parameter.fill_(1.0)
            if name.endswith("_bias") or name.endswith(("pos_embed", "cls_token", "reg_token")):
                parameter.normal_()
    return module


@pytest.fixture
def units(shared) -> dict[str, torch.Tensor]:
    return load(shared, "units")[0]


def test_resampled_positions_and_kernels_are_the_references(units) -> None:
    for name, grid in (("pos_10x10", (10, 10)), ("pos_5x9", (5, 9))):
        torch.testing.assert_close(resample_positions(units["pos"], (6, 6), grid), units[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(resample_patch_kernel(units["patch"], 16), units["patch_16"], rtol=0, atol=1e-4)


def test_rotary_positions_are_the_references(units) -> None:
    sines, cosines = rotary_positions((3, 5), 100 ** (4 * torch.arange(6) / 24)).chunk(2, 1)
    torch.testing.assert_close(sines, units["rope_sin"], rtol=0, atol=1e-6)
    torch.testing.assert_close(cosines, units["rope_cos"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 96), (96, 48)])
def test_the_blocks_one_by_one_are_the_model(name: str, size: tuple[int, int]) -> None:
    """Also on a canvas for which positions are resampled."""
    model = lively(small(name)).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole = model.body.forward_features(x)[:, model.prefix :]
        torch.testing.assert_close(model(x).flatten(2).transpose(1, 2), whole, rtol=1e-4, atol=1e-5)


def test_tokens_in_front_are_not_rotated() -> None:
    """Two equal tokens in front come out equal; that of the last block's rotation alone is told by the patches."""
    model = lively(small("vit_small_patch16_dinov3_qkvb")).eval()
    tokens, rope, _ = model.embed(torch.randn(1, 3, 64, 96))
    model.hold_tokens(2, 1)
    pair = torch.randn(1, 1, 48).expand(-1, 2, -1)
    with torch.no_grad():
        x = model.block(4, torch.cat([pair, tokens], 1), rope)
        torch.testing.assert_close(x[:, 0], x[:, 1])
        # without the two, and they hidden from all others: the rest is what it would be
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        mask[..., :2] = False
        hidden = model.block(4, torch.cat([pair, tokens], 1), rope, mask)[:, 2:]
        model.hold_tokens(0, 1)
        torch.testing.assert_close(hidden, model.block(4, tokens, rope), rtol=1e-4, atol=1e-5)


def test_coordinates_are_scaled_in_training_only() -> None:
    model = small("vit_small_patch16_dinov3_qkvb")
    x = torch.zeros(1, 3, 64, 96)
    still = model.eval().embed(x)[1]
    assert torch.equal(still, model.embed(x)[1])
    torch.manual_seed(3)
    scale = torch.exp((2 * torch.rand(1) - 1) * torch.log(torch.tensor(2.0)))
    torch.manual_seed(3)
    moved = model.train().embed(x)[1]
    assert 0.5 <= scale <= 2 and not torch.allclose(moved, still)
    torch.testing.assert_close(moved, rotary_positions((4, 6), model.body.rope.periods, scale))
    torch.testing.assert_close(small("vit_small_patch16_dinov3_qkvb", rope_rescale=1.0).train().embed(x)[1], still)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
def test_weights_of_another_patch_and_grid_are_resampled(name: str) -> None:
    published: Any = timm.create_model(
        name, num_classes=7, img_size=42, patch_size=14, embed_dim=48, depth=5, num_heads=4, mlp_ratio=64.5 / 48
    )
    state = published.state_dict()
    model = small(name)
    assert load_weights(model, state) == []
    prefix = 0 if "reg4" in name else 1
    expected = resample_positions(state["pos_embed"], (3, 3), (4, 6), prefix)
    assert torch.equal(model.body.pos_embed, expected)
    assert torch.equal(model.body.patch_embed.proj.weight, resample_patch_kernel(state["patch_embed.proj.weight"], 16))
    assert torch.equal(model.body.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=r"missing: \['body\.norm\.bias'\]"):
        load_weights(model, {key: value for key, value in state.items() if key != "norm.bias"})


def test_meta_names() -> None:
    """The class token of Meta's own files has a position, which is added to it."""
    model = small("vit_giant_patch14_reg4_dinov2", canvas=(64, 64))
    state = {key.removeprefix("body."): value.clone() for key, value in lively(model).state_dict().items()}
    position = torch.randn(1, 1, 48)
    theirs = {
        key.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for key, value in state.items()
    }
    theirs |= {"pos_embed": torch.cat([position, state["pos_embed"]], 1), "mask_token": torch.zeros(1, 48)}
    target = small("vit_giant_patch14_reg4_dinov2", canvas=(64, 64))
    assert load_weights(target, theirs) == []
    expected = {**state, "cls_token": state["cls_token"] + position}
    assert all(torch.equal(value, expected[key.removeprefix("body.")]) for key, value in target.state_dict().items())


def test_stages_are_quarters_of_the_blocks() -> None:
    model = small("vit_small_patch14_reg4_dinov2", depth=8)
    model.freeze_stages(3)
    frozen = {name.removeprefix("body.") for name, p in model.named_parameters() if not p.requires_grad}
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "blocks.3.norm1.weight"} <= frozen
    assert not any(name.startswith(("blocks.4", "norm.")) for name in frozen)
    model.freeze_stages(5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch14_dinov2", {}, "near names: .*vit_small_patch14_dinov2"),
        ("resnet18", {}, "cannot build 'resnet18' as a plain ViT"),
        ("eva02_tiny_patch14_224", {}, "is no plain ViT with learned positions or DINOv3's"),
        ("vit_tiny_patch16_224", {"canvas": (64, 90)}, "canvas 64x90: both sides must be multiples of the patch, 16"),
        ("vit_tiny_patch16_224", {"heads": 5}, "cannot build 'vit_tiny_patch16_224'"),
    ],
)
def test_what_is_no_plain_vit_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(name, **options)
