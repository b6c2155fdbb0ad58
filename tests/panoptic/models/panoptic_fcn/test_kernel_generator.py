"""The kernels that are trained for a thing and for a region."""

from __future__ import annotations

import pytest
import torch

from panoptic.models.panoptic_fcn.kernel_generator import (
    Level,
    best_cells,
    centre_kernels,
    collect_regions,
    collect_things,
    embedded,
    find_things,
    guided_kernels,
    mean_kernels,
    region_kernels,
)
from panoptic.models.panoptic_fcn.targets import LevelTargets


def level_targets(cells: list[int], images: int = 1) -> LevelTargets:
    """One thing an image, of class 0, in masks of their own."""
    image = torch.arange(len(cells)) % images
    none = torch.zeros(images, 1, 2, 3)
    return LevelTargets(none, none, image, torch.zeros_like(image), torch.zeros_like(image), torch.tensor(cells))


def test_the_best_cells_inside_a_thing_guide_it() -> None:
    kernels = torch.arange(12.0).view(1, 2, 2, 3)
    centres = torch.tensor([[[[0.0, 1.0, 9.0], [2.0, -1.0, 9.0]]]], requires_grad=True)
    masks = torch.zeros(1, 1, 4, 6)
    masks[..., :4] = 1  # the last column of the level lies outside
    picked, weights = guided_kernels(centres, kernels, level_targets([0]), masks, 2)
    assert picked[0].tolist() == [[3.0, 9.0], [1.0, 7.0]]  # cell 3, then cell 1
    p = torch.tensor([2.0, 1.0]).sigmoid()
    torch.testing.assert_close(weights.detach()[0], p / p.sum())
    weights[0, 0].backward()
    assert centres.grad is not None and centres.grad[0, 0, 1, 0] > 0 and centres.grad[0, 0, 0, 2] == 0


def test_a_level_of_fewer_cells_than_points_and_a_thing_without_a_cell() -> None:
    kernels, centres = torch.rand(1, 2, 2, 3), torch.zeros(1, 1, 2, 3)
    picked, weights = guided_kernels(centres, kernels, level_targets([0]), torch.ones(1, 1, 4, 6), 9)
    assert picked.shape == (1, 9, 2) and weights[0, :6].tolist() == pytest.approx([1 / 6] * 6)
    assert not weights[0, 6:].any()
    _, weights = guided_kernels(centres, kernels, level_targets([0]), torch.zeros(1, 1, 4, 6), 9)
    assert not weights.any()


def test_without_weights_it_is_the_kernel_at_the_centre() -> None:
    kernels = torch.arange(24.0).view(2, 2, 2, 3)
    picked, weights = centre_kernels(kernels, level_targets([4, 2], images=2))
    assert picked[:, 0].tolist() == [[4.0, 10.0], [14.0, 20.0]] and weights.tolist() == [[1.0], [1.0]]


def test_a_regions_kernel_is_the_mean_over_the_map_or_over_itself() -> None:
    kernels = torch.arange(1.0, 13.0).view(1, 2, 2, 3)
    covered = torch.zeros(1, 3, 2, 3)
    covered[0, 1, 0, :2] = 0.7
    image, region, means = region_kernels(kernels, covered)
    assert image.tolist() == [0] and region.tolist() == [1]
    torch.testing.assert_close(means, torch.tensor([[3 / 6, 15 / 6]]))
    assert region_kernels(kernels, covered, own_cells=True)[2].tolist() == [[1.5, 7.5]]
    assert not mean_kernels(torch.zeros(1, 6), kernels.flatten(2)[0], own_cells=True).any()


def test_an_embedding_is_the_convolution() -> None:
    layer = torch.nn.Conv2d(4, 3, 1)
    x = torch.randn(2, 4, 5, 1)
    torch.testing.assert_close(embedded(layer, x[..., 0].transpose(1, 2)), layer(x)[..., 0].transpose(1, 2))


def test_published_ranking_over_classes(units) -> None:
    arrays = units
    cell, label, score = best_cells(arrays["topk_in"][0], 7)
    assert torch.equal(cell, arrays["topk_inds"][0]) and torch.equal(label, arrays["topk_cls"][0])
    assert torch.equal(score, arrays["topk_score"][0])
    width = arrays["topk_in"].shape[-1]
    assert torch.equal(
        torch.stack([cell // width, cell % width]).float(), torch.cat([arrays["topk_ys"], arrays["topk_xs"]])
    )


def test_a_score_is_the_mean_with_its_window_and_only_peaks_count() -> None:
    logits = torch.full((2, 6, 8), -20.0)
    logits[0, 0, 0], logits[1, 3, 4], logits[1, 3, 5] = 2.0, 3.0, 1.0
    cell, label, score = find_things(logits, 3, 0.05, 50)
    p = torch.tensor([3.0, 1.0, 2.0]).sigmoid()
    # at the corner five of the window's nine cells lie beyond the border, and count as 0
    assert cell.tolist() == [3 * 8 + 4, 0] and label.tolist() == [1, 0]
    torch.testing.assert_close(score, torch.stack([(p[0] + (p[0] + p[1]) / 9) / 2, (p[2] + p[2] / 9) / 2]))
    assert find_things(logits, 3, 0.05, 1)[0].tolist() == [28]
    assert len(find_things(logits, 3, 0.6, 50)[0]) == 0


def test_nothing_passes_the_thresholds() -> None:
    level = Level(torch.full((2, 3, 4), -9.0), torch.full((3, 3, 4), -9.0), torch.ones(5, 3, 4))
    kernels, labels, scores, owners = collect_things([level] * 5, (3,) * 5, 0.05, 50)
    assert kernels.shape == (0, 5) and len(labels) == len(scores) == len(owners) == 0
    kernels, labels, scores = collect_regions([level] * 5, 0.05)
    assert kernels.shape == (0, 5) and len(labels) == len(scores) == 0


def test_a_kernel_is_a_mean_over_the_map_or_over_its_region() -> None:
    logits = torch.full((2, 2, 4), -9.0)
    logits[1, 0, 0] = 9.0  # one cell of eight
    level = Level(torch.full((1, 2, 4), -9.0), logits, torch.arange(24.0).view(3, 2, 4) + 1)
    for own, expected in ((False, [1 / 8, 9 / 8, 17 / 8]), (True, [1.0, 9.0, 17.0])):
        kernels, labels, _ = collect_regions([level], 0.05, own_cells=own)
        assert labels.tolist() == [1] and kernels.tolist() == [pytest.approx(expected)]
        image, region, trained = region_kernels(level.kernels[None], (logits > 0).float()[None], own)
        assert (image.tolist(), region.tolist()) == ([0], [1]) and torch.equal(trained, kernels)
