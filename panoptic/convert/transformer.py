"""Names of DETR's encoder and decoder, which MaskFormer shares, and of ResNets inside Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

ATTENTION = {"self_attn": "self_attention", "multihead_attn": "cross_attention", "encoder_attn": "cross_attention"}

LAYER_NORMS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"},
}
"""Of Hugging Face, by part."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def original_key(key: str) -> str | None:
    """Our name of `encoder.layers.0.self_attn.in_proj_weight` and the like of facebookresearch/detr, or None."""
    if re.fullmatch(r"(encoder|decoder)\.norm\.(weight|bias)", key):
        return key
    attention = r"(self_attn|multihead_attn)\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)"
    if found := re.fullmatch(rf"((?:encoder|decoder)\.layers\.\d+)\.{attention}", key):
        return f"{found[1]}.{ATTENTION[found[2]]}.{found[3]}"
    return key if re.fullmatch(r"(encoder|decoder)\.layers\.\d+\.(linear[12]|norm[123])\.(weight|bias)", key) else None


def transformers_key(key: str) -> str | None:
    """Our name of a key of Hugging Face's encoder or decoder after `join_projections`, of 4.x and 5.x, or None."""
    if found := re.fullmatch(r"decoder\.layernorm\.(weight|bias)", key):
        return f"decoder.norm.{found[1]}"
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    part, layer, rest = match.groups()
    if found := re.fullmatch(r"(self_attn|encoder_attn)\.(in_proj_weight|in_proj_bias)", rest):
        rest = f"{ATTENTION[found[1]]}.{found[2]}"
    elif found := re.fullmatch(r"(self_attn|encoder_attn)\.(?:o_proj|out_proj)\.(weight|bias)", rest):
        rest = f"{ATTENTION[found[1]]}.out_proj.{found[2]}"
    elif found := re.fullmatch(r"(?:mlp\.)?fc([12])\.(weight|bias)", rest):
        rest = f"linear{found[1]}.{found[2]}"
    elif (found := re.fullmatch(r"(\w+_layer_norm)\.(weight|bias)", rest)) and found[1] in LAYER_NORMS[part]:
        rest = f"{LAYER_NORMS[part][found[1]]}.{found[2]}"
    else:
        return None
    return f"{part}.layers.{layer}.{rest}"


def join_projections(state: Mapping[str, Tensor], attentions: str = "self_attn|encoder_attn") -> dict[str, Tensor]:
    """Separate projections of query, key and value as the one matrix `in_proj_weight` (and bias) of the originals.

    Args:
        state: names and tensors.
        attentions: names of the modules, alternatives of a regular expression. Incomplete triples stay as they are.
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
    if found := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", key):
        return f"{'conv1' if found[1] == 'convolution' else 'bn1'}.{found[2]}"
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
