"""EoMT's published names in all flavours, differences from a base, and what a file does not tell."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.convert import Hints, convert
from panoptic.models.eomt.model import EoMTConfig
from panoptic.segmentation import Categories
from tests.panoptic.backbones.test_vit_names import hugging_face_dinov3, meta_dinov3
from tests.support.eomt_fixtures import categories, load, rules

S, L, L3 = 0, 1, 2
"""Sections of both lists of names."""

COUNTS = {S: 23_975_942, L: 316_695_686, L3: 315_032_710}
"""Parameters, from the lists."""

FILES = {"eomt": "eomt_original", "transformers": "eomt_transformers"}


def published(shared: Any, source: str, section: int) -> dict[str, Tensor]:
    """Names and shapes of one model of a list, norms and class weights as they are in a file, the rest nothing."""
    lines = shared(f"specs/keys/{FILES[source]}.txt").read_text().splitlines()
    sections: list[dict[str, Tensor]] = []
    for line in lines:
        if line.startswith("#"):
            sections.append({})
        elif match := re.match(r"(\S+)\s+(\([^)]*\))", line):
            sections[-1][match[1]] = torch.zeros(()).expand(ast.literal_eval(match[2]))
    state = sections[section]
    ones = {key: torch.ones_like(value) for key, value in state.items() if "norm1.weight" in key}
    count = len(state["criterion.empty_weight"])
    return state | ones | {"criterion.empty_weight": torch.tensor([1.0] * (count - 1) + [0.1])}


def fit(config: Any, converted: dict[str, Tensor], names: Categories) -> int:
    """Check that the weights are the model's, and count its parameters."""
    with torch.device("meta"):
        model = config.build(names)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in converted.items()}
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize(
    ("section", "name", "blocks"),
    [
        (S, "vit_small_patch14_reg4_dinov2", 3),
        (L, "vit_large_patch14_reg4_dinov2", 4),
        (L3, "vit_large_patch16_dinov3_qkvb", 4),
    ],
)
def test_published_names(shared, source: str, section: int, name: str, blocks: int) -> None:
    config, converted = convert(published(shared, source, section), source, categories(133))
    assert isinstance(config, EoMTConfig)
    assert config == EoMTConfig(backbone=Backbone(name), query_blocks=blocks, queries=200, canvas=(640, 640))
    assert fit(config, converted, categories(133)) == COUNTS[section]


@pytest.mark.parametrize("kind", ["eomt", "5.x", "4.x"])
def test_gated_names(shared, kind: str) -> None:
    """DINOv2-g, of which the lists name what differs from L: gates first, in one tensor or two."""
    source = "eomt" if kind == "eomt" else "transformers"
    state: dict[str, Tensor] = {}
    for key, value in published(shared, source, L).items():
        shape = [{1024: 1536, 3072: 4608, 4096: 8192}.get(side, side) for side in value.shape]
        for index in range(40) if re.search(r"(blocks|layers)\.0\.", key) else (None,):
            if index is not None or not re.search(r"(blocks|layers)\.\d", key):
                inner = key if index is None else re.sub(r"(blocks|layers)\.0\.", rf"\1.{index}.", key)
                state[inner] = torch.empty(shape, device="meta")
    for key in [key for key in state if "mlp.fc" in key]:
        leaf = key.rpartition(".")[2]
        value = state.pop(key)
        if "fc2" in key:
            value = torch.empty([1536, 4096] if leaf == "weight" else [1536], device="meta")
        stem = key.rpartition(".fc")[0]
        if kind == "5.x":
            half = torch.empty([4096, *value.shape[1:]], device="meta")
            new = {"down_proj": value} if "fc2" in key else {"gate_proj": half, "up_proj": half}
        elif kind == "4.x":
            new = {"weights_out": value} if "fc2" in key else {"weights_in": value}
        else:
            new = {key.split(".")[-2]: value}
        state |= {f"{stem}.{name}.{leaf}": part for name, part in new.items()}
    probabilities = next(key for key in state if key.endswith("attn_mask_probs"))
    state |= {probabilities: torch.zeros(5), "criterion.empty_weight": torch.tensor([1.0] * 133 + [0.1])}
    config, converted = convert(state, source, categories(133))
    assert config == EoMTConfig(backbone=Backbone("vit_giant_patch14_reg4_dinov2"), query_blocks=5)
    assert round(fit(config, converted, categories(133)) / 1e4) == 116_362  # 1163.62 million in the table of sizes


