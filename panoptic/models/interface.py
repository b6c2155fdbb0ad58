"""The name under which models that version 0.1 logged to MLflow import the interface; new code does not use it."""

from panoptic.models.base import PanopticModel

__all__ = ["PanopticModel"]
