"""The targets of mask classification, from the maps of segments.

Shapes: B images, N segments (padded), H x W the canvas, h x w cells of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.segmentation import IGNORE, Targets


def learnt(targets: Targets) -> Tensor:
    """bool [B, N], the segments that queries learn: with a pixel, and no crowd."""
    return present(targets) & ~targets.crowd


def present(targets: Targets) -> Tensor:
    """bool [B, N], the segments that have a pixel."""
    images, count = targets.labels.shape
    offsets = torch.arange(images, device=targets.segments.device)[:, None, None] * (count + 1)
    found = torch.zeros(images * (count + 1), dtype=torch.bool, device=targets.segments.device)
    found[(targets.segments + offsets).view(-1)] = True
    return found.view(images, count + 1)[:, 1:] & (targets.labels != IGNORE)


def coarse_masks(targets: Targets, wanted: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [B, N, h w], the masks of the wanted segments (bool [B, N]) by nearest neighbour; 0 for others."""
    segments = targets.segments
    # as floats, which hold every segment number: nearest neighbour has no integer form
    small = F.interpolate(segments[:, None].float(), size=size, mode="nearest")
    numbers = torch.arange(1, wanted.shape[1] + 1, device=segments.device)
    return ((small.flatten(2) == numbers[:, None]) & wanted[:, :, None]).float()
