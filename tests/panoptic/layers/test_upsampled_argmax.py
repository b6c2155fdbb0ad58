"""The best class of each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from panoptic.layers.upsampled_argmax import best_classes


def test_classes_are_the_same_in_chunks() -> None:
    logits = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[20] = logits[3]  # the first of equals

    def twice(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    best, classes = best_classes(logits, twice)
    assert torch.equal(classes, twice(logits[None])[0].argmax(0))
    assert torch.equal(best, twice(logits[None])[0].amax(0))
