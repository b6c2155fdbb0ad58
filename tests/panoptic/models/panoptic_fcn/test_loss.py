"""The losses of Panoptic FCN against the published numbers and the plain formula."""

from __future__ import annotations

import pytest
import torch

from panoptic.losses import soft_focal_loss, squared_dice_loss
from panoptic.models.panoptic_fcn.loss import kernel_dice_loss


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
    torch.testing.assert_close(kernel_dice_loss(features, masks, kernels, image, index, weights, [1, 2]), expected)
