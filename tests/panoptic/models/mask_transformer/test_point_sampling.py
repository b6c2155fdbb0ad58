"""Points: sampled targets equal `grid_sample` of masks that were never made."""

from __future__ import annotations

import torch

from panoptic.models.mask_transformer.point_sampling import (
    draw_candidates,
    every_mask_at,
    masks_at,
    sample,
    segments_at,
    uncertain_points,
)


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """A map of two images with segments 0..3, and points that reach the borders."""
    draw = torch.Generator().manual_seed(0)
    segments = torch.randint(0, 4, (2, 9, 13), generator=draw, dtype=torch.int32)
    points = torch.rand(2, 200, 2, generator=draw)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.999, 0.0], [0.5, 0.5]])
    return segments, points


def test_masks_at_points() -> None:
    segments, points = drawn()
    masks = (segments[:, None] == torch.arange(1, 4).view(3, 1, 1)).float()
    expected = sample(masks, points)
    torch.testing.assert_close(every_mask_at(segments, points, 3), expected)
    images, entries = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    sampled = masks_at(segments, images, entries, points[images])
    torch.testing.assert_close(sampled, torch.stack([expected[0, 2], expected[1, 0], expected[1, 1]]))


def test_shares_sum_to_one_inside() -> None:
    segments, points = drawn()
    numbers, shares = segments_at(segments, torch.arange(2), points[:, 3:])
    assert numbers.shape == shares.shape == (2, 4, 197)
    inside = ((points[:, 3:] > 0.1) & (points[:, 3:] < 0.9)).all(2)
    torch.testing.assert_close(shares.sum(1)[inside], torch.ones(int(inside.sum())))


def test_uncertain_points_are_the_least_certain_of_the_candidates() -> None:
    masks = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    points = uncertain_points(masks, *draw_candidates(3, 20, 3.0, 0.75, masks.device))
    torch.manual_seed(2)
    candidates, anywhere = torch.rand(3, 60, 2), torch.rand(3, 5, 2)
    assert points.shape == (3, 20, 2)
    torch.testing.assert_close(points[:, 15:], anywhere)
    certainty = sample(masks[:, None], candidates)[:, 0].abs().sort(1).values
    torch.testing.assert_close(sample(masks[:, None], points[:, :15])[:, 0].abs().sort(1).values, certainty[:, :15])


def test_no_mask_at_all() -> None:
    masks = torch.zeros(0, 4, 4)
    assert uncertain_points(masks, *draw_candidates(0, 8, 3.0, 0.75, masks.device)).shape == (0, 8, 2)
