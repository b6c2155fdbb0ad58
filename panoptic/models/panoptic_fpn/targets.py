"""Targets of Panoptic FPN's semantic branch, whose class 0 stands for all things, and what the truth outputs.

Shapes: B images, H x W canvas, S stuff classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from panoptic.models.base import CERTAIN
from panoptic.rcnn.canvas import padded_canvas
from panoptic.segmentation import IGNORE, Categories, Targets
from panoptic.targets.dense import semantic_map


def semantic_targets(targets: Targets, categories: Categories) -> Tensor:
    """int64 [B, H, W]: 0 for things (crowds too), 1 + k for stuff class k, `IGNORE` for void."""
    table = torch.zeros(len(categories) + 1, dtype=torch.int64)
    table[list(categories.stuff)] = torch.arange(1, 1 + len(categories.stuff))
    table[IGNORE] = IGNORE
    return semantic_map(replace(targets, labels=table.to(targets.labels.device, non_blocking=True)[targets.labels]))


def true_semantic(targets: Targets, categories: Categories) -> Tensor:
    """The "semantic" of the truth, logits [B, 1 + S, height, width] of the padded canvas.

    Void and crowds of things are "things", which leave no stuff there.
    """
    classes = semantic_targets(targets, categories).clamp(min=0)[:, None]
    height, width = padded_canvas(targets.frame)
    logits = torch.zeros(len(classes), 1 + len(categories.stuff), height, width, device=classes.device)
    logits[:, :, : classes.shape[2], : classes.shape[3]].scatter_(1, classes, CERTAIN)
    return logits
