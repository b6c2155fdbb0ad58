"""Which kernels are trained, and the losses of what they draw, against the published numbers."""

from __future__ import annotations

import pytest
import torch

from panoptic.losses import soft_focal_loss, squared_dice_loss
from panoptic.models.panoptic_fcn.kernels import (
    centre_kernels,
    embedded,
    guided_kernels,
    kernel_dice_loss,
    mean_kernels,
    region_kernels,
)
from panoptic.models.panoptic_fcn.targets import LevelTargets


@pytest.fixture(scope="module")
def units(fixture_arrays):
    arrays, _ = fixture_arrays("pfcn_units")
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def test_published_focal_loss(units) -> None:
    losses = soft_focal_loss(units["fl_logits"], units["fl_targets"])
    assert float(losses.sum()) == pytest.approx(float(units["fl_thing"]), rel=1e-6)
    assert float(losses.mean((2, 3)).sum()) == pytest.approx(float(units["fl_stuff"]), rel=1e-6)


def test_published_dice_loss(units) -> None:
    used = units["dice_idx"]
    logits = units["dice_pred"].reshape(8, 3, -1)[used]
    targets = units["dice_target"].reshape(8, -1)[used]
    weights = units["dice_w"].reshape(8, 3)[used]
    weights = weights / weights.sum(1, keepdim=True)
    losses = squared_dice_loss(logits, targets)
    assert float((losses * weights).sum()) == pytest.approx(float(units["dice_thing"]), rel=1e-6)
    first = squared_dice_loss(units["dice_pred"][:, :4].reshape(8, 1, -1)[used], targets)
    assert float(first.sum()) == pytest.approx(float(units["dice_stuff"]), rel=1e-6)


def told(cells: list[int], images: int = 1) -> LevelTargets:
    """One thing an image, of class 0, in masks of their own."""
    image = torch.arange(len(cells)) % images
    none = torch.zeros(images, 1, 2, 3)
    return LevelTargets(none, none, image, torch.zeros_like(image), torch.zeros_like(image), torch.tensor(cells))


def test_the_best_cells_inside_a_thing_guide_it() -> None:
    kernels = torch.arange(12.0).view(1, 2, 2, 3)
    centres = torch.tensor([[[[0.0, 1.0, 9.0], [2.0, -1.0, 9.0]]]], requires_grad=True)
    masks = torch.zeros(1, 1, 4, 6)
    masks[..., :4] = 1  # the last column of the level lies outside
    picked, weights = guided_kernels(centres, kernels, told([0]), masks, 2)
    assert picked[0].tolist() == [[3.0, 9.0], [1.0, 7.0]]  # cell 3, then cell 1
    p = torch.tensor([2.0, 1.0]).sigmoid()
    torch.testing.assert_close(weights.detach()[0], p / p.sum())
    weights[0, 0].backward()
    assert centres.grad is not None and centres.grad[0, 0, 1, 0] > 0 and centres.grad[0, 0, 0, 2] == 0


def test_a_level_of_fewer_cells_than_points_and_a_thing_without_a_cell() -> None:
    kernels, centres = torch.rand(1, 2, 2, 3), torch.zeros(1, 1, 2, 3)
    picked, weights = guided_kernels(centres, kernels, told([0]), torch.ones(1, 1, 4, 6), 9)
    assert picked.shape == (1, 9, 2) and weights[0, :6].tolist() == pytest.approx([1 / 6] * 6)
    assert not weights[0, 6:].any()
    _, weights = guided_kernels(centres, kernels, told([0]), torch.zeros(1, 1, 4, 6), 9)
    assert not weights.any()


def test_without_weights_it_is_the_kernel_at_the_centre() -> None:
    kernels = torch.arange(24.0).view(2, 2, 2, 3)
    picked, weights = centre_kernels(kernels, told([4, 2], images=2))
    assert picked[:, 0].tolist() == [[4.0, 10.0], [14.0, 20.0]] and weights.tolist() == [[1.0], [1.0]]


def test_a_regions_kernel_is_the_mean_over_the_map_or_over_itself() -> None:
    kernels = torch.arange(1.0, 13.0).view(1, 2, 2, 3)
    covered = torch.zeros(1, 3, 2, 3)
    covered[0, 1, 0, :2] = 0.7
    image, region, means = region_kernels(kernels, covered)
    assert image.tolist() == [0] and region.tolist() == [1]
    torch.testing.assert_close(means, torch.tensor([[3 / 6, 15 / 6]]))
    assert region_kernels(kernels, covered, own=True)[2].tolist() == [[1.5, 7.5]]
    assert not mean_kernels(torch.zeros(1, 6), kernels.flatten(2)[0], own=True).any()


def test_the_loss_is_of_the_image_that_a_kernel_belongs_to() -> None:
    rng = torch.Generator().manual_seed(0)
    features, masks = torch.randn(2, 4, 3, 5, generator=rng), torch.rand(2, 2, 3, 5, generator=rng)
    kernels, weights = torch.randn(3, 2, 4, generator=rng), torch.rand(3, 2, generator=rng)
    image, index = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    expected = torch.zeros(())
    for k in range(3):
        drawn = torch.einsum("kc,cyx->kyx", kernels[k], features[image[k]]).sigmoid()
        target = masks[image[k], index[k]]
        dice = 1 - 2 * (drawn * target).sum((1, 2)) / ((drawn**2).sum((1, 2)) + (target**2).sum())
        expected = expected + (dice * weights[k]).sum()
    torch.testing.assert_close(kernel_dice_loss(features, masks, kernels, image, index, weights), expected)


def test_an_embedding_is_the_convolution() -> None:
    layer = torch.nn.Conv2d(4, 3, 1)
    x = torch.randn(2, 4, 5, 1)
    torch.testing.assert_close(embedded(layer, x[..., 0].transpose(1, 2)), layer(x)[..., 0].transpose(1, 2))
