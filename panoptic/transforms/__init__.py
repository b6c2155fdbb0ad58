"""Augmentation and resizing: policies (the options), geometry, colour, views for training and evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from panoptic.transforms.policies import PIXEL_MEAN, POLICIES, Augment, Resize

if TYPE_CHECKING:
    from panoptic.transforms.views import copy_generator, evaluation_view, generator, training_view

__all__ = [
    "PIXEL_MEAN",
    "POLICIES",
    "Augment",
    "Resize",
    "copy_generator",
    "evaluation_view",
    "generator",
    "training_view",
]


def __getattr__(name: str) -> Any:
    """The names of `panoptic.transforms.views`, imported when they are first used: the options need no torch."""
    if name in __all__:
        from panoptic.transforms import views

        return getattr(views, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