def test_gates_come_first() -> None:
    from panoptic.backbones.vit_names import timm_vit_names

    gate, value = torch.zeros(4, 3), torch.ones(4, 3)
    state = {"embeddings.position_embeddings.weight": torch.zeros(4, 3)}
    state |= {"layers.0.mlp.up_proj.weight": value, "layers.0.mlp.gate_proj.weight": gate}
    assert torch.equal(timm_vit_names(state)["blocks.0.mlp.fc1.weight"], torch.cat([gate, value]))


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize("section", [S, L3])
def test_every_key_is_accounted_for(shared, source: str, section: int) -> None:
    state = published(shared, source, section)
    block = next(key for key in state if key.endswith("0.norm2.bias"))
    for extra in (block.replace("norm2", "norm3"), "network.more" if source == "eomt" else "more", "criterion.more"):
        with pytest.raises(ValueError, match=re.escape(extra.removeprefix("network.").split("0.")[-1])):
            convert({**state, extra: torch.zeros(1)}, source, categories(133))
    with pytest.raises(ValueError, match=r"missing \(our names\): backbone\.body\.blocks\.0\.norm2\.bias"):
        convert({key: value for key, value in state.items() if key != block}, source, categories(133))
    head = next(key for key in state if re.search(r"class_(head|predictor)\.bias", key))
    with pytest.raises(ValueError, match=r"missing \(our names\): class_head\.bias"):
        convert({key: value for key, value in state.items() if key != head}, source, categories(133))
    with pytest.raises(ValueError, match="133 classes, the list has 19"):
        convert(state, source, categories(19))


