"""The options of tracking, which a command line reads without MLflow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tracking:
    """The server and the names under which a run is recorded."""

    uri: str = ""
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else a SQLite file under the run's folder."""
    experiment: str = "panoptic"
    """MLflow experiment."""
    name: str = ""
    """Name of the run; MLflow invents one by default."""
    register: str = ""
    """Register the final model under this name; empty = log it without registering."""
    alias: str = ""
    """Alias that the registered version gets, such as champion."""
