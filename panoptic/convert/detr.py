"""Keys and configurations of DETR, from facebookresearch/detr and from Hugging Face transformers.

Detection and panoptic models, which differ in the mask head. The head's logits are the dataset's own category
ids (COCO's: 250 for panoptic models, 91 for detection), so the categories' `ids` say which logit is which; a
head with as many logits as there are categories is taken in their order. Options that weights do not tell: the output
stride (32; 16 for DC5), attention heads (8), thresholds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from panoptic.convert.backbones import backbone_config, count_layers, part
from panoptic.convert.family import Family, Rules, our_name, weight
from panoptic.convert.transformer import join_projections, original_key, resnet_key, transformers_key
from panoptic.models.detr.config import DETRConfig
from panoptic.segmentation import Categories

PUBLISHED_MASK_HEAD: Rules = (
    (r"lay([1-5])\.(weight|bias)", lambda m: f"convs.{int(m[1]) - 1}.{m[2]}"),
    (r"gn([1-5])\.(weight|bias)", lambda m: f"norms.{int(m[1]) - 1}.{m[2]}"),
    (r"adapter([1-3])\.(weight|bias)", lambda m: f"adapters.{int(m[1]) - 1}.{m[2]}"),
    (r"out_lay\.(weight|bias)", lambda m: f"predictor.{m[1]}"),
    # the names of transformers 5
    (r"conv([12])\.conv\.(weight|bias)", lambda m: f"convs.{int(m[1]) - 1}.{m[2]}"),
    (r"conv([12])\.norm\.(weight|bias)", lambda m: f"norms.{int(m[1]) - 1}.{m[2]}"),
    (r"fpn_stages\.([012])\.fpn_adapter\.(weight|bias)", lambda m: f"adapters.{m[1]}.{m[2]}"),
    (r"fpn_stages\.([012])\.refine\.conv\.(weight|bias)", lambda m: f"convs.{int(m[1]) + 2}.{m[2]}"),
    (r"fpn_stages\.([012])\.refine\.norm\.(weight|bias)", lambda m: f"norms.{int(m[1]) + 2}.{m[2]}"),
    (r"output_conv\.(weight|bias)", lambda m: f"predictor.{m[1]}"),
)


def _original_keys(state: Mapping[str, object]) -> dict[str, str | None]:
    return {key: _original_key(key) for key in state}


def _transformers_keys(state: Mapping[str, object]) -> dict[str, str | None]:
    return {key: _transformers_key(key) for key in state}


def _original_key(key: str) -> str | None:
    """Our name of a key of facebookresearch/detr, None if it has no such key."""
    if (masks := _mask_key(key)) is not None:
        return masks
    inner = key.removeprefix("detr.")
    rules: Rules = (
        (r"backbone\.0\.body\.(.+)", lambda m: f"backbone.{m[1]}"),
        (r"backbone\.1\.(row|col)_embed\.weight", lambda m: _position_key(m[1])),
        (r"transformer\.(.+)", lambda m: original_key(m[1])),
        (r"class_embed\.(weight|bias)", lambda m: f"class_head.layers.0.{m[1]}"),
        (r"bbox_embed\.(layers\.[012]\.(?:weight|bias))", lambda m: f"box_head.{m[1]}"),
        (r"query_embed\.weight", lambda m: "queries.weight"),
        (r"input_proj\.(weight|bias)", lambda m: f"projection.{m[1]}"),
    )
    return our_name(rules, inner)


def _transformers_key(key: str) -> str | None:
    """Our name of a key of Hugging Face's classes after `join_projections`, None if they have no such key."""
    if (masks := _mask_key(key)) is not None:
        return masks
    inner = key.removeprefix("detr.")
    rules: Rules = (
        (r"model\.backbone\.(?:conv_encoder\.)?model\.(.+)", lambda m: f"backbone.{resnet_key(m[1]) or m[1]}"),
        (r"model\.(?:backbone\.)?position_embedding\.(row|column)_embeddings\.weight", lambda m: _position_key(m[1])),
        (r"model\.((?:en|de)coder\..+)", lambda m: transformers_key(m[1])),
        (r"model\.query_position_embeddings\.weight", lambda m: "queries.weight"),
        (r"model\.input_projection\.(weight|bias)", lambda m: f"projection.{m[1]}"),
        (r"class_labels_classifier\.(weight|bias)", lambda m: f"class_head.layers.0.{m[1]}"),
        (r"bbox_predictor\.(layers\.[012]\.(?:weight|bias))", lambda m: f"box_head.{m[1]}"),
    )
    return our_name(rules, inner)


def _position_key(axis: str) -> str:
    return f"positions.{'rows' if axis == 'row' else 'columns'}.weight"


def _mask_key(key: str) -> str | None:
    """Our name of a key of the mask head, under the names of either project."""
    if match := re.fullmatch(r"bbox_attention\.([qk])_(?:linear|proj)\.(weight|bias)", key):
        return f"mask_attention.{'query' if match[1] == 'q' else 'key'}.{match[2]}"
    if not key.startswith("mask_head."):
        return None
    inner = key.removeprefix("mask_head.")
    name = our_name(PUBLISHED_MASK_HEAD, inner)
    return None if name is None else f"mask_head.{name}"


def _build(weights: Mapping[str, Tensor], categories: Categories) -> tuple[DETRConfig, Mapping[str, Tensor]]:
    logits = len(weight(weights, "class_head.layers.0.weight")) - 1
    masks = any(key.startswith(("mask_head.", "mask_attention.")) for key in weights)
    default = DETRConfig()
    config = replace(
        default,
        backbone=replace(backbone_config(part(weights, "backbone.")), norm="frozen", freeze=2),
        channels=len(weight(weights, "projection.weight")),
        hidden=len(weight(weights, "encoder.layers.0.linear1.weight")),
        encoder_layers=count_layers(weights, "encoder.layers."),
        decoder_layers=count_layers(weights, "decoder.layers."),
        queries=len(weight(weights, "queries.weight")),
        pre_norm="encoder.norm.weight" in weights,
        positions="learned" if "positions.rows.weight" in weights else "sine",
        masks=masks,
        mask_channels=2 * len(weight(weights, "mask_head.convs.1.weight")) if masks else default.mask_channels,
        logits=0 if logits == len(categories) else logits,
    )
    return config, {**weights, "classes.index": class_index(logits, categories)}


def class_index(logits: int, categories: Categories) -> Tensor:
    """int64 [C], the logit of each category: its id, or its place where as many logits as categories have other ids.

    Raises:
        ValueError: an id has no logit.
    """
    if logits == len(categories) and set(categories.ids) != set(range(logits)):
        return torch.arange(logits)
    beyond = [f"{i} ({name})" for i, name in zip(categories.ids, categories.names, strict=True) if not 0 <= i < logits]
    if beyond:
        raise ValueError(
            f"categories: the checkpoint's head has {logits} logits, one a category id; none for "
            f"{', '.join(beyond[:8])}; give the categories of the published model with its ids"
        )
    return torch.tensor(categories.ids)


ORIGINAL = Family(
    recognise=lambda state: any(re.match(r"(detr\.)?transformer\.encoder\.layers\.", key) for key in state),
    rename=_original_keys,
    build=_build,
)
"""facebookresearch/detr."""

TRANSFORMERS = Family(
    recognise=lambda state: any(re.match(r"(detr\.)?class_labels_classifier\.", key) for key in state),
    rename=_transformers_keys,
    build=_build,
    translate=join_projections,
)
"""`DetrForSegmentation` and `DetrForObjectDetection` of Hugging Face transformers 4 and 5."""
