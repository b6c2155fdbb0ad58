"""Whether the weights that a backbone is to start from fit it: told from names and shapes before anything starts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import timm
import torch
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.backbones.config import OPTIONS, TIMM_NAMES
from panoptic.backbones.weights import load_weights
from panoptic.convert import read_checkpoint
from pipelines.cluster import storage
from pipelines.config import Experiment

Shapes = Mapping[str, Tensor]
"""Tensors without memory."""


class WeightsCheck:
    """Each distinct backbone is tried once, each file read once; nothing is downloaded."""

    def __init__(self) -> None:
        self._tried: set[Backbone] = set()
        self._files: dict[str, Shapes] = {}

    def check(self, experiment: Experiment) -> None:
        """Raises:
        ValueError: the backbone's weights cannot be read, or do not fit; names what differs.
        """
        backbone = replace(experiment.model.backbone, freeze=0)
        if backbone.weights == "none" or backbone in self._tried:
            return
        shapes = _timm(backbone) if backbone.weights == "timm" else self._read(backbone.weights)
        with torch.device("meta"):
            if shapes:
                load_weights(replace(backbone, weights="none").build(), shapes)
        self._tried.add(backbone)

    def _read(self, file: str) -> Shapes:
        if file not in self._files:
            try:
                state = read_checkpoint(io.BytesIO(storage.read_bytes(file)), file)
            except OSError as error:
                raise ValueError(f"model.backbone.weights: {error}") from error
            self._files[file] = {name: value.to("meta") for name, value in state.items()}
        return self._files[file]


def _timm(backbone: Backbone) -> Shapes:
    """Of what timm would download; {} for its own models, which fit themselves.

    Raises:
        ValueError: timm has no weights, or none for such a backbone.
    """
    name = TIMM_NAMES.get(backbone.name, backbone.name)
    if not timm.is_model_pretrained(name):
        raise ValueError(f"model.backbone.weights timm: timm has no weights for {name}; give a FILE")
    if backbone.name not in OPTIONS:
        return {}
    if backbone.stride_in_1x1:
        raise ValueError(
            "model.backbone.weights timm: its bottlenecks stride in the 3x3, those of model.backbone.stride_in_1x1 "
            "in the first 1x1; give a FILE such as R-50.pkl"
        )
    with torch.device("meta"):
        return timm.create_model(name).state_dict()
