"""Augmentation and resizing: policies (the options), geometry, colour, views for training and evaluation."""

from panoptic.transforms.policies import PIXEL_MEAN, POLICIES, Augment, Resize
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
