"""Drawing and merging of Panoptic FCN against the published implementation's numbers, and hard cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle

from panoptic.layers.greedy_merge import CroppedMask, merge_by_score
from panoptic.models.panoptic_fcn.conv_stack import with_coordinates
from panoptic.models.panoptic_fcn.postprocess import (
    View,
    as_instances,
    draw_regions,
    draw_things,
    merge_by_probability,
)
from panoptic.segmentation import IGNORE


def test_coordinates(units) -> None:
    expected = units["coord"]
    assert torch.equal(with_coordinates(expected[:, :1]), expected)


def test_published_scoring_and_masks(units) -> None:
    arrays = units
    logits = arrays["proc_logits"][0]
    view = View.of((16, 20), (60, 78), (90, 117), logits)
    things = draw_things(logits, arrays["proc_cls"], arrays["proc_score"], view)
    expected = np.unpackbits(arrays["proc_masks"].numpy(), axis=2)[:, :, :117].astype(bool)
    assert things.labels.tolist() == arrays["proc_out_cls"].tolist() and len(things.masks) == len(expected)
    np.testing.assert_allclose(things.scores, arrays["proc_out_score"], rtol=1e-5)
    found = as_instances(things)
    drawn = np.stack([rle.decode(mask) for mask in found.masks]).astype(bool)
    assert (drawn != expected).mean() < 1e-5  # a probability within rounding of the threshold
    np.testing.assert_array_equal(found.boxes, arrays["proc_boxes"])


def test_published_merge(published_units) -> None:
    arrays, meta = published_units
    masks = np.unpackbits(arrays["proc_masks"].numpy(), axis=2)[:, :, :117].astype(bool)
    rule = meta["comb"]
    merged = merge_by_score(
        [CroppedMask(0, 0, mask) for mask in masks],
        arrays["proc_out_cls"].tolist(),
        arrays["proc_out_score"].numpy(),
        arrays["comb_sem"].numpy(),
        [IGNORE, *range(1001, 1006)],
        [0.5] * 6,
        confidence=rule["thr"],
        overlap=rule["overlap"],
        stuff_area=rule["stuff"],
    )
    np.testing.assert_array_equal(merged.segments, arrays["comb_pan"].numpy())
    ids = [s["category_id"] if s["isthing"] else 1000 + s["category_id"] for s in rule["segments"]]
    assert merged.labels.tolist() == ids
    assert [s.get("area", a) for s, a in zip(rule["segments"], merged.areas(), strict=True)] == merged.areas().tolist()


@pytest.mark.parametrize(
    ("cells", "size", "output"),
    [
        ((16, 24), (61, 93), (61, 93)),
        ((16, 24), (50, 96), (123, 61)),
        ((8, 8), (30, 31), (7, 5)),
        ((4, 6), (5, 24), (40, 9)),
    ],
)
def test_windows_and_matrices_are_a_resize_of_whole_planes(cells, size, output) -> None:
    rng = torch.Generator().manual_seed(3)
    coarse = torch.randn(6, 5, 5, generator=rng)
    logits = 3 * F.interpolate(coarse[None], cells, mode="bicubic")[0] - 1
    view = View.of(cells, size, output, logits)
    whole = F.interpolate(logits.sigmoid()[None], scale_factor=4, mode="bilinear", align_corners=False)
    whole = F.interpolate(whole[..., : size[0], : size[1]], output, mode="bilinear", align_corners=False)[0]
    scores = torch.linspace(1, 0.5, 6)
    things = draw_things(logits, torch.arange(6), scores, view, threshold=0.4, lowest=0.0)
    for k, label in enumerate(things.labels):
        plane = np.zeros(output, bool)
        plane[things.masks[k].window] = things.masks[k].mask
        sure = (whole[label] - 0.4).abs() > 1e-5
        assert torch.equal(torch.from_numpy(plane)[sure], (whole[label] > 0.4)[sure])
    labels = torch.tensor([2, 3, 5, 7, 8, 9])
    best = whole.topk(2, dim=0)
    sure = best.values[0] - best.values[1] > 1e-5
    assert torch.equal(torch.from_numpy(draw_regions(logits, labels, view))[sure], labels.int()[best.indices[0]][sure])


def test_nothing_found_is_an_empty_map() -> None:
    view = View.of((4, 4), (16, 16), (16, 16), torch.zeros(()))
    things = draw_things(torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), view)
    regions = draw_regions(torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64), view)
    merged = merge_by_score(things.masks, things.labels.tolist(), things.scores, regions, [IGNORE])
    assert len(merged.labels) == 0 and not merged.segments.any()
    assert as_instances(things).boxes.shape == (0, 4)


def test_a_pixel_without_any_probability_has_no_region() -> None:
    """The reference scatters the classes over zeros before it takes the highest."""
    view = View.of((4, 4), (16, 16), (16, 16), torch.zeros(()))
    logits = torch.full((2, 4, 4), -200.0)
    logits[1, :, 2:] = 3.0
    regions = draw_regions(logits, torch.tensor([3, 5]), view)
    assert (regions[:, :6] == 0).all() and (regions[:, 8:] == 5).all()


def halves(*logits: tuple[float, float]) -> torch.Tensor:
    """Planes [K, 4, 4] that are one logit left and another right."""
    return torch.tensor(logits)[:, None, [0, 0, 1, 1]].expand(-1, 4, -1).contiguous()


OPTIONS = {"threshold": 0.4, "confidence": 0.2, "most": 100, "stuff_area": 0}


def by_probability(things: torch.Tensor, scores: list[float], regions: torch.Tensor, labels: list[int], **changes):
    """Things of classes 10, 11, … and stuff of classes 20 to 22 behind one region that stands for things."""
    view = View.of((4, 4), (16, 16), (16, 16), torch.zeros(()))
    stuff, stuff_scores = [IGNORE, IGNORE, 20, 21, 22], np.array([0.0, 0.9, 0.5, 0.6, 0.7])
    classes = torch.arange(len(things)) + 10
    known = (things, classes, torch.tensor(scores), regions, torch.tensor(labels, dtype=torch.int64), view)
    return merge_by_probability(*known, stuff, stuff_scores, **{**OPTIONS, **changes})


def test_argmax_gives_a_pixel_to_the_most_probable_mask() -> None:
    """Whatever the scores: the better thing loses the right half, which the greedy merge would have left to it."""
    things, regions = halves((3.0, 2.0), (-5.0, 4.0)), halves((1.0, 1.0))
    merged = by_probability(things, [0.9, 0.5], regions, [2])
    assert merged.labels.tolist() == [10, 11] and merged.scores.tolist() == pytest.approx(
        [0.9 * 0.917, 0.5 * 0.982], abs=2e-3
    )
    assert (merged.segments[:, :6] == 1).all() and (merged.segments[:, 10:] == 2).all()
    unsure = by_probability(things, [0.9, 0.1], regions, [2])
    assert unsure.labels.tolist() == [10] and (unsure.segments == 1).all()
    assert by_probability(things, [0.5, 0.9], regions, [2]).labels.tolist() == [11, 10]


def test_argmax_takes_stuff_as_it_takes_things() -> None:
    things, regions = halves((3.0, -3.0)), halves((4.0, 4.0), (-9.0, 2.0), (-8.0, -8.0))
    merged = by_probability(things, [0.9], regions, [1, 3, 4])  # the region of all things is no stuff
    assert merged.labels.tolist() == [10, 21] and merged.scores[1] == pytest.approx(0.6)
    assert (merged.segments[:, :6] == 1).all() and (merged.segments[:, 10:] == 2).all()
    small = by_probability(things, [0.9], regions, [1, 3, 4], stuff_area=200)
    assert small.labels.tolist() == [10] and (small.segments[:, 10:] == 0).all()
    nothing = by_probability(things, [0.9], halves((-9.0, 2.0), (-9.0, 9.0)), [3, 0])  # as a true mask has it
    assert nothing.labels.tolist() == [10] and (nothing.segments[:, 10:] == 0).all()
    empty = by_probability(torch.zeros(0, 4, 4), [], torch.zeros(0, 4, 4), [])
    assert len(empty.labels) == 0 and not empty.segments.any()
