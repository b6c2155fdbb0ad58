"""Keys and configurations of EoMT, from tue-mps/eomt and from Hugging Face transformers, with DINOv2's ViT or DINOv3's.

What a file does not tell (`Hints`): heads (one for 64 channels in every published model), the canvas of DINOv3 (640
pixels, the side of all but one published model) and, where it lacks `attn_mask_probs`, the blocks that hold queries
(the published number for the depth). Buffers tell nothing else: a converted model needs no masks of attention.

Published files with DINOv3 hold the differences of the ViT from the one that the training began with, which has its
own licence; that one is added here (`Hints.base`). Nothing in a file says that it holds differences, so they are told
by the weights of the norms, which are near 0 then and near 1 else: a rule of ours, which `Hints.whole` overrules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.vit_names import timm_vit_names
from panoptic.convert.backbones import count_layers, part
from panoptic.convert.family import Family, Hints, State, same_classes, weight
from panoptic.models.eomt.config import EoMTConfig
from panoptic.segmentation import Categories

BODY = "backbone.body."
"""Our prefix of the ViT."""

PROBABILITIES, CLASS_WEIGHTS = "attn_mask_probs", "criterion.empty_weight"
"""Buffers of both projects: of the blocks that hold queries, and of the loss."""

ENCODER = "encoder.backbone."
"""The original's prefix of the ViT, below `network.`."""

ORIGINAL_HEADS = (
    (r"q\.weight", "queries.weight"),
    (r"(class_head\.\w+|mask_head\.[024]\.\w+|upscale\.\d+\.(?:conv1|conv2|norm)\.\w+)", r"\1"),
)
TRANSFORMERS_HEADS = (
    (r"query\.weight", "queries.weight"),
    (r"class_predictor\.(\w+)", r"class_head.\1"),
    (r"mask_head\.fc1\.(\w+)", r"mask_head.0.\1"),
    (r"mask_head\.fc2\.(\w+)", r"mask_head.2.\1"),
    (r"mask_head\.fc3\.(\w+)", r"mask_head.4.\1"),
    (r"upscale_block\.block\.(\d+)\.(conv[12])\.(\w+)", r"upscale.\1.\2.\3"),
    (r"upscale_block\.block\.(\d+)\.layernorm2d\.(\w+)", r"upscale.\1.norm.\2"),
)
"""Names outside of the ViT, and ours."""

DINOV2 = {
    "vit_small_patch14_reg4_dinov2": (384, 12, 1536),
    "vit_base_patch14_reg4_dinov2": (768, 12, 3072),
    "vit_large_patch14_reg4_dinov2": (1024, 24, 4096),
    "vit_giant_patch14_reg4_dinov2": (1536, 40, 8192),
}
DINOV3 = {
    "vit_small_patch16_dinov3_qkvb": (384, 12, 1536),
    "vit_base_patch16_dinov3_qkvb": (768, 12, 3072),
    "vit_large_patch16_dinov3_qkvb": (1024, 24, 4096),
}
"""Channels, blocks and rows of the first layer of an MLP of each ViT, by timm's name."""

NO_HINTS = Hints()

PUBLISHED_BLOCKS = {12: 3, 24: 4, 40: 5}
"""Blocks that hold queries, by the number of all blocks."""

CANVAS = 640
"""The side that DINOv3's models see, but for one."""

HEAD = 64
"""Channels of a head in all published models."""

DIFFERENCE = 0.3
"""Weights of norms that are smaller in the mean are taken for differences: a training moves them by hundredths, and
they begin with 1."""


def _is_parameter(name: str) -> bool:
    """True for our name of a parameter, False for what no rule knows."""
    outside = r"queries\.weight|class_head\.\w+|mask_head\.[024]\.\w+|upscale\.\d+\.(conv1|conv2|norm)\.\w+"
    return name.startswith(BODY) or re.fullmatch(outside, name) is not None


def _renamed(state: Mapping[str, object]) -> dict[str, str | None]:
    """Our names, which `_translated` gave already; None for what it did not know."""
    return {key: key if _is_parameter(key) or key in (PROBABILITIES, CLASS_WEIGHTS) else None for key in state}


