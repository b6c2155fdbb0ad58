"""The one interface of every architecture.

`network` is the tensor part: it is exported and compiled. `loss` and `postprocess` stand outside of it and run in
float32 whatever the autocast. `network | postprocess` is also the oracle hook: `truth` gives the outputs that the
ground truth can stand for, and `postprocess` accepts them in place of the model's.

Shapes: B images, H x W the canvas of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from panoptic.backbones.config import STAGES
from panoptic.segmentation import Categories, Frame, Instances, Segmentation, Targets

Outputs = dict[str, Tensor]
"""Named tensors that `network` returns."""

CERTAIN = 30.0
"""The logit of what is true in `PanopticModel.truth`; beside 0 or its negative a probability of 1 in float32."""

Row = tuple[int | str, int]
"""The meaning of a row of a layer's outputs: a class by its index, or a word for what is no class ("nothing"); and a
number that counts the rows of one meaning."""

Wanted = Literal["maps", "instances", "semantics", "proposals"]
"""The fields of `Prediction` that `postprocess` can be asked for."""


@dataclass(frozen=True)
class Prediction:
    """The predictions of a batch: lists with one entry an image, at `frame.output_sizes`.

    A field is None if it was not asked for; proposals also if the model proposes no regions.
    """

    maps: list[Segmentation] | None = None
    """Merged panoptic maps, for PQ."""
    instances: list[Instances] | None = None
    """Scored instances before merging, which may overlap, for AP."""
    semantics: list[np.ndarray] | None = None
    """int32 [H, W] class maps, for mIoU."""
    proposals: list[Tensor] | None = None
    """Class-agnostic boxes float32 [P, 4] (x0 y0 x1 y1, half-open), best first, for recall."""


class PanopticModel(nn.Module, ABC):
    """A network, its losses and its post-processing.

    Subclasses set `config` (what built them), `categories` and `divisor` (collate pads the canvas to it)
    and implement the abstract methods. Nothing may depend on `self.training` but normalisation, dropout and what is
    trained away in the course of a run (`begin_step`): losses are computed in evaluation mode too. Losses draw only by
    `torch.rand` and `torch.randperm`.
    """

    config: Any
    categories: Categories
    divisor: int
    class_modules: tuple[str, ...] = ()
    """Submodules that start fresh from weights for other classes, though their shape may not depend on the classes."""
    class_layers: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Layers with rows of outputs for the classes, and what these stand for in their order: "classes", "things" or
    "stuff", one row each; "4*things", four rows each; any other word is one row, of no class. From weights for other
    classes, the rows of classes of the same name are taken over."""
    class_inputs: tuple[str, ...] = ()
    """The layers of `class_layers` whose inputs stand for classes too, in the order of their rows."""
    added_modules: tuple[str, ...] = ()
    """Submodules that may be absent from weights and then start fresh, as a head that is trained in a second stage."""
    levels: tuple[str, ...] = STAGES
    """Features of the backbone that the network uses."""
    given: Outputs | None = None
    """The features that `frozen_features` made of the images of the batch earlier; None while the backbone runs."""
    truth_needs: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Outputs of `truth` that say nothing without others: FCN's class without a position."""

    @abstractmethod
    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 images [B, 3, H, W] (RGB) to named outputs. No frame means no padding."""

    def normalised(self, images: Tensor, frame: Frame | None = None) -> Tensor:
        """uint8 images [B, 3, H, W] as the backbone takes them, float."""
        return self.pixels(images, frame)  # type: ignore[operator]

    def features(self, x: Tensor) -> Outputs:
        """The backbone's features of normalised images, or what was made of the same images earlier (`given`)."""
        backbone: Any = self.backbone
        if self.given is None:
            return backbone(x)
        return backbone.from_map(self.given, x.shape[-2:]) if hasattr(backbone, "from_map") else self.given

    def frozen_features(self, x: Tensor) -> Outputs:
        """The features that do not change while the backbone is frozen as a whole, [B, C, h, w] by name.

        A training may compute them once and put them into `Targets.features`. A plain ViT gives its last map: the
        pyramid on it learns.

        Args:
            x: of `normalised`.
        """
        backbone: Any = self.backbone
        if hasattr(backbone, "frozen_map"):
            return backbone.frozen_map(x)
        features = backbone(x)
        return {level: features[level] for level in self.levels}

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Named, weighted scalar terms; their sum is what training minimises.

        Every term keeps its graph when there is nothing to learn from, so that each parameter gets a
        gradient whatever the batch holds.
        """

    @abstractmethod
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Maps, instances, class maps and proposals from the outputs, whichever are wanted.

        What several of them need, such as masks, is computed once.

        Args:
            outputs: of `network`, in float32; optional keys that `truth` gives take the place of what the model
                would compute from others. Never changed.
            frame: of the batch.
            want: fields of `Prediction`.
        """

    @abstractmethod
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The outputs that the ground truth can stand for, at canvas resolution. `outputs` is never changed."""

    def class_rows(self, weights: Mapping[str, Tensor]) -> dict[str, list[Row]]:
        """The meaning of each row of the layers that depend on the classes, by the layer's name.

        Args:
            weights: that such a model has, by the keys of its state dict; DETR's say which logit is which class.
        """
        kinds = {
            "classes": tuple(range(len(self.categories))),
            "things": self.categories.things,
            "stuff": self.categories.stuff,
        }
        rows: dict[str, list[Row]] = {}
        for layer, parts in self.class_layers.items():
            rows[layer] = []
            for part in parts:
                times, _, kind = part.rpartition("*")
                rows[layer] += [(label, k) for label in kinds.get(kind, (part,)) for k in range(int(times or 1))]
        return rows

    def begin_step(self, step: int, total: int) -> None:
        """Prepare for a training step, before its first micro-batch: for what changes in the course of a run.

        Whatever follows from it is a function of the two numbers alone, so that a continued run computes what it would
        have computed; nothing of it is stored.

        Args:
            step: iteration, from 0.
            total: iterations of the whole run.
        """

    def training_note(self, total: int) -> str:
        """A line for the log of a training of `total` steps: what its figures do not say; "" = nothing."""
        return ""

    def forward(
        self,
        images: Tensor,
        targets: Targets | None = None,
        frame: Frame | None = None,
        segment: bool = False,
    ) -> tuple[dict[str, Tensor] | None, list[Segmentation] | None]:
        """Losses and maps in one pass of the network.

        Everything with parameters runs in here, so that DDP, EMA and compilation wrap one object.

        Args:
            images: uint8 [B, 3, H, W], RGB.
            targets: losses are computed when given. Where they bring features, these take the place of the backbone's,
                and `images` says no more than the canvas.
            frame: of the batch; that of `targets` by default, else no padding.
            segment: also make the merged maps (evaluation); training leaves it off.

        Returns:
            the losses or None, and the maps or None.
        """
        if frame is None and targets is not None:
            frame = targets.frame
        self.given = None if targets is None else targets.features
        try:
            outputs = self.network(images, frame)
        finally:
            self.given = None
        with torch.autocast(images.device.type, enabled=False):
            outputs = full_precision(outputs)
            losses = None if targets is None else self.loss(outputs, targets)
            maps = self.postprocess(outputs, frame or Frame.full(images)).maps if segment else None
        return losses, maps


def full_precision(outputs: Outputs) -> Outputs:
    """Outputs with bfloat16 and float16 as float32; others untouched."""
    half = (torch.bfloat16, torch.float16)
    return {name: value.float() if value.dtype in half else value for name, value in outputs.items()}
