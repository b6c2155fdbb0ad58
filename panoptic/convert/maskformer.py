"""Keys and configurations of MaskFormer, from facebookresearch/MaskFormer and from Hugging Face transformers.

ResNets and Swins, both pixel decoders. Options that weights do not tell: attention heads (8), dropout, and batch
padding (none beyond the largest image with COCO's 133 classes, else to multiples of 32). A ResNet's norms are frozen
where the file has no counters of batches, and synchronised where it has; Hugging Face's are plain batch norms. One with
three convolutions as stem is taken for the published R101c, whose last stage dilates its blocks by 1, 2 and 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.convert.backbones import count_layers, part
from panoptic.convert.family import COCO_CLASSES, Family, Rules, our_name, same_classes, weight
from panoptic.convert.swin import (
    published_backbone_key,
    swin_config,
    transformers_swin,
    transformers_swin_key,
    without_tables,
)
from panoptic.convert.transformer import join_projections, original_key, resnet_key, transformers_key
from panoptic.models.maskformer.config import MaskFormerConfig
from panoptic.segmentation import Categories

ENCODER = "model.pixel_level_module.encoder."
"""Hugging Face's prefix of a backbone."""

EMPTY_WEIGHT = "criterion.empty_weight"
"""The class weights of the loss, which both projects store: ones, and that of "no object"."""

CONV = {"0": "conv", "1": "norm", "weight": "conv.weight"}

ORIGINAL_RULES: Rules = (
    (r"backbone\.(.+)", lambda m: f"backbone.{published_backbone_key(m[1])}"),
    (r"sem_seg_head\.pixel_decoder\.adapter_([123])\.(.+)", lambda m: _layer(f"adapters.{3 - int(m[1])}", m[2])),
    (r"sem_seg_head\.pixel_decoder\.layer_([1234])\.(.+)", lambda m: _layer(f"layers.{4 - int(m[1])}", m[2])),
    (r"sem_seg_head\.pixel_decoder\.mask_features\.(\w+)", lambda m: f"pixel_decoder.mask_features.{m[1]}"),
    (r"sem_seg_head\.pixel_decoder\.input_proj\.(\w+)", lambda m: f"pixel_decoder.project.{m[1]}"),
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.(encoder\..+)",
        lambda m: _below("pixel_decoder.", original_key(m[1])),
    ),
    (r"sem_seg_head\.predictor\.transformer\.(decoder\..+)", lambda m: original_key(m[1])),
    (r"sem_seg_head\.predictor\.query_embed\.weight", lambda m: "query_positions.weight"),
    (r"sem_seg_head\.predictor\.input_proj\.(\w+)", lambda m: f"project.{m[1]}"),
    (r"sem_seg_head\.predictor\.class_embed\.(\w+)", lambda m: f"class_head.{m[1]}"),
    (r"sem_seg_head\.predictor\.mask_embed\.(layers\.[012]\.\w+)", lambda m: f"mask_head.{m[1]}"),
    (r"criterion\.empty_weight", lambda m: EMPTY_WEIGHT),
)

TRANSFORMERS_RULES: Rules = (
    (r"model\.pixel_level_module\.encoder\.(.+)", lambda m: transformers_backbone_key(m[1])),
    (
        r"model\.pixel_level_module\.decoder\.fpn\.stem\.([01])\.(\w+)",
        lambda m: f"pixel_decoder.layers.0.{CONV[m[1]]}.{m[2]}",
    ),
    (
        r"model\.pixel_level_module\.decoder\.fpn\.layers\.([012])\.proj\.([01])\.(\w+)",
        lambda m: f"pixel_decoder.adapters.{m[1]}.{CONV[m[2]]}.{m[3]}",
    ),
    (
        r"model\.pixel_level_module\.decoder\.fpn\.layers\.([012])\.block\.([01])\.(\w+)",
        lambda m: f"pixel_decoder.layers.{int(m[1]) + 1}.{CONV[m[2]]}.{m[3]}",
    ),
    (
        r"model\.pixel_level_module\.decoder\.mask_projection\.(\w+)",
        lambda m: f"pixel_decoder.mask_features.{m[1]}",
    ),
    (r"model\.transformer_module\.(decoder\..+)", lambda m: transformers_key(m[1])),
    (r"model\.transformer_module\.queries_embedder\.weight", lambda m: "query_positions.weight"),
    (r"model\.transformer_module\.input_projection\.(\w+)", lambda m: f"project.{m[1]}"),
    (r"class_predictor\.(\w+)", lambda m: f"class_head.{m[1]}"),
    (r"mask_embedder\.([012])\.0\.(\w+)", lambda m: f"mask_head.layers.{m[1]}.{m[2]}"),
    (r"criterion\.empty_weight", lambda m: EMPTY_WEIGHT),
)


