"""Reference numbers of EoMT (fixtures/eomt): arrays, weights by their rule, images, targets, draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.models.eomt.model import EoMT, EoMTConfig
from panoptic.segmentation import Categories

PATH = "fixtures/eomt"


def rules(shared: Callable[[str], Path]) -> Any:
    """The module that defines the fixtures."""
    spec = importlib.util.spec_from_file_location("eomt_rules", shared(f"{PATH}/rules.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(shared: Callable[[str], Path], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a file as tensors, and what it says about them."""
    arrays, meta = rules(shared).load(name)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta


def categories(count: int, stuff: tuple[int, ...] = ()) -> Categories:
    """So many classes, things but for those named."""
    return Categories.from_coco([{"id": k, "name": f"class {k}", "isthing": k not in stuff} for k in range(count)])


def our_name(key: str) -> str | None:
    """Our name of a parameter of the original's DINOv2 flavour; None for what is no parameter."""
    if not key.startswith("network.") or key.endswith(("attn_mask_probs", "pixel_mean", "pixel_std")):
        return None
    key = key.removeprefix("network.").replace("encoder.backbone.", "backbone.body.")
    return f"queries.{key.removeprefix('q.')}" if key.startswith("q.") else key


def config_of(meta: dict[str, Any], **options: Any) -> EoMTConfig:
    """The configuration of the network of a file."""
    said = meta["config"]
    gated = "giant" if said["swiglu"] else "small"
    dinov2 = f"vit_{gated}_patch14_reg4_dinov2"
    return EoMTConfig(
        backbone=Backbone(dinov2 if said["kind"] == "dinov2" else "vit_small_patch16_dinov3_qkvb"),
        divisor=said["patch"],
        canvas=tuple(said["size"]),
        patch=said["patch"],
        width=said["c"],
        depth=said["depth"],
        heads=said["heads"],
        queries=said["q"],
        query_blocks=said["blocks"],
        rope_rescale=1.0,
        loss_points=meta["points"],
        **options,
    )


def network(shared: Callable[[str], Path], name: str) -> tuple[EoMT, dict[str, Tensor], dict[str, Any]]:
    """The network of a file with its weights, the file's arrays, and what it says."""
    arrays, meta = load(shared, name)
    model = config_of(meta).build(categories(meta["classes"]))
    drawn = {our_name(key): torch.from_numpy(value) for key, value in rules(shared).weights(meta).items()}
    model.load_state_dict({key: value for key, value in drawn.items() if key is not None})
    return model, arrays, meta
