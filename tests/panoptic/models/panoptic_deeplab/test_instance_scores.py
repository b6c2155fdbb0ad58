"""Masks and scores of the instances of a merged map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle

from panoptic.models.panoptic_deeplab import grouping, instance_scores
from panoptic.segmentation import Segmentation
from tests.panoptic.models.panoptic_deeplab.test_postprocess import CATEGORIES


def test_instances_have_the_masks_of_their_segments(random_segmentation, small_categories):
    truth = random_segmentation(np.random.default_rng(1), 37, 53, small_categories)
    logits = torch.randn(5, 37, 53)
    instances = instance_scores.scored_instances(truth, logits, torch.rand(37, 53), small_categories)
    things = [k for k, label in enumerate(truth.labels, 1) if small_categories.is_thing[label]]
    assert len(things) == len(instances.masks) == len(instances.scores) > 1
    for k, mask, box in zip(things, instances.masks, instances.boxes, strict=True):
        expected = rle.encode(np.asfortranarray((truth.segments == k).astype(np.uint8)))
        assert mask == expected
        rows, columns = np.nonzero(truth.segments == k)
        np.testing.assert_array_equal(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_upsampled_where_there_are_things(align_corners, random_segmentation, small_categories, monkeypatch):
    monkeypatch.setattr(grouping, "BLOCK", {"cpu": 100})
    truth = random_segmentation(np.random.default_rng(1), 37, 53, small_categories)
    coarse, heatmap, size = torch.randn(5, 10, 14), torch.rand(37, 53), (40, 56)
    whole = F.interpolate(coarse[None], size=size, mode="bilinear", align_corners=align_corners)[0]
    expected = instance_scores.scored_instances(truth, whole[:, :37, :53], heatmap, small_categories)
    instances = instance_scores.scored_instances(
        truth, coarse, heatmap, small_categories, upsampled=size, align_corners=align_corners
    )
    assert len(expected.scores) > 1
    np.testing.assert_allclose(instances.scores, expected.scores, rtol=1e-5)
    assert instances.masks == expected.masks


def test_no_instance_gives_empty_instances():
    nothing = Segmentation(np.zeros((4, 5), np.int32), np.zeros(0, np.int64))
    instances = instance_scores.scored_instances(nothing, torch.zeros(4, 4, 5), torch.zeros(4, 5), CATEGORIES)
    assert instances.masks == []
    assert instances.boxes.shape == (0, 4)
    assert instances.scores.shape == instances.labels.shape == (0,)


def test_a_listed_thing_without_a_pixel_has_an_empty_mask():
    truth = Segmentation(np.array([[2, 2]], np.int32), np.array([0, 1]))
    instances = instance_scores.scored_instances(truth, torch.zeros(4, 1, 2), torch.ones(1, 2), CATEGORIES)
    assert [int(rle.area(mask)) for mask in instances.masks] == [0, 2]
    np.testing.assert_allclose(instances.scores, [0, 0.25])
