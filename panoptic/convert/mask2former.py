"""Keys and configurations of Mask2Former, from facebookresearch/Mask2Former and from Hugging Face transformers.

ResNets and Swins with the deformable pixel decoder. Options that weights do not tell: attention heads (8) and the
number of points that the losses draw (12,544). A ResNet's norms are frozen where the file has no counters of batches
(COCO), and synchronised where it has (Cityscapes); Hugging Face's are plain batch norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from panoptic.convert.backbones import count_layers
from panoptic.convert.family import Family, Rules, weight
from panoptic.convert.maskformer import (
    EMPTY_WEIGHT,
    common,
    from_transformers,
    renamed,
    transformers_backbone_key,
    unsynchronised,
    with_pixel_decoder,
)
from panoptic.convert.swin import published_backbone_key
from panoptic.models.mask2former.config import LEVELS, Mask2FormerConfig
from panoptic.segmentation import Categories

HEADS = 8
"""Attention heads of the published models."""

PIXELS = r"sem_seg_head\.pixel_decoder\."
QUERIES = r"sem_seg_head\.predictor\."
SAMPLING = "sampling_offsets|attention_weights|value_proj|output_proj"
CONV = {"0": "conv", "1": "norm", "weight": "conv.weight"}
ATTENTION = r"in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias"

ORIGINAL_RULES: Rules = (
    (r"backbone\.(.+)", lambda m: f"backbone.{published_backbone_key(m[1])}"),
    (PIXELS + r"input_proj\.([012])\.([01])\.(\w+)", lambda m: f"pixel_decoder.projections.{m[1]}.{m[2]}.{m[3]}"),
    (PIXELS + r"transformer\.level_embed", lambda m: "pixel_decoder.level_embedding"),
    (
        PIXELS + rf"transformer\.(encoder\.layers\.\d+)\.self_attn\.((?:{SAMPLING})\.\w+)",
        lambda m: f"pixel_decoder.{m[1]}.self_attention.{m[2]}",
    ),
    (
        PIXELS + r"transformer\.(encoder\.layers\.\d+\.(?:norm|linear)[12]\.\w+)",
        lambda m: f"pixel_decoder.{m[1]}",
    ),
    (
        PIXELS + r"(adapter|layer)_1\.(weight|norm\.weight|norm\.bias)",
        lambda m: f"pixel_decoder.{m[1]}.{CONV.get(m[2], m[2])}",
    ),
    (PIXELS + r"mask_features\.(\w+)", lambda m: f"pixel_decoder.mask_features.{m[1]}"),
    (QUERIES + r"(?:query_feat|static_query)\.weight", lambda m: "decoder.query_content.weight"),
    (QUERIES + r"query_embed\.weight", lambda m: "decoder.query_positions.weight"),
    (QUERIES + r"level_embed\.weight", lambda m: "decoder.level_embedding.weight"),
    (QUERIES + r"decoder_norm\.(\w+)", lambda m: f"decoder.norm.{m[1]}"),
    (QUERIES + r"class_embed\.(\w+)", lambda m: f"decoder.class_head.{m[1]}"),
    (QUERIES + r"mask_embed\.(layers\.[012]\.\w+)", lambda m: f"decoder.mask_head.{m[1]}"),
    (
        QUERIES + rf"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.({ATTENTION})",
        lambda m: f"decoder.layers.{m[1]}.cross_attention.{m[2]}",
    ),
    (QUERIES + r"transformer_cross_attention_layers\.(\d+)\.norm\.(\w+)", lambda m: _norm(m[1], 1, m[2])),
    (
        QUERIES + rf"transformer_self_attention_layers\.(\d+)\.self_attn\.({ATTENTION})",
        lambda m: f"decoder.layers.{m[1]}.self_attention.{m[2]}",
    ),
    (QUERIES + r"transformer_self_attention_layers\.(\d+)\.norm\.(\w+)", lambda m: _norm(m[1], 2, m[2])),
    (
        QUERIES + r"transformer_ffn_layers\.(\d+)\.(linear[12]\.\w+)",
        lambda m: f"decoder.layers.{m[1]}.{m[2]}",
    ),
    (QUERIES + r"transformer_ffn_layers\.(\d+)\.norm\.(\w+)", lambda m: _norm(m[1], 3, m[2])),
    (r"criterion\.empty_weight", lambda m: EMPTY_WEIGHT),
)

LEVEL_MODULE = r"model\.pixel_level_module\.decoder\."
QUERY_MODULE = r"model\.transformer_module\."
DECODER_LAYER = QUERY_MODULE + r"decoder\.layers\.(\d+)\."

TRANSFORMERS_RULES: Rules = (
    (r"model\.pixel_level_module\.encoder\.(.+)", lambda m: transformers_backbone_key(m[1])),
    (
        LEVEL_MODULE + r"input_projections\.([012])\.([01])\.(\w+)",
        lambda m: f"pixel_decoder.projections.{m[1]}.{m[2]}.{m[3]}",
    ),
    (LEVEL_MODULE + r"level_embed", lambda m: "pixel_decoder.level_embedding"),
    (
        LEVEL_MODULE + rf"(encoder\.layers\.\d+)\.self_attn\.((?:{SAMPLING})\.\w+)",
        lambda m: f"pixel_decoder.{m[1]}.self_attention.{m[2]}",
    ),
    (
        LEVEL_MODULE + r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(\w+)",
        lambda m: f"pixel_decoder.{m[1]}.norm1.{m[2]}",
    ),
    (
        LEVEL_MODULE + r"(encoder\.layers\.\d+)\.(?:mlp\.)?fc([12])\.(\w+)",
        lambda m: f"pixel_decoder.{m[1]}.linear{m[2]}.{m[3]}",
    ),
    (
        LEVEL_MODULE + r"(encoder\.layers\.\d+)\.final_layer_norm\.(\w+)",
        lambda m: f"pixel_decoder.{m[1]}.norm2.{m[2]}",
    ),
    (LEVEL_MODULE + r"(adapter|layer)_1\.([01])\.(\w+)", lambda m: f"pixel_decoder.{m[1]}.{CONV[m[2]]}.{m[3]}"),
    (LEVEL_MODULE + r"mask_projection\.(\w+)", lambda m: f"pixel_decoder.mask_features.{m[1]}"),
    (QUERY_MODULE + r"queries_features\.weight", lambda m: "decoder.query_content.weight"),
    (QUERY_MODULE + r"queries_embedder\.weight", lambda m: "decoder.query_positions.weight"),
    (QUERY_MODULE + r"level_embed\.weight", lambda m: "decoder.level_embedding.weight"),
    (QUERY_MODULE + r"decoder\.layernorm\.(\w+)", lambda m: f"decoder.norm.{m[1]}"),
    (
        QUERY_MODULE + r"decoder\.mask_predictor\.mask_embedder\.([012])\.0\.(\w+)",
        lambda m: f"decoder.mask_head.layers.{m[1]}.{m[2]}",
    ),
    (
        DECODER_LAYER + rf"(self|cross)_attn\.({ATTENTION})",
        lambda m: f"decoder.layers.{m[1]}.{m[2]}_attention.{m[3]}",
    ),
    (DECODER_LAYER + r"self_attn\.o_proj\.(\w+)", lambda m: f"decoder.layers.{m[1]}.self_attention.out_proj.{m[2]}"),
    (DECODER_LAYER + r"(?:mlp\.)?fc([12])\.(\w+)", lambda m: f"decoder.layers.{m[1]}.linear{m[2]}.{m[3]}"),
    (DECODER_LAYER + r"cross_attn_layer_norm\.(\w+)", lambda m: _norm(m[1], 1, m[2])),
    (DECODER_LAYER + r"self_attn_layer_norm\.(\w+)", lambda m: _norm(m[1], 2, m[2])),
    (DECODER_LAYER + r"final_layer_norm\.(\w+)", lambda m: _norm(m[1], 3, m[2])),
    (r"class_predictor\.(\w+)", lambda m: f"decoder.class_head.{m[1]}"),
    (r"criterion\.empty_weight", lambda m: EMPTY_WEIGHT),
)


def _norm(layer: str, place: int, leaf: str) -> str:
    """Our name of a norm of a decoder layer."""
    return f"decoder.layers.{layer}.norm{place}.{leaf}"


def _build(weights: Mapping[str, Tensor], categories: Categories) -> tuple[Mask2FormerConfig, Mapping[str, Tensor]]:
    fields, weights = common(weights, categories)
    queries = weight(weights, "decoder.query_content.weight")
    samples = len(weight(weights, "pixel_decoder.encoder.layers.0.self_attention.attention_weights.weight"))
    config = Mask2FormerConfig(
        channels=queries.shape[1],
        mask_channels=len(weight(weights, "pixel_decoder.mask_features.weight")),
        encoder_layers=count_layers(weights, "pixel_decoder.encoder.layers."),
        encoder_hidden=len(weight(weights, "pixel_decoder.encoder.layers.0.linear1.weight")),
        points_per_level=max(1, samples // (HEADS * LEVELS)),
        decoder_layers=count_layers(weights, "decoder.layers."),
        decoder_hidden=len(weight(weights, "decoder.layers.0.linear1.weight")),
        heads=HEADS,
        queries=len(queries),
        **fields,
    )
    return config, weights


ORIGINAL = Family(
    recognise=lambda state: any(re.match(QUERIES + "transformer_cross_attention_layers", key) for key in state),
    rename=renamed(ORIGINAL_RULES),
    build=_build,
    translate=with_pixel_decoder,
)
"""facebookresearch/Mask2Former."""

TRANSFORMERS = Family(
    recognise=lambda state: any(re.match(LEVEL_MODULE + "input_projections", key) for key in state),
    rename=renamed(TRANSFORMERS_RULES),
    build=lambda weights, categories: unsynchronised(_build(weights, categories)),
    translate=from_transformers,
)
"""`Mask2FormerForUniversalSegmentation` of Hugging Face transformers 4 and 5."""
