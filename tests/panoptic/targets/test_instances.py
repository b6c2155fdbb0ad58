"""Boxes and masks of segments against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from panoptic.segmentation import Frame, Sample, Segmentation, Targets, collate
from panoptic.targets import instances
from panoptic.targets.instances import boxes, instance_lists, mask_targets, masks, region_masks

WAYS = pytest.mark.parametrize("boxes_of", [boxes, instances._boxes_of_pixels], ids=["runs", "pixels"])
"""From runs, as on a CPU, and from pixels, as on a GPU."""


def batch(random_segmentation, categories, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    truths = [
        random_segmentation(rng, 40, 61, categories, things=7, crowd=True),
        random_segmentation(rng, 33, 50, categories, things=3),
        Segmentation(np.zeros((20, 20), np.int32), np.zeros(0, np.int64)),
    ]
    samples = [Sample(np.zeros((*t.size, 3), np.uint8), t, f"sample {k}") for k, t in enumerate(truths)]
    return collate(samples, 32)[1]


@WAYS
def test_boxes_are_those_of_the_masks(boxes_of, random_segmentation, small_categories) -> None:
    targets = batch(random_segmentation, small_categories)
    corners = boxes_of(targets)
    assert corners.dtype == torch.float32 and corners.shape == (*targets.labels.shape, 4)
    for b, image in enumerate(targets.segments):
        for k in range(targets.labels.shape[1]):
            rows, columns = (image == k + 1).nonzero(as_tuple=True)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert corners[b, k].tolist() == [float(x) for x in expected]


@WAYS
def test_boxes_at_the_ends_of_rows_and_of_the_batch(boxes_of) -> None:
    segments = torch.zeros(2, 3, 4, dtype=torch.int32)
    segments[0, 0, 3], segments[0, 1, 0] = 1, 1  # neighbours in memory, not in the image
    segments[1, 2, 3] = 2
    targets = Targets(
        segments,
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.bool),
        Frame.full(torch.zeros(2, 3, 3, 4)),
        ("a", "b"),
    )
    assert boxes_of(targets).tolist() == [[[0, 0, 4, 2], [0, 0, 0, 0]], [[0, 0, 0, 0], [3, 2, 4, 3]]]


def test_lists_hold_the_things_that_can_be_seen(random_segmentation, small_categories) -> None:
    known = batch(random_segmentation, small_categories)
    targets = replace(known, countable=None)
    for told, asked in zip(*(instance_lists(t, small_categories) for t in (known, targets)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(told, asked, strict=True))
    targets.segments[1][targets.segments[1] == 3] = 0  # a thing loses its last pixel
    entries, outlines, classes = instance_lists(targets, small_categories)
    assert [len(e) for e in entries][2] == 0 and outlines[2].shape == (0, 4)
    for b in range(3):
        labels = targets.labels[b, entries[b]].tolist()
        assert labels == [small_categories.things[k] for k in classes[b].tolist()]
        assert not targets.crowd[b, entries[b]].any()
        assert (masks(targets, b, entries[b]).flatten(1).sum(1) > 0).all()
    seen = [k for k, label in enumerate(targets.labels[0].tolist()) if label in small_categories.things]
    assert entries[0].tolist() == [k for k in seen if not targets.crowd[0, k]]
    assert 2 not in entries[1].tolist()


def test_mask_targets_of_a_batch_in_little_memory(random_segmentation, small_categories, monkeypatch) -> None:
    targets = batch(random_segmentation, small_categories)
    entries, outlines, _ = instance_lists(targets, small_categories)
    generator = torch.Generator().manual_seed(0)
    owners = [torch.randint(0, max(1, len(e)), (5 if len(e) else 0,), generator=generator) for e in entries]
    regions = [
        o[owner] + torch.rand(len(owner), 4, generator=generator) for o, owner in zip(outlines, owners, strict=True)
    ]
    expected = torch.cat([mask_targets(masks(targets, b, entries[b]), regions[b], owners[b], 14) for b in range(2)])
    assert torch.equal(region_masks(targets, entries, regions, owners, 14), expected)
    monkeypatch.setattr(instances, "PLANES", 1)  # one mask at a time
    assert torch.equal(region_masks(targets, entries, regions, owners, 14), expected)
    assert expected.min() >= 0 and expected.max() <= 1 and expected.max() > 0.5
