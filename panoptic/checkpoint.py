"""The name under which models that version 0.1 logged to MLflow import these functions; new code does not use it.

Such a model brings its own loading code, which runs against the installed package where that is imported first.
"""

from panoptic.training.checkpoint import build_model
from panoptic.training.plain import from_plain, to_plain

__all__ = ["build_model", "from_plain", "to_plain"]
