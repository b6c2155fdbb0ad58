"""One evaluation step: the network, its losses and its predictions on one batch, from one pass.

Shapes: B images, H x W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from panoptic.distributed import alone
from panoptic.evaluation.oracle import swap
from panoptic.models.base import PanopticModel, Prediction, Wanted, full_precision
from panoptic.segmentation import Targets
from panoptic.training.config import Engine
from panoptic.training.device import autocast, to_device
from panoptic.training.step import total


class EvaluationResult(NamedTuple):
    """Losses, predictions and times of one batch."""

    losses: dict[str, Tensor]
    """Scalars on the device, with their sum as `total`; empty where they were not asked for."""
    prediction: Prediction
    """One entry an image in each field that was asked for."""
    seconds: dict[str, float]
    """Seconds of `network`, `loss` and `postprocess`."""


def evaluation_step(
    model: PanopticModel,
    images: Tensor,
    targets: Targets,
    engine: Engine,
    want: Collection[Wanted] = ("maps", "semantics"),
    true: Sequence[str] = (),
    losses: bool = True,
) -> EvaluationResult:
    """Losses and predictions of one batch, from one pass of the network.

    Args:
        model: unwrapped and in evaluation mode.
        images: uint8 [B, 3, H, W], on any device.
        targets: of the batch, on any device.
        engine: precision and memory format of the network.
        want: fields of `Prediction`.
        true: outputs that the truth takes the place of before post-processing (see `oracle`); not in the losses.
        losses: compute the losses.

    Returns:
        the result, with predictions at `targets.frame.output_sizes`.

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
        prediction = model.postprocess(outputs, frame, want)
        clock.lap("postprocess")
    terms = {**terms, "total": total(terms)} if terms else {}
    return EvaluationResult(terms, prediction, clock.seconds)


class _Clock:
    """Seconds between calls of `lap`. Waits for the GPU, which works behind the caller's back."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._mark = self._now()

    def lap(self, name: str) -> None:
        """Note the seconds since the last call under this name."""
        now = self._now()
        self.seconds[name] = now - self._mark
        self._mark = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