def renamed(rules: Rules) -> Callable[[Mapping[str, object]], dict[str, str | None]]:
    """The function `Family.rename` of some rules."""

    def rename(state: Mapping[str, object]) -> dict[str, str | None]:
        return {key: our_name(rules, key) for key in state}

    return rename


def _layer(prefix: str, leaf: str) -> str | None:
    """detectron2's convolution holds its norm: `weight`, `norm.weight`, `norm.bias`."""
    if leaf not in ("weight", "norm.weight", "norm.bias"):
        return None
    return f"pixel_decoder.{prefix}.{CONV.get(leaf, leaf)}"


def _below(prefix: str, name: str | None) -> str | None:
    """A name with its prefix, None for none."""
    return None if name is None else f"{prefix}{name}"


def transformers_backbone_key(key: str) -> str | None:
    """Our name of a key below Hugging Face's backbone, a ResNet or a Swin."""
    return _below("backbone.", resnet_key(key) or transformers_swin_key(key))


def with_pixel_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under today's names, where the pixel decoder has a name of its own; tables are left out."""
    return {
        re.sub(r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder.", key): value
        for key, value in without_tables(state).items()
    }


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with query, key and value joined, and without tensors that nothing reads."""
    return join_projections(transformers_swin(state, ENCODER))


def common(weights: Mapping[str, Tensor], categories: Categories) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields that MaskFormer and Mask2Former share, and the weights without those of the loss.

    Raises:
        ValueError: the head has another number of classes, or the loss weighs classes differently.
    """
    classes = len(
        weight(weights, "class_head.weight" if "class_head.weight" in weights else "decoder.class_head.weight")
    )
    same_classes(classes - 1, categories)
    fields: dict[str, Any] = {"backbone": _backbone(part(weights, "backbone."))}
    if EMPTY_WEIGHT in weights:
        values = weights[EMPTY_WEIGHT]
        if len(values) != classes or not (values[:-1] == 1).all():
            raise ValueError(
                f"convert: {EMPTY_WEIGHT} is not 1 for each of {classes - 1} classes, and one for no object"
            )
        fields["no_object_weight"] = round(float(values[-1]), 6)
    return fields, {key: value for key, value in weights.items() if key != EMPTY_WEIGHT}


def _backbone(backbone: Mapping[str, Tensor]) -> Backbone:
    """The backbone's configuration, as the module's docstring tells it from the weights."""
    config = swin_config(backbone)
    if config.name.startswith("swin"):
        return config
    if config.stem == "deeplab":  # the published R101c
        config = replace(config, multigrid=(1, 2, 4))
    return replace(config, norm="sync" if "bn1.num_batches_tracked" in backbone else "frozen")


def unsynchronised(built: tuple[Any, Mapping[str, Tensor]]) -> tuple[Any, Mapping[str, Tensor]]:
    """Configuration and weights with plain batch norms in a ResNet: Hugging Face's counters do not tell the norm."""
    config, weights = built
    if not config.backbone.name.startswith("swin"):
        config = replace(config, backbone=replace(config.backbone, norm="batch"))
    return config, weights


def _build(weights: Mapping[str, Tensor], categories: Categories) -> tuple[MaskFormerConfig, Mapping[str, Tensor]]:
    fields, weights = common(weights, categories)
    queries = weight(weights, "query_positions.weight")
    config = MaskFormerConfig(
        divisor=1 if len(categories) == COCO_CLASSES else 32,
        channels=queries.shape[1],
        mask_channels=len(weight(weights, "pixel_decoder.mask_features.weight")),
        encoder_layers=count_layers(weights, "pixel_decoder.encoder.layers."),
        decoder_layers=count_layers(weights, "decoder.layers."),
        hidden=len(weight(weights, "decoder.layers.0.linear1.weight")),
        queries=len(queries),
        **fields,
    )
    return config, weights


ORIGINAL = Family(
    recognise=lambda state: any(key.startswith("sem_seg_head.predictor.transformer.decoder.") for key in state),
    rename=renamed(ORIGINAL_RULES),
    build=_build,
    translate=with_pixel_decoder,
)
"""facebookresearch/MaskFormer."""

TRANSFORMERS = Family(
    recognise=lambda state: any(key.startswith("model.pixel_level_module.decoder.fpn.") for key in state),
    rename=renamed(TRANSFORMERS_RULES),
    build=lambda weights, categories: unsynchronised(_build(weights, categories)),
    translate=from_transformers,
)
"""`MaskFormerForInstanceSegmentation` of Hugging Face transformers 4 and 5."""
