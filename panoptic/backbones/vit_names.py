"""timm's names of the weights of plain ViTs in files of other projects.

| file | told by |
|---|---|
| Meta's DINOv2 (`dinov2_vits14_reg4_pretrain.pth`) | `register_tokens`, gated MLPs `mlp.w12`, `mlp.w3` |
| Meta's DINOv3 (`dinov3_vits16_pretrain_lvd1689m-….pth`) | `storage_tokens` |
| Hugging Face's DINOv2 with registers, DINOv3 and EoMT, 4.x and 5.x | `embeddings.patch_embeddings.…` |
| EoMT's own DINOv3 | `patch_embed.patch_embeddings.weight` |

timm has two classes of models, and with them two kinds of names: DINOv2's positions are learned, the attention has one
`qkv` with a bias, and a gated MLP keeps both halves in `fc1`, the gate first. DINOv3's are rotary, the key has no bias,
and the halves are `fc1_g` and `fc1_x`. (Specification eomt.md, sections 3, 4, 11 and 12.)

Shapes: N patches, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PARTS = (
    (r"(?:embeddings\.|patch_embed\.)?cls_token", "cls_token"),
    (r"(?:embeddings\.|patch_embed\.)?(?:register_tokens|storage_tokens|reg_token)", "reg_token"),
    (r"(?:embeddings|patch_embed)\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_embeddings(?:\.weight)?", "pos_embed"),
    (r"(?:layernorm|norm)\.(weight|bias)", r"norm.\1"),
)
"""Names outside of the blocks, as whole, and timm's."""

BLOCK = re.compile(r"(?:blocks|(?:(?:encoder|model)\.)?layers?)\.(\d+)\.(.+)")
"""A name inside a block."""

UNUSED = re.compile(
    r"(?:embeddings\.|patch_embed\.)?mask_token|(?:model\.)?rope_emb\w*\..+|local_cls_norm\..+|.+\.qkv\.bias_mask"
)
"""Parts of the training of DINO itself, and tables that follow from the sizes."""

LAYERS = (
    (r"attention\.(?:output\.dense|out_proj|o_proj)\.(\w+)", r"attn.proj.\1"),
    (r"mlp\.(?:w12|weights_in)\.(\w+)", r"mlp.fc1.\1"),
    (r"mlp\.(?:down_proj|weights_out|w3)\.(\w+)", r"mlp.fc2.\1"),
)
"""Names inside a block that both kinds share."""

PROJECTION = re.compile(r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)")
"""Query, key and value, each by itself."""


def timm_vit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain ViT under timm's names; what is known to nobody keeps its name.

    Query, key and value are joined, and so are the halves of DINOv2's gated MLPs. A class token to which Meta's files
    and Hugging Face's give a position of its own takes it up, as timm does where there are registers.

    Args:
        state: of any file of the module's table, or timm's own, with or without our prefix `body.`.
    """
    renamed: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        key = key.removeprefix("body.")
        if UNUSED.fullmatch(key):
            continue
        if match := BLOCK.fullmatch(key):
            blocks.setdefault(match[1], {})[match[2]] = value
            continue
        renamed[_renamed(key, PARTS)] = value
    if "pos_embed" in renamed:
        _settle_positions(renamed)
    rotary, meta = "pos_embed" not in renamed, "storage_tokens" in state
    for index, block in blocks.items():
        layers = _block(_without_meta_names(block) if meta else block, rotary)
        renamed |= {f"blocks.{index}.{name}": value for name, value in layers.items()}
    return renamed


def _settle_positions(renamed: dict[str, Tensor]) -> None:
    """Give positions their leading axis and, where there are registers, the class token its own, in place."""
    positions = renamed["pos_embed"]
    if positions.ndim == 2:
        positions = positions[None]
    count = positions.shape[1]
    if "reg_token" in renamed and math.isqrt(count) ** 2 != count == math.isqrt(count - 1) ** 2 + 1:
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    renamed["pos_embed"] = positions


def _without_meta_names(block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a block of Meta's DINOv3 under Hugging Face's names, where it has its own.

    Its bias of query, key and value is one, of which that of the key is masked.
    """
    gated = "mlp.w1.weight" in block
    rules = (
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.w1\.(\w+)", r"mlp.gate_proj.\1"),
        (r"mlp\.w2\.(\w+)", r"mlp.up_proj.\1"),
        *(((r"mlp\.w3\.(\w+)", r"mlp.down_proj.\1"),) if gated else ()),
    )
    layers = {_renamed(key, rules): value for key, value in block.items()}
    if "attn.qkv.bias" in layers:
        layers["attn.q_bias"], _, layers["attn.v_bias"] = layers.pop("attn.qkv.bias").chunk(3)
    return layers


def _block(block: Mapping[str, Tensor], rotary: bool) -> dict[str, Tensor]:
    """The weights of one block under timm's names.

    Args:
        block: by the file's names inside the block.
        rotary: of DINOv3's kind.
    """
    gated = "mlp.gate_proj.weight" in block
    rules = (
        (r"layer_scale(\d)\.lambda1", r"gamma_\1" if rotary else r"ls\1.gamma"),
        (r"mlp\.gate_proj\.(\w+)", r"mlp.fc1_g.\1"),
        (r"mlp\.up_proj\.(\w+)", r"mlp.fc1_x.\1" if gated else r"mlp.fc1.\1"),
        *LAYERS,
    )
    layers: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in block.items():
        if match := PROJECTION.fullmatch(key):
            projections.setdefault(match[2], {})[match[1]] = value
        else:
            layers[_renamed(key, rules)] = value
    if gated and not rotary:
        for leaf in ("weight", "bias"):
            gate, half = f"mlp.fc1_g.{leaf}", f"mlp.fc1_x.{leaf}"
            if gate in layers and half in layers:
                layers[f"mlp.fc1.{leaf}"] = torch.cat([layers.pop(gate), layers.pop(half)])
    return layers | _attention(projections)


def _renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """The key by the first rule that matches it as a whole; itself where none does."""
    return next((re.sub(rule, name, key) for rule, name in rules if re.fullmatch(rule, key)), key)


def _attention(projections: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Query, key and value as timm has them: one weight, and one bias, or two where the key has none."""
    layers: dict[str, Tensor] = {}
    for leaf, parts in projections.items():
        if len(parts) == 3:
            layers[f"attn.qkv.{leaf}"] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:
            layers |= {f"attn.{letter}_{leaf}": value for letter, value in parts.items()}
    return layers
