"""Input normalisation against the formula."""

from __future__ import annotations

import numpy as np
import torch

from panoptic.layers.image import ImageNormalisation
from panoptic.segmentation import Frame

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def test_images_are_normalised_and_batch_padding_is_zero() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    frame = Frame((8, 10), torch.tensor([[8, 10], [5, 7]]), torch.tensor([[8, 10], [5, 7]]))
    x = ImageNormalisation(MEAN, STD)(images, frame)
    expected = (images.numpy() - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    np.testing.assert_allclose(x[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(x[1, :, :5, :7], expected[1, :, :5, :7], atol=1e-5)
    assert not x[1, :, 5:].any() and not x[1, :, :, 7:].any()
    assert ImageNormalisation(MEAN, STD)(images)[1, :, 5:].any()
    bgr = ImageNormalisation(MEAN[::-1], STD[::-1], bgr=True)(images)
    assert torch.equal(bgr.flip(1), ImageNormalisation(MEAN, STD)(images))
    assert not ImageNormalisation(MEAN, STD).state_dict()