def split_names(meta: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixture's weights under transformers' names."""
    out = {}
    for key, value in state.items():
        names = dict(meta["names"])[key]
        for name, part in zip(names, value.chunk(len(names)) if names else [], strict=True):
            out[name] = part[0] if name.endswith("position_embeddings.weight") else part
    return out


@pytest.mark.parametrize("source", FILES)
def test_a_published_file_gives_the_published_numbers(shared, source: str) -> None:
    """The masks and classes of the reference, from weights under the names of either project."""
    arrays, meta = load(shared, "eomt_s")
    state = {key: torch.from_numpy(value) for key, value in rules(shared).weights(meta).items()}
    if source == "transformers":
        state = split_names(meta, state)
    else:
        state = {key.replace("network.", "network._orig_mod."): value for key, value in state.items()}
    state.pop("criterion.empty_weight", None)
    names = categories(meta["classes"])
    config, weights = convert(state, source, names, Hints(heads=meta["config"]["heads"]))
    assert isinstance(config, EoMTConfig) and (config.canvas, config.query_blocks) == ((128, 128), 3)
    model = config.build(names).eval()
    model.load_state_dict(weights)
    pixels = torch.from_numpy(rules(shared).normalised(rules(shared).batch(meta)))
    with torch.no_grad():
        outputs = model.forward_normalised(pixels)
    torch.testing.assert_close(outputs["classes"], arrays["none_classes"], rtol=0, atol=1e-5)
    masks = torch.einsum("bqc,bchw->bqhw", outputs["embeddings"], outputs["features"])
    torch.testing.assert_close(masks, arrays["none_masks"], rtol=0, atol=1.5e-4)


SMALL = EoMTConfig(
    backbone=Backbone("vit_small_patch16_dinov3_qkvb"),
    divisor=64,
    canvas=(64, 64),
    width=48,
    depth=3,
    heads=4,
    hidden=64,
    queries=6,
    query_blocks=2,
)


def drawn(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a small model with DINOv3, its norms near 1."""
    torch.manual_seed(seed)
    state = SMALL.build(categories(5)).state_dict()
    return {
        key: 1 + 0.1 * torch.randn_like(value) if re.search(r"norm\d?\.weight", key) else torch.randn_like(value)
        for key, value in state.items()
    }


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of the original's with DINOv3: Hugging Face's names inside the ViT, other ones around them."""
    body = {key.removeprefix("backbone.body."): v for key, v in state.items() if key.startswith("backbone.body.")}
    theirs: dict[str, Tensor] = {}
    for key, value in hugging_face_dinov3(body).items():
        if "mask_token" not in key:
            key = key.replace("embeddings.", "patch_embed.", 1) if key.startswith("embeddings.") else key
            theirs[f"network.encoder.backbone.{re.sub(r'^layer', 'blocks', key)}"] = value
    others = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    theirs |= {f"network.{re.sub(r'^queries', 'q', key)}": value for key, value in others.items()}
    buffers = {"attn_mask_probs": torch.zeros(2), "encoder.pixel_mean": torch.zeros(1, 3, 1, 1)}
    return theirs | {f"network.{key}": value for key, value in buffers.items()}


def vit_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("backbone.body."): v for key, v in state.items() if key.startswith("backbone.body.")}


@pytest.mark.parametrize("base_names", [hugging_face_dinov3, meta_dinov3])
def test_differences_are_added_to_their_base(base_names: Any) -> None:
    whole, base = drawn(), vit_of(drawn(1))
    differences = {
        key: value - base[key.removeprefix("backbone.body.")] if key.startswith("backbone.") else value
        for key, value in whole.items()
    }
    file = original_names(differences) | {"criterion.empty_weight": torch.zeros(6)}
    given = Hints(base=base_names(base), heads=4, canvas=(64, 64))
    config, weights = convert(file, "eomt", categories(5), given)
    assert config == SMALL
    assert weights.keys() == whole.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds differences from DINOv3.*--base FILE.*--base none") as refused:
        convert(file, "eomt", categories(5), Hints(heads=4))
    assert "\n" not in str(refused.value)
    lacking = {key: value for key, value in given.base.items() if not key.startswith("norm.")}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"--base: not the ViT .* norm\.weight, norm\.bias"):
        convert(file, "eomt", categories(5), replace(given, base=lacking))


def test_a_file_of_the_vit_itself_needs_no_base() -> None:
    whole = drawn()
    file = original_names(whole) | {"criterion.empty_weight": torch.tensor([1.0] * 5 + [0.2])}
    config, weights = convert(file, "eomt", categories(5), Hints(heads=4, canvas=(64, 64)))
    assert config == replace(SMALL, no_object_weight=0.2)
    assert all(torch.equal(value, whole[key]) for key, value in weights.items())
    with pytest.raises(ValueError, match=r"--base: the weights of the ViT's norms are not near 0"):
        convert(file, "eomt", categories(5), Hints(base=hugging_face_dinov3(vit_of(whole)), heads=4))
    small = {key: 0.01 * value if "norm1" in key else value for key, value in whole.items()}
    converted = convert(original_names(small), "eomt", categories(5), Hints(whole=True, heads=4))[1]
    assert all(torch.equal(value, small[key]) for key, value in converted.items())


def test_what_a_file_does_not_tell_is_asked_for() -> None:
    file = original_names(drawn())
    with pytest.raises(ValueError, match=r"48 channels are no multiple of the published 64 for each: add --heads N"):
        convert(file, "eomt", categories(5))
    del file["network.attn_mask_probs"]
    with pytest.raises(ValueError, match=r"no published model has 3 blocks: add --query-blocks N"):
        convert(file, "eomt", categories(5), Hints(heads=4))
    assert convert(file, "eomt", categories(5), Hints(heads=4, query_blocks=1))[0].query_blocks == 1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no architecture of panopticfcn"):
        convert(file, "panopticfcn", categories(5), Hints(heads=4))


def test_a_wide_canvas_is_asked_for(shared) -> None:
    state = published(shared, "transformers", S)
    state["embeddings.position_embeddings.weight"] = torch.zeros(8 * 16, 384)
    with pytest.raises(ValueError, match=r"positions of 128 patches, which make no square: add --canvas"):
        convert(state, "transformers", categories(133))
    config = convert(state, "transformers", categories(133), Hints(canvas=(128, 256)))[0]
    assert isinstance(config, EoMTConfig) and (config.canvas, config.divisor) == ((128, 256), 16)
    with pytest.raises(ValueError, match=r"--canvas 128 128: the file has the positions of 128 patches of 16 pixels"):
        convert(state, "transformers", categories(133), Hints(canvas=(128, 128)))


def test_hints_are_for_files_that_need_them(shared) -> None:
    from tests.panoptic.convert.test_mask_transformers import published as mask2former

    state = mask2former(shared, "mask2former_r50_original")
    with pytest.raises(ValueError, match=r"--base: only EoMT's files need it; this one of mask2former tells all"):
        convert(state, "mask2former", categories(133), Hints(base={"a": torch.zeros(1)}))