def _outside(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The weights outside of the ViT under our names; unknown ones keep theirs."""
    return {
        next((re.sub(rule, name, key) for rule, name in rules if re.fullmatch(rule, key)), key): value
        for key, value in state.items()
    }


def _from_original(state: State, hints: Hints) -> State:
    """The original's weights under our names; unknown ones keep theirs."""
    named = {key.replace("_orig_mod.", ""): torch.as_tensor(value) for key, value in state.items()}
    pixels = ("network.encoder.pixel_mean", "network.encoder.pixel_std")
    network = part({key: value for key, value in named.items() if key not in pixels}, "network.")
    outside = {key: value for key, value in network.items() if not key.startswith(ENCODER)}
    elsewhere = {key: value for key, value in named.items() if not key.startswith("network.")}
    return _with_base(part(network, ENCODER), {**_outside(outside, ORIGINAL_HEADS), **elsewhere}, hints)


def _from_transformers(state: State, hints: Hints) -> State:
    """Hugging Face's weights under our names; unknown ones keep theirs."""
    named = {key: torch.as_tensor(value) for key, value in state.items()}
    inside = re.compile(r"(embeddings|layers|layernorm)\..+")
    vit = {key: value for key, value in named.items() if inside.fullmatch(key)}
    others = {key: value for key, value in named.items() if key not in vit}
    return _with_base(vit, _outside(others, TRANSFORMERS_HEADS), hints)


def _with_base(vit: State, others: State, hints: Hints) -> State:
    """All weights under our names, with the ViT's added to its differences.

    Raises:
        ValueError: the file holds differences and there is no base, or the base is of no use.
    """
    vit = timm_vit_names(vit)
    rotary = "pos_embed" not in vit
    norms = [
        value.float().abs().mean() for key, value in vit.items() if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)
    ]
    differences = rotary and bool(norms) and float(torch.stack(norms).mean()) < DIFFERENCE
    if hints.base is not None:
        if not differences:
            raise ValueError(
                "convert: --base: the weights of the ViT's norms are not near 0, so the file holds the ViT itself and "
                "no differences from one; leave --base out"
            )
        vit = _added(vit, timm_vit_names(hints.base))
        others = {key: value for key, value in others.items() if key != CLASS_WEIGHTS}  # a difference, like any buffer
    elif differences and not hints.whole:
        letter = {384: "s", 768: "b", 1024: "l"}.get(next(iter(vit.values())).shape[-1], "{s,b,l}")
        raise ValueError(
            "convert: the ViT's norms have weights near 0, so this file holds differences from DINOv3, as EoMT "
            f"publishes them: add --base FILE, the weights of facebook/dinov3-vit{letter}16-pretrain-lvd1689m "
            "(under Meta's licence), or --base none if it holds the ViT itself"
        )
    return {**{f"{BODY}{key}": value for key, value in vit.items()}, **others}


