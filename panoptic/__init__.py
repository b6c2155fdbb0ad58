"""Panoptic segmentation in plain PyTorch: data structures, models, training, evaluation and metrics.

model = panoptic.load("runs/street")
model("photo.jpg").save("photo-segmented.jpg")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panoptic.predictor import Predictor, SegmentedPhotograph, load

__all__ = ["Predictor", "SegmentedPhotograph", "load"]


def __getattr__(name: str) -> Any:
    """The names of `panoptic.predictor`, imported when they are first used: torch and the models take seconds."""
    if name in __all__:
        from panoptic import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
