"""Swin Transformers inside published models: the names of the original and of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.swin import SWINS
from panoptic.backbones.weights import backbone_key
from panoptic.convert.backbones import backbone_config
from panoptic.convert.transformer import join_projections

COMPUTED = r"(.*\.)?(relative_position_index|attn_mask)"
"""Tables that follow from the size of a window."""

HUGGING_FACE = (
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (r"encoder\.(layers\.\d\.downsample\.(?:reduction|norm)\.\w+)", r"\1"),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.layernorm_before\.(\w+)", r"\1.norm1.\2"),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.layernorm_after\.(\w+)", r"\1.norm2.\2"),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.attention\.in_proj_(weight|bias)", r"\1.attn.qkv.\2"),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.(\w+)", r"\1.attn.proj.\2"),
    (
        r"encoder\.(layers\.\d\.blocks\.\d+)\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
        r"\1.attn.relative_position_bias_table",
    ),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"\1.mlp.fc1.\2"),
    (r"encoder\.(layers\.\d\.blocks\.\d+)\.(?:output\.dense|mlp\.fc2)\.(\w+)", r"\1.mlp.fc2.\2"),
    (r"hidden_states_norms\.(\d)\.(\w+)", r"norm\1.\2"),
)
"""Names of versions 4 and 5 below the backbone, once query, key and value are one; ours are the original's."""


def published_backbone_key(key: str) -> str:
    """Our name of a backbone's key in detectron2's projects: ResNets renamed, Swins as they are."""
    return key if re.match(r"patch_embed\.|layers\.\d|norm\d\.", key) else backbone_key(key)


def transformers_swin_key(key: str) -> str | None:
    """Our name of a key below Hugging Face's Swin backbone, after `transformers_swin`, or None."""
    key = re.sub(r"^(model|swin)\.", "", key)
    if match := re.fullmatch(r"hidden_states_norms\.stage(\d)\.(\w+)", key):  # counted from 1
        return f"norm{int(match[1]) - 1}.{match[2]}"
    return next((re.sub(rule, name, key) for rule, name in HUGGING_FACE if re.fullmatch(rule, key)), None)


def without_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the tables that are computed from the size of a window (`COMPUTED`)."""
    return {key: value for key, value in state.items() if not re.fullmatch(COMPUTED, key)}


def transformers_swin(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state with query, key and value joined, without tables and the norm behind the last stage.

    Nothing reads that norm.

    Args:
        prefix: of the backbone.
    """
    unused = re.compile(re.escape(prefix) + r"(model\.|swin\.)?layernorm\.(weight|bias)")
    named = {
        re.sub(r"attention\.self\.(query|key|value)\.", lambda m: f"attention.{m[1][0]}_proj.", key): value
        for key, value in without_tables(state).items()
        if not unused.fullmatch(key)
    }
    return join_projections(named, "attention")


def swin_config(backbone: Mapping[str, Tensor]) -> Backbone:
    """The ResNet or Swin that these weights (our names) are of; Swin's stochastic depth is the published 0.3.

    Raises:
        ValueError: the blocks are those of neither.
    """
    config = backbone_config(backbone)
    return replace(config, drop_path=0.3) if config.name in SWINS else config
