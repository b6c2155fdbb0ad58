"""One evaluation step: network, losses and what is read off the outputs, of one batch.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from panoptic.distributed import alone
from panoptic.evaluation.oracle import swap
from panoptic.models.base import PanopticModel, full_precision
from panoptic.segmentation import Instances, Segmentation, Targets
from panoptic.training.device import Engine, autocast, to_device
from panoptic.training.step import total


class EvaluationResult(NamedTuple):
    """What one pass over a batch of B images gives."""

    losses: dict[str, Tensor]
    """Scalars on the device, with their sum as `total`."""
    maps: list[Segmentation]
    """Merged, for PQ."""
    semantics: list[np.ndarray]
    """int32 [H, W] class maps, for mIoU."""
    instances: list[Instances] | None
    """For AP; None where they were not wanted."""
    proposals: list[Tensor] | None
    """For recall; None where they were not wanted, and from models without region proposals."""
    seconds: dict[str, float]
    """`network`, `merge`, `loss` and `extra` (class maps, instances, proposals)."""


def evaluation_step(
    model: PanopticModel,
    images: Tensor,
    targets: Targets,
    engine: Engine,
    instances: bool = False,
    true: Sequence[str] = (),
    losses: bool = True,
) -> EvaluationResult:
    """Losses, merged maps and class maps of one batch, from one pass of the network.

    Args:
        model: unwrapped and in evaluation mode.
        images: uint8 [B, 3, H, W].
        instances: also want scored instances and region proposals.
        true: outputs that the truth takes the place of before merging (see `oracle`); not in the losses.
        losses: want the losses; there are none otherwise.

    Returns:
        everything but the losses at `targets.frame.output_sizes`.

    Raises:
        ValueError: the model is in training mode; its running statistics would learn from the validation.
    """
    if model.training:
        raise ValueError("evaluation_step: the model is in training mode; call model.eval() first")
    images, targets = to_device(model, images, targets, engine)
    frame, clock = targets.frame, _Clock(images.device)
    with torch.inference_mode(), alone():
        with autocast(images, engine):
            outputs = model.network(images, frame)
        outputs = full_precision(outputs)
        clock.lap("network")
        terms = model.loss(outputs, targets) if losses else {}
        clock.lap("loss")
        if true:
            outputs = swap(outputs, model.truth(targets, outputs), true)
        found = model.detections(outputs, frame)
        maps = model.segment(found, frame)
        clock.lap("merge")
        semantics = model.semantics(found, frame, maps)
        scored = model.instances(found, frame, maps) if instances else None
        proposals = model.proposals(found, frame) if instances else None
        clock.lap("extra")
    terms = {**terms, "total": total(terms)} if terms else {}
    return EvaluationResult(terms, maps, semantics, scored, proposals, clock.seconds)


class _Clock:
    """Seconds between calls of `lap`; waits for the GPU, which works behind the caller's back."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._mark = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = now - self._mark
        self._mark = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
