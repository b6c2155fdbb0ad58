"""Checkpoints on S3, which `panoptic.load` opens beside files of this machine.

An entry point of the group `panoptic.sources` names this function for the scheme `s3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panoptic.models.base import PanopticModel
from panoptic.predictor import stored_resize
from panoptic.training.checkpoint import build_model
from panoptic.transforms import Resize
from pipelines.training.checkpoints import load_checkpoint


def open_checkpoint(uri: str) -> tuple[PanopticModel, Resize, Mapping[str, Any]]:
    """The model of a checkpoint's folder or .pt file, as `panoptic.predictor.load` takes it.

    Raises:
        ValueError: there is none, or the file is no checkpoint.
    """
    record = load_checkpoint(uri)
    return build_model(record), stored_resize(record["experiment"]), record["experiment"]