def _added(differences: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ViT of differences from a base, both under timm's names.

    Raises:
        ValueError: the base lacks some of the parameters, or they have other shapes; lists them.
    """
    wrong = [key for key, value in differences.items() if key not in base or base[key].shape != value.shape]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            "convert: --base: not the ViT that the file holds differences from; it lacks these, or they have another "
            f"shape (timm's names): {', '.join(wrong[:8])}{more}"
        )
    return {key: value + base[key].to(value.dtype) for key, value in differences.items()}


def _build(weights: State, categories: Categories, hints: Hints) -> tuple[EoMTConfig, State]:
    """The configuration that the shapes tell, and the weights without buffers."""
    same_classes(len(weight(weights, "class_head.weight")) - 1, categories)
    kernel = weight(weights, f"{BODY}patch_embed.proj.weight")
    fields = _backbone(weights, hints) | _no_object_weight(weights)
    patch = kernel.shape[-1]
    canvas = _canvas(weights, patch, hints)
    config = EoMTConfig(
        divisor=canvas[0] if canvas[0] == canvas[1] else patch,
        canvas=canvas,
        patch=patch,
        queries=len(weight(weights, "queries.weight")),
        query_blocks=_query_blocks(weights, hints),
        **fields,
    )
    return config, {key: value for key, value in weights.items() if key not in (PROBABILITIES, CLASS_WEIGHTS)}


def _backbone(weights: State, hints: Hints) -> dict[str, Any]:
    """The fields of the ViT, 0 where its name says the size already.

    Raises:
        ValueError: nobody can tell the number of heads.
    """
    vit = part(weights, BODY)
    rows = len(weight(weights, f"{BODY}blocks.0.mlp.fc1.weight"))
    inner = weight(weights, f"{BODY}blocks.0.mlp.fc2.weight").shape[1]
    width, depth = len(vit["patch_embed.proj.weight"]), count_layers(vit, "blocks.")
    known = DINOV2 if "pos_embed" in vit else DINOV3
    name = next((name for name, size in known.items() if size == (width, depth, rows)), "")
    fields: dict[str, Any] = {"heads": hints.heads}
    if not name:
        name = "vit_giant_patch14_reg4_dinov2" if rows == 2 * inner else next(iter(known))
        fields |= {"width": width, "depth": depth, "hidden": rows}
        if not hints.heads:
            if width % HEAD:
                raise ValueError(
                    f"convert: no file tells the heads of a block, and {width} channels are no multiple of the "
                    f"published {HEAD} for each: add --heads N"
                )
            fields["heads"] = width // HEAD
    return {"backbone": Backbone(name), **fields}


def _no_object_weight(weights: State) -> dict[str, Any]:
    """The field that the class weights tell, where there are any.

    Raises:
        ValueError: classes differ in their weights.
    """
    values = weights.get(CLASS_WEIGHTS)
    if values is None:
        return {}
    if not (values[:-1] == 1).all():
        raise ValueError(f"convert: {CLASS_WEIGHTS} is not 1 for each of {len(values) - 1} classes")
    return {"no_object_weight": round(float(values[-1]), 6)}


def _canvas(weights: State, patch: int, hints: Hints) -> tuple[int, int]:
    """Height and width for which positions are kept.

    Raises:
        ValueError: the positions are those of another canvas, or of no square and none was given.
    """
    positions = weights.get(f"{BODY}pos_embed")
    if positions is None:
        return hints.canvas if any(hints.canvas) else (CANVAS, CANVAS)
    count = positions.shape[1]
    if any(hints.canvas):
        height, width = hints.canvas
        if height % patch or width % patch or height * width != count * patch**2:
            raise ValueError(
                f"convert: --canvas {height} {width}: the file has the positions of {count} patches of {patch} pixels"
            )
        return hints.canvas
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(
            f"convert: the file has the positions of {count} patches, which make no square: add --canvas HEIGHT WIDTH"
        )
    return side * patch, side * patch


def _query_blocks(weights: State, hints: Hints) -> int:
    """The number of blocks that hold queries.

    Raises:
        ValueError: neither the file nor its depth tells it.
    """
    if hints.query_blocks:
        return hints.query_blocks
    if PROBABILITIES in weights:
        return len(weights[PROBABILITIES])
    depth = count_layers(weights, f"{BODY}blocks.")
    if depth not in PUBLISHED_BLOCKS:
        raise ValueError(
            f"convert: the file lacks {PROBABILITIES}, whose length is the number of blocks that hold queries, and no "
            f"published model has {depth} blocks: add --query-blocks N"
        )
    return PUBLISHED_BLOCKS[depth]


def original(hints: Hints = NO_HINTS) -> Family:
    """tue-mps/eomt: Lightning's checkpoints and the flat files of its hub."""
    return Family(
        recognise=lambda state: any(key.replace("_orig_mod.", "") == "network.q.weight" for key in state),
        rename=_renamed,
        build=partial(_build, hints=hints),
        translate=partial(_from_original, hints=hints),
        hinted=original,
    )


def transformers(hints: Hints = NO_HINTS) -> Family:
    """`EomtForUniversalSegmentation` and `EomtDinov3ForUniversalSegmentation` of Hugging Face transformers 4 and 5."""
    return Family(
        recognise=lambda state: "query.weight" in state and any(key.startswith("upscale_block.") for key in state),
        rename=_renamed,
        build=partial(_build, hints=hints),
        translate=partial(_from_transformers, hints=hints),
        hinted=transformers,
    )


ORIGINAL, TRANSFORMERS = original(), transformers()
