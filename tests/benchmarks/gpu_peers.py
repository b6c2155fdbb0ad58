"""The same architectures in Hugging Face's transformers, with random weights, where it is installed.

Not quite the same networks: its MaskFormer has no encoder in the pixel decoder, its DETR makes the masks of all queries
and its backbone's norms learn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from panoptic.segmentation import Targets
from panoptic.training.device import Engine, autocast
from tests.benchmarks.gpu_cases import Case

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def build(case: Case) -> torch.nn.Module | None:
    """The peer of a case; None where there is none."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError:
        return None
    backbone, classes = library.ResNetConfig(out_features=STAGES), {"num_labels": case.stuff + case.things}
    detr = {"use_timm_backbone": False, "auxiliary_loss": True}
    kind = type(case.config).__name__
    if kind == "Mask2FormerConfig":
        config = library.Mask2FormerConfig(backbone_config=backbone, **classes)
        return library.Mask2FormerForUniversalSegmentation(config)
    if kind == "MaskFormerConfig":
        decoder = library.DetrConfig(backbone_config=backbone, **detr, **classes)
        config = library.MaskFormerConfig(
            backbone_config=backbone, decoder_config=decoder, use_auxiliary_loss=True, **classes
        )
        return library.MaskFormerForInstanceSegmentation(config)
    if kind == "DETRConfig":
        return library.DetrForSegmentation(library.DetrConfig(backbone_config=backbone, **detr, **classes))
    return None


def truth(case: Case, targets: Targets) -> dict[str, Any]:
    """The arguments that tell a peer the truth: masks as it wants them, made beforehand as its feed does."""
    masks, labels = [], []
    for segments, classes in zip(targets.segments, targets.labels, strict=True):
        known = (classes >= 0).nonzero()[:, 0]
        masks.append((segments == (known + 1)[:, None, None]).float())
        labels.append(classes[known])
    if type(case.config).__name__ != "DETRConfig":
        return {"mask_labels": masks, "class_labels": labels}
    boxes = [torch.full((len(part), 4), 0.5, device=part.device) for part in labels]
    return {
        "labels": [
            {"class_labels": part, "boxes": box, "masks": mask}
            for part, box, mask in zip(labels, boxes, masks, strict=True)
        ]
    }


def stepper(
    case: Case, batches: list[tuple[Tensor, Targets]], device: str, engine: Engine
) -> Callable[[int], None] | None:
    """One training step of the peer on batch k, with AdamW and clipping; None where there is no peer."""
    model = build(case)
    if model is None:
        return None
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    placed = [((images.to(device).float() / 255), truth(case, targets.to(device))) for images, targets in batches]

    def step(k: int) -> None:
        images, arguments = placed[k % len(placed)]
        optimiser.zero_grad(set_to_none=True)
        with autocast(images, engine):
            loss = model(pixel_values=images, **arguments).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimiser.step()

    return step
