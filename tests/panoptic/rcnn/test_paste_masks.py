"""Masks of boxes pasted into the image: detectron2's arrays and torch's own sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panoptic.layers.greedy_merge import CroppedMask
from panoptic.rcnn.paste_masks import paste


def unpacked(array: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(array, axis=-1)[..., :width].astype(bool)


def whole(pasted: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[pasted.window] = pasted.mask
    return mask


def test_pasting_agrees_with_detectron2(fixture_arrays) -> None:
    arrays, _ = fixture_arrays("pfpn_units")
    found = paste(arrays["paste_masks"], arrays["paste_boxes"], (60, 90))
    for pasted, expected in zip(found, unpacked(arrays["paste_out"], 90), strict=True):
        np.testing.assert_array_equal(whole(pasted, (60, 90)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_everything_that_the_plain_rule_finds(seed: int) -> None:
    """Against torch's grid_sample over the whole image, boxes beyond the border and thinner than a pixel included."""
    rng = np.random.default_rng(seed)
    size, side = (37, 53), 28
    for _ in range(12):
        x0, y0 = rng.uniform(-20, 50), rng.uniform(-20, 35)
        box = [x0, y0, x0 + rng.uniform(0.2, 60), y0 + rng.uniform(0.2, 40)]
        mask = rng.random((side, side)).astype(np.float32)
        grids = [
            (torch.arange(length) + 0.5 - low) / (high - low) * 2 - 1
            for length, low, high in ((size[1], box[0], box[2]), (size[0], box[1], box[3]))
        ]
        across, down = torch.meshgrid(*grids, indexing="xy")
        grid = torch.stack([across, down], -1)[None].float()
        expected = F.grid_sample(torch.from_numpy(mask)[None, None], grid, align_corners=False)[0, 0]
        (pasted,) = paste(mask[None], np.array([box], np.float32), size)
        sure = (expected - 0.5).abs().numpy() > 1e-4
        np.testing.assert_array_equal(whole(pasted, size)[sure], (expected.numpy() >= 0.5)[sure])


def test_boxes_outside_the_image_have_no_pixel() -> None:
    boxes = np.array([[-9, -9, -4, -4], [60, 2, 70, 8], [2, 2, 6, 6], [1, 40, 5, 50]], np.float32)
    found = paste(np.ones((4, 28, 28), np.float32), boxes, (20, 30))
    assert [int(instance.mask.sum()) for instance in found] == [0, 0, 16, 0]
    assert paste(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (20, 30)) == []
