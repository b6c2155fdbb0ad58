"""The one interface of every architecture.

`network` is the tensor part: it is exported and compiled. `loss` and `segment` stand outside of it
and run in float32 whatever the autocast. `network | segment` is also the oracle hook: `truth` gives
the outputs that the ground truth can stand for, and `segment` accepts them in place of the model's.

Shapes: B images, H x W the canvas of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from panoptic.segmentation import Categories, Frame, Instances, Segmentation, Targets

Outputs = dict[str, Tensor]
"""Named tensors that `network` returns."""


Merged = Sequence[Segmentation] | None
"""What `segment` made of the same outputs, one an image, so that no model merges twice; None where nobody has it."""


class PanopticModel(nn.Module, ABC):
    """A network, its losses and its merge rule.

    Subclasses set `config` (what built them), `categories` and `divisor` (collate pads the canvas to it)
    and implement the abstract methods. Nothing may depend on `self.training` but normalisation and dropout: losses are
    wanted in evaluation mode too. Losses draw only by `torch.rand` and `torch.randperm`.
    """

    config: Any
    categories: Categories
    divisor: int
    class_modules: tuple[str, ...] = ()
    """Submodules that start fresh from weights for other classes, though their shape may not depend on the classes."""
    added_modules: tuple[str, ...] = ()
    """Submodules that start fresh from weights without them, as a head that is trained in a second stage."""
    truth_needs: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Outputs of `truth` that say nothing without others: FCN's class without a position."""

    @abstractmethod
    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 images [B, 3, H, W] (RGB) to named outputs. No frame means no padding."""

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Named, weighted scalar terms; their sum is what training minimises.

        Every term keeps its graph when there is nothing to learn from, so that each parameter gets a
        gradient whatever the batch holds.
        """

    @abstractmethod
    def segment(self, outputs: Outputs, frame: Frame) -> list[Segmentation]:
        """Merged panoptic maps, one an image, at `frame.output_sizes`."""

    @abstractmethod
    def instances(self, outputs: Outputs, frame: Frame, merged: Merged = None) -> list[Instances]:
        """Scored instances before merging, one an image, at `frame.output_sizes`; for AP."""

    @abstractmethod
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The outputs that the ground truth can stand for, at canvas resolution. `outputs` is never changed."""

    def detections(self, outputs: Outputs, frame: Frame) -> Outputs:
        """`outputs` and what `segment`, `instances` and `semantics` would each compute by layers of their own.

        So regions go through their heads once, and logits are upsampled once, where more than one of the three is
        wanted. Most models add nothing.
        """
        return outputs

    def proposals(self, outputs: Outputs, frame: Frame) -> list[Tensor] | None:
        """Class-agnostic boxes float32 [P, 4] (x0 y0 x1 y1, half-open), best first, at `frame.output_sizes`.

        For recall; None for models without region proposals.
        """
        return None

    def semantics(self, outputs: Outputs, frame: Frame, merged: Merged = None) -> list[np.ndarray]:
        """int32 [H, W] class maps at `frame.output_sizes`, for mIoU; here read off the merged map."""
        return [found.semantic() for found in (self.segment(outputs, frame) if merged is None else merged)]

    def forward(
        self,
        images: Tensor,
        targets: Targets | None = None,
        frame: Frame | None = None,
        segment: bool = False,
    ) -> tuple[dict[str, Tensor] | None, list[Segmentation] | None]:
        """Everything with parameters runs in here, so that DDP, EMA and compilation wrap one object.

        Args:
            images: uint8 [B, 3, H, W], RGB.
            targets: losses are computed when given.
            frame: of the batch; that of `targets` by default, else no padding.
            segment: also merge (evaluation); training leaves it off.

        Returns:
            the losses or None, and the maps or None.
        """
        if frame is None and targets is not None:
            frame = targets.frame
        outputs = self.network(images, frame)
        with torch.autocast(images.device.type, enabled=False):
            outputs = full_precision(outputs)
            losses = None if targets is None else self.loss(outputs, targets)
            maps = self.segment(outputs, frame or Frame.full(images)) if segment else None
        return losses, maps


def full_precision(outputs: Outputs) -> Outputs:
    """bfloat16 and float16 outputs as float32; others untouched."""
    half = (torch.bfloat16, torch.float16)
    return {name: value.float() if value.dtype in half else value for name, value in outputs.items()}
