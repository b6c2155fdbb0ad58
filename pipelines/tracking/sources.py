"""Models of MLflow, which `panoptic.load` opens beside files of this machine.

An entry point of the group `panoptic.sources` names this function for the schemes `models` and `runs`, so that
`panoptic` needs to know nothing of MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlflow

from panoptic.models.base import PanopticModel
from panoptic.transforms import Resize
from pipelines.tracking.config import Tracking
from pipelines.tracking.model import load_packaged
from pipelines.tracking.runs import resolve_uri


def open_logged(uri: str) -> tuple[PanopticModel, Resize, Mapping[str, Any]]:
    """The model of `models:/name@alias`, `models:/name/3`, `models:/m-…` or `runs:/id/model`.

    It is looked for in MLflow's tracking store where one was set (MLFLOW_TRACKING_URI), else in that of runs/, where
    trainings write by default.

    Returns:
        the model on the CPU, in evaluation mode, the resizing of its photographs, and the flat options of its run.

    Raises:
        ValueError: nothing of ours lies there.
    """
    store = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else resolve_uri(Tracking(), "runs")
    packaged = load_packaged(uri, store)
    return packaged.model, packaged.resize, packaged.experiment
