"""Losses at points instead of pixels (Kirillov et al., "PointRend", arXiv 1912.08193; Mask2Former).

A point is a position in 0..1, x before y; the value of a map there is the bilinear mean of four cells. Predictions
are sampled by `grid_sample`. Targets are never made into masks: the four pixels around a point name their
segments, and a mask's value is the sum of the shares of those that are its own.

Shapes: B images, H x W pixels, N segments (padded), M masks, h x w their cells, P points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """The values of maps [G, C, h, w] at points [G, P, 2], [G, C, P]; outside of a map they are 0."""
    return F.grid_sample(maps, (2 * points - 1)[:, None], align_corners=False)[:, :, 0]


def segments_at(segments: Tensor, images: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The segments of the four pixels around points, and the bilinear share of each pixel.

    Args:
        segments: int32 [B, H, W].
        images: int64 [M], the image of each set of points.
        points: [M, P, 2].

    Returns:
        int32 and float32 [M, 4, P]; pixels outside of the image count 0.
    """
    height, width = segments.shape[1:]
    # in pixels, of which (0, 0) is the middle of the first
    extent = torch.tensor([width, height], dtype=points.dtype).to(points.device, non_blocking=True)
    x, y = (points * extent - 0.5).unbind(-1)
    columns, rows = _neighbours(x, width), _neighbours(y, height)
    # flat indices of the four pixels in the batch, and the products of their shares along both axes
    images = (images * (height * width)).to(torch.int32)[:, None]
    index = [(images + row * width + column) for row, _ in rows for column, _ in columns]
    shares = torch.stack([down * across for _, down in rows for _, across in columns], 1)
    numbers = segments.view(-1).index_select(0, torch.stack(index, 1).view(-1))
    return numbers.view(shares.shape), shares


def _neighbours(positions: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels (int32) around positions along an axis, and their shares; 0 where there is none."""
    low = positions.floor()
    share = positions - low
    first, second = (1 - share) * (low >= 0), share * (low < size - 1)
    low = low.to(torch.int32)
    return [(low.clamp(min=0, max=size - 1), first), ((low + 1).clamp_(min=0, max=size - 1), second)]


def every_mask_at(segments: Tensor, points: Tensor, count: int) -> Tensor:
    """All masks of each image at the points [B, P, 2] of that image, float32 [B, N, P]; `count` is N."""
    numbers, shares = segments_at(segments, torch.arange(len(points), device=points.device), points)
    masks = shares.new_zeros(len(points), count + 1, points.shape[1])  # one entry more, for void
    return masks.scatter_add_(1, numbers.long(), shares)[:, 1:]


def masks_at(segments: Tensor, images: Tensor, entries: Tensor, points: Tensor) -> Tensor:
    """The masks of some segments at points of their own, float32 [M, P].

    Args:
        segments: int32 [B, H, W].
        images: int64 [M].
        entries: int64 [M]; segment k has entry k - 1.
        points: [M, P, 2].
    """
    numbers, shares = segments_at(segments, images, points)
    return (shares * (numbers == entries[:, None, None] + 1)).sum(1)


def draw_candidates(
    masks: int, count: int, oversample: float, importance: float, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """The random points of `uncertain_points`, drawn before the masks are known.

    Args:
        masks: M.
        count: P, points of a mask.
        oversample: candidates for each point.
        importance: share of the points that are chosen among the candidates; the others are uniform.
        device: of the points.

    Returns:
        candidates [M, `oversample` P, 2], uniform points [M, P - k, 2], and k, how many candidates are to be chosen.
    """
    chosen = int(importance * count)
    candidates = torch.rand(masks, int(count * oversample), 2, device=device)
    return candidates, torch.rand(masks, count - chosen, 2, device=device), chosen


def uncertain_points(masks: Tensor, candidates: Tensor, uniform: Tensor, chosen: int) -> Tensor:
    """Points [M, P, 2] at which masks are least certain, and some that are anywhere (PointRend, section 3.1).

    Args:
        masks: [M, h, w] logits; no gradient flows.
        candidates: of `draw_candidates`, of which those are chosen whose logit is nearest to 0.
        uniform: of `draw_candidates`, appended to them.
        chosen: of `draw_candidates`.
    """
    if not len(masks):  # of which nothing can be sampled
        return uniform.new_zeros(0, chosen + uniform.shape[1], 2)
    certainty = sample(masks.detach()[:, None], candidates)[:, 0].abs()
    index = certainty.topk(chosen, 1, largest=False, sorted=False).indices
    return torch.cat([candidates.gather(1, index[:, :, None].expand(-1, -1, 2)), uniform], 1)
