"""Files of plain ViTs under Meta's and Hugging Face's names, as `backbone.weights` loads them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from panoptic.backbones.vit import ViT
from panoptic.backbones.vit_pyramid import ViTPyramid
from panoptic.backbones.weights import load_weights

DINOV2, DINOV2_GATED = "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"
DINOV3, DINOV3_GATED = "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"


def small(name: str, seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    vit = ViT(name, (64, 64), width=48, depth=3, heads=4, hidden=64)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_()
    return vit


def timm_state(vit: ViT) -> dict[str, Tensor]:
    return {key.removeprefix("body."): value.clone() for key, value in vit.state_dict().items()}


def renamed(state: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """Names by regular expressions, one after the other."""
    out = {}
    for key, value in state.items():
        for rule, name in rules:
            key = re.sub(rule, name, key)
        out[key] = value
    return out


def with_class_position(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class token parted into itself and a position."""
    width = like["cls_token"].shape[-1]
    position = torch.randn(1, 1, width)
    return state | {
        "cls_token": like["cls_token"] - position,
        "pos_embed": torch.cat([position, like["pos_embed"]], 1),
        "mask_token": torch.zeros(1, width),
    }


def split(state: dict[str, Tensor], names: tuple[str, str, str], keys_have_bias: bool) -> dict[str, Tensor]:
    """Query, key and value by themselves, under names inside the block's attention."""
    out = {}
    for key, value in state.items():
        if key.endswith(".attn.qkv.weight") or (key.endswith(".attn.qkv.bias") and keys_have_bias):
            stem, _, leaf = key.rpartition(".")
            for name, third in zip(names, value.chunk(3), strict=True):
                out[f"{stem.removesuffix('attn.qkv')}attention.{name}.{leaf}"] = third
        elif match := re.fullmatch(r"(.+\.)attn\.([qv])_bias", key):
            out[f"{match[1]}attention.{names['qkv'.index(match[2])]}.bias"] = value
        else:
            out[key] = value
    return out


def meta_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = renamed(state, ("reg_token", "register_tokens"), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    return with_class_position(theirs, state)


def meta_dinov2_plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_class_position(renamed(state, ("reg_token", "register_tokens")), state)


def hugging_face_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("attention.query", "attention.key", "attention.value")
    theirs = split(with_class_position(state, state), names, True)
    return renamed(
        theirs,
        (r"^cls_token|^mask_token", r"embeddings.\g<0>"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.proj", "attention.output.dense"),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    )


def hugging_face_dinov2_gated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(hugging_face_dinov2(state), (r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out"))


def hugging_face_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = split(state | {"mask_token": torch.zeros(1, 1, 48)}, ("q_proj", "k_proj", "v_proj"), False)
    return renamed(
        theirs,
        (r"^cls_token|^mask_token", r"embeddings.\g<0>"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^blocks\.", "layer."),
        (r"attn\.proj", "attention.o_proj"),
        (r"gamma_(\d)", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1_g", "mlp.gate_proj"),
        (r"mlp\.fc1(_x)?", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
    )


def hugging_face_5_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(hugging_face_dinov3(state), (r"^layer\.", "model.layer."))


def meta_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = {key: value for key, value in state.items() if not key.endswith("_bias")}
    theirs |= {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(3)}
    for block in range(3):
        q, v = (state[f"blocks.{block}.attn.{letter}_bias"] for letter in "qv")
        theirs[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros(48), v])
        theirs[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(144)
    return renamed(
        theirs,
        (r"^reg_token", "storage_tokens"),
        (r"gamma_(\d)", r"ls\1.gamma"),
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        *([(r"mlp\.fc2", "mlp.w3")] if "blocks.0.mlp.fc1_g.weight" in state else []),
    )


FILES: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = [
    (DINOV2, meta_dinov2_plain),
    (DINOV2_GATED, meta_dinov2),
    (DINOV2, hugging_face_dinov2),
    (DINOV2_GATED, hugging_face_dinov2_gated),
    (DINOV3, hugging_face_dinov3),
    (DINOV3, hugging_face_5_dinov3),
    (DINOV3_GATED, hugging_face_dinov3),
    (DINOV3, meta_dinov3),
    (DINOV3_GATED, meta_dinov3),
    (DINOV3, dict),
    (DINOV2_GATED, dict),
]


@pytest.mark.parametrize(("name", "theirs"), FILES)
def test_every_file_of_a_vit_gives_its_weights(name: str, theirs: Callable[[dict[str, Tensor]], dict]) -> None:
    published, own = small(name), small(name, seed=1)
    state = theirs(timm_state(published))
    assert load_weights(own, state) == []
    for key, value in own.state_dict().items():
        torch.testing.assert_close(value, published.state_dict()[key], rtol=0, atol=1e-6)


def test_what_a_file_lacks_is_named() -> None:
    state = hugging_face_dinov3(timm_state(small(DINOV3)))
    del state["layer.1.attention.k_proj.weight"]
    with pytest.raises(ValueError, match=r"missing: \['body\.blocks\.1\.attn\.qkv\.weight'\]"):
        load_weights(small(DINOV3), state)
    with pytest.raises(ValueError, match=r"missing: .*'body\.pos_embed'"):
        load_weights(small(DINOV2), hugging_face_dinov3(timm_state(small(DINOV3))))


@pytest.mark.parametrize("name", [DINOV2, DINOV3])
def test_the_pyramid_takes_the_same_files(name: str) -> None:
    """But for its own levels, which no file has."""
    pyramid = ViTPyramid(name)
    state = {key: value.clone() for key, value in pyramid.body.state_dict().items()}
    state = {key: torch.randn_like(value) if value.numel() < 10**4 else value for key, value in state.items()}
    theirs = renamed_for(name)(state)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.zero_()
    fresh = load_weights(pyramid, theirs)
    assert fresh and all(key.startswith("simfp_") for key in fresh)
    for key, value in pyramid.body.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=1e-6)


def renamed_for(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return hugging_face_dinov2 if name == DINOV2 else hugging_face_dinov3
