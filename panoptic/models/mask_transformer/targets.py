"""The targets of mask classification, from the maps of segments.

Shapes: B images, N segments (padded), H x W the canvas, h x w cells of a mask.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.segmentation import IGNORE, Targets


def target_segments(targets: Targets) -> Tensor:
    """The segments that queries learn, bool [B, N]: those with a pixel that are no crowd."""
    return visible_segments(targets) & ~targets.crowd


def visible_segments(targets: Targets) -> Tensor:
    """The segments that have a pixel, bool [B, N]."""
    images, count = targets.labels.shape
    # number k of image b is entry b (N + 1) + k of one table for the whole batch
    offsets = torch.arange(images, device=targets.segments.device)[:, None, None] * (count + 1)
    visible = torch.zeros(images * (count + 1), dtype=torch.bool, device=targets.segments.device)
    visible[(targets.segments + offsets).view(-1)] = True
    return visible.view(images, count + 1)[:, 1:] & (targets.labels != IGNORE)


def segment_counts(targets: Targets, chosen: Tensor) -> list[int]:
    """The number of segments of each image that queries learn; the device is asked where the host does not know them.

    Args:
        targets: of the batch.
        chosen: of `target_segments`.
    """
    if targets.countable is None:
        return chosen.sum(1).tolist()
    return np.count_nonzero(targets.countable.numpy() != IGNORE, axis=1).tolist()


def coarse_masks(targets: Targets, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """The masks of chosen segments by nearest neighbour, float32 [B, N, h w]; those of others are 0.

    Args:
        targets: of the batch.
        chosen: bool [B, N].
        size: h and w.
    """
    segments = targets.segments
    # as floats, which hold every segment number: nearest neighbour has no integer form
    small = F.interpolate(segments[:, None].float(), size=size, mode="nearest")
    numbers = torch.arange(1, chosen.shape[1] + 1, device=segments.device)
    return ((small.flatten(2) == numbers[:, None]) & chosen[:, :, None]).float()
