"""The best class of each pixel, from logits that are enlarged a few classes at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 16
"""Classes enlarged at once: bounds the memory of 133 classes at 2 megapixels."""


def best_classes(logits: Tensor, enlarge: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The highest logit of each pixel after `enlarge`, and its class, the first of equally high ones.

    Args:
        logits: float [C, h, w], at least one class.
        enlarge: of [1, some classes, h, w] to [1, some classes, H, W], each class by itself.

    Returns:
        float [H, W] and int64 [H, W].
    """
    best, classes = enlarge(logits[None, :CHUNK])[0].max(0)
    for start in range(CHUNK, len(logits), CHUNK):
        value, index = enlarge(logits[None, start : start + CHUNK])[0].max(0)
        classes = torch.where(value > best, index + start, classes)
        best = torch.maximum(value, best)
    return best, classes
