"""A backbone that is frozen as a whole, whose features may be computed once: which models have one, and its digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from panoptic.backbones.vit import ViT
from panoptic.layers.norm import BATCH_NORMS
from panoptic.models.base import PanopticModel
from panoptic.training.plain import to_plain

BACKBONES = ("backbone", "semantic_backbone")
"""Names of backbones; JSIS-Net may have a second one."""

NO_PART = ("weights", "own_pixels", "freeze")
"""Options of a backbone that its features do not follow from beside its weights."""


def learning_parameters(model: PanopticModel) -> list[str]:
    """Names of the backbone's parameters that learn; a pyramid on a plain ViT is no part of it."""
    return [
        f"{name}.{inner}"
        for name, backbone in _backbones(model).items()
        for inner, parameter in backbone.named_parameters()
        if parameter.requires_grad and _layer(backbone, inner) is not None
    ]


def refuse_changing(model: PanopticModel, dropout: bool) -> None:
    """Refuse a backbone whose features of an image are not the same in every step, though no parameter of it learns.

    Args:
        model: whose backbone is frozen.
        dropout: dropout inside the frozen backbone is on in training.

    Raises:
        ValueError: names the part and the remedy.
    """
    for name, backbone in _backbones(model).items():
        if isinstance(backbone, ViT):
            raise ValueError(
                f"data.cache_features: the queries of {type(model).__name__} run through the last blocks of its "
                "backbone, so there are no features of images alone; leave it out"
            )
        for inner, module in backbone.named_modules():
            if isinstance(module, BATCH_NORMS):
                raise ValueError(
                    f"data.cache_features: the statistics of {name}.{inner} follow every batch; freeze the backbone "
                    "with --model.backbone.freeze 5"
                )
            if dropout and max(_chance(module, key) for key in ("p", "drop_prob", "drop_path")) > 0:
                raise ValueError(
                    f"data.cache_features: {name}.{inner} drops something else in every step; set its probability to 0"
                )


def _chance(module: nn.Module, key: str) -> float:
    """The probability in an attribute of a dropout, 0 where it has none."""
    value = getattr(module, key, 0)
    return value if isinstance(value, float) else 0.0


@torch.no_grad()
def backbone_digest(model: PanopticModel) -> str:
    """The sha256 of all that the features of a frozen backbone follow from, beside the images.

    These are its options and weights, the normalisation and padding of images, and the levels that are used. Learning
    parts (a pyramid) and counters do not count.
    """
    options = {name: value for name, value in to_plain(model.config.backbone).items() if name not in NO_PART}
    pixels: Any = model.pixels
    about = [type(model).__name__, model.divisor, list(model.levels), pixels.bgr, options]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, buffer in pixels.named_buffers():
        digest.update(name.encode() + buffer.cpu().numpy().tobytes())
    for prefix, backbone in _backbones(model).items():
        for name, value in backbone.state_dict().items():
            if _layer(backbone, name) is not None and not name.endswith("num_batches_tracked"):
                digest.update(f"{prefix}.{name}".encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _backbones(model: PanopticModel) -> dict[str, nn.Module]:
    found: dict[str, Any] = {name: getattr(model, name, None) for name in BACKBONES}
    return {name: backbone for name, backbone in found.items() if backbone is not None}


def _layer(backbone: nn.Module, name: str) -> int | None:
    """The layer of a parameter of a plain ViT, None where it is none of the ViT's; 0 in any other backbone."""
    layer_of: Any = getattr(backbone, "layer_of", lambda _: 0)
    return layer_of(name)
