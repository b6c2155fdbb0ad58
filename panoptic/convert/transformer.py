"""Names of DETR's encoder and decoder, which MaskFormer shares, and of ResNets inside Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

ATTENTION = {"self_attn": "self_attention", "multihead_attn": "cross_attention", "encoder_attn": "cross_attention"}
"""Names of the attentions of a layer in facebookresearch/detr and in Hugging Face transformers, and ours."""

LAYER_NORMS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"},
}
"""Hugging Face's names of the norms of a layer, and ours, by part."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def original_key(key: str) -> str | None:
    """Our name of `encoder.layers.0.self_attn.in_proj_weight` and the like of facebookresearch/detr, or None."""
    if re.fullmatch(r"(encoder|decoder)\.norm\.(weight|bias)", key):
        return key
    attention = r"(self_attn|multihead_attn)\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
    if match := re.fullmatch(rf"((?:encoder|decoder)\.layers\.\d+)\.{attention}", key):
        return f"{match[1]}.{ATTENTION[match[2]]}.{match[3]}"
    return key if re.fullmatch(r"(encoder|decoder)\.layers\.\d+\.(linear[12]|norm[123])\.(weight|bias)", key) else None


def transformers_key(key: str) -> str | None:
    """Our name of a key of Hugging Face's encoder or decoder after `join_projections`, of 4.x and 5.x, or None."""
    if norm := re.fullmatch(r"decoder\.layernorm\.(weight|bias)", key):
        return f"decoder.norm.{norm[1]}"
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    part, layer, rest = match.groups()
    if inner := re.fullmatch(r"(self_attn|encoder_attn)\.(in_proj_weight|in_proj_bias)", rest):
        rest = f"{ATTENTION[inner[1]]}.{inner[2]}"
    elif inner := re.fullmatch(r"(self_attn|encoder_attn)\.(?:o_proj|out_proj)\.(weight|bias)", rest):
        rest = f"{ATTENTION[inner[1]]}.out_proj.{inner[2]}"
    elif inner := re.fullmatch(r"(?:mlp\.)?fc([12])\.(weight|bias)", rest):
        rest = f"linear{inner[1]}.{inner[2]}"
    elif (inner := re.fullmatch(r"(\w+_layer_norm)\.(weight|bias)", rest)) and inner[1] in LAYER_NORMS[part]:
        rest = f"{LAYER_NORMS[part][inner[1]]}.{inner[2]}"
    else:
        return None
    return f"{part}.layers.{layer}.{rest}"


def join_projections(state: Mapping[str, Tensor], attentions: str = "self_attn|encoder_attn") -> dict[str, Tensor]:
    """The state with projections of query, key and value joined, as the originals' `in_proj_weight` (and bias).

    Incomplete triples stay as they are.

    Args:
        state: names and tensors.
        attentions: names of the modules, alternatives of a regular expression.
    """
    joined = dict(state)
    for key in state:
        match = re.fullmatch(rf"(.+\.(?:{attentions}))\.q_proj\.(weight|bias)", key)
        if match is None:
            continue
        names = [f"{match[1]}.{name}.{match[2]}" for name in PROJECTIONS]
        if all(name in state for name in names):
            joined[f"{match[1]}.in_proj_{match[2]}"] = torch.cat([torch.as_tensor(joined.pop(name)) for name in names])
    return joined


def resnet_key(key: str) -> str | None:
    """torchvision's name of a key of Hugging Face's own ResNet, or None."""
    if stem := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", key):
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    match = re.fullmatch(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:shortcut|layer\.(\d))\.(convolution|normalization)\.(\w+)", key
    )
    if match is None:
        return None
    stage, block, layer, kind, leaf = match.groups()
    if layer is None:
        name = f"downsample.{'0' if kind == 'convolution' else '1'}"
    else:
        name = f"{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{name}.{leaf}"
