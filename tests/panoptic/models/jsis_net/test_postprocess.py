"""JSIS-Net's merge: who owns a pixel, which stuff stays, and that nothing is void."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.models.jsis_net.postprocess import (
    Conflicts,
    DetectedInstances,
    merge_conflicts,
    most_probable,
    pixel_owners,
)
from panoptic.segmentation import Categories

SKY, ROAD = 1, 3
PERSON, CAR = 0, 2


def instances(boxes: list[list[float]], masks: Tensor, labels: list[int] | None = None) -> DetectedInstances:
    labels = [PERSON] * len(boxes) if labels is None else labels
    return DetectedInstances(
        torch.tensor(boxes).reshape(-1, 4), masks, torch.tensor(labels), torch.ones(len(boxes)) * 0.9
    )


NOTHING = instances([], torch.zeros(0, 2, 2), [])


def ramp(side: int = 28) -> Tensor:
    """A mask that falls from left to right, from just below 1 to just above 0."""
    return (1 - (torch.arange(side) + 0.5) / side).expand(side, side)


def classes(rows: list[list[float]], height: int, width: int) -> Tensor:
    """[C, height, width], one vector of probabilities for each of some vertical bands of equal width."""
    table = torch.tensor(rows)
    return table[torch.arange(width) * len(rows) // width].T[:, None].expand(-1, height, -1)


def test_a_pixel_of_two_instances_goes_to_the_more_probable_one() -> None:
    box = [[0.0, 0.0, 56.0, 28.0]] * 2
    # the two cross where both are 0.5; the first one falls, the second one rises
    masks = torch.stack([ramp(), ramp().flip(1)])
    owner = pixel_owners(instances(box, masks), (28, 56), 0.0)
    assert (owner[:, :28] == 1).all() and (owner[:, 28:] == 2).all()
    # raised, they overlap in the middle and still part at the crossing
    owner = pixel_owners(instances(box, (masks + 0.3).clamp(max=1)), (28, 56), 0.5)
    clear = owner[:, 12:44]  # both are 1 further outside
    assert (clear[:, :16] == 1).all() and (clear[:, 16:] == 2).all()


def test_of_equals_the_first_instance_wins() -> None:
    owner = pixel_owners(instances([[2.0, 2.0, 10.0, 10.0]] * 3, torch.full((3, 4, 4), 0.8)), (12, 12), 0.5)
    assert set(owner.unique().tolist()) == {0, 1}


def test_pixels_of_no_probable_instance_stay_stuff(small_categories: Categories) -> None:
    masks = torch.stack([ramp(8), torch.full((8, 8), 0.45)])
    boxes = [[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 64.0, 32.0]]
    probabilities = classes([[0.2, 0.1, 0.3, 0.3, 0.1]], 8, 8)
    merged = merge_conflicts(
        instances(boxes, masks), probabilities, (32, 64), small_categories, Conflicts(stuff_area=1)
    )
    assert merged.labels.tolist() == [PERSON, ROAD]
    inside = merged.segments == 1
    assert inside[8:24, 4:15].all() and not inside[:, 17:].any() and (merged.segments > 0).all()


def reference_windows(mask: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """The whole image by torch's own sampling."""
    x0, y0, x1, y1 = box
    y = (torch.arange(size[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(size[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    return F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_owners_are_those_of_whole_probability_maps(seed: int) -> None:
    torch.manual_seed(seed)
    size = (37, 53)
    corners = torch.rand(6, 2, 2) * torch.tensor([70.0, 50.0]) - 8
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], 1).tolist()
    masks = torch.rand(6, 7, 7)
    maps = torch.stack([reference_windows(m, b, size) for m, b in zip(masks, boxes, strict=True)])
    best, index = maps.max(0)
    expected = torch.where(best >= 0.5, index + 1, 0)
    close = maps.topk(2, 0).values
    sure = (((close[0] - close[1]) > 1e-4) & ((best - 0.5).abs() > 1e-4)) | (best < 0.49)
    assert sure.float().mean() > 0.9
    assert torch.equal(pixel_owners(instances(boxes, masks), size, 0.5)[sure], expected[sure].int())


@pytest.mark.parametrize(("area", "kept"), [(4095, False), (4096, True)])
def test_stuff_of_few_pixels_gives_way_to_the_next_best(area: int, kept: bool, small_categories: Categories) -> None:
    height, width = 128, 128
    sky = torch.zeros(height * width)
    sky[:area] = 1
    sky = sky.view(height, width)
    # where sky is best road is worth 0.3; a thing is better still and is never taken
    probabilities = torch.stack([torch.full_like(sky, 0.8), 0.2 + 0.3 * sky, 0 * sky, 0.3 + 0 * sky, 0 * sky])
    merged = merge_conflicts(NOTHING, probabilities, (height, width), small_categories, Conflicts())
    assert merged.labels.tolist() == ([SKY, ROAD] if kept else [ROAD])
    if kept:
        assert np.array_equal(merged.segments == 1, sky.numpy() > 0)


def test_the_next_best_is_chosen_pixel_by_pixel() -> None:
    c = Categories(("a", "b", "c", "thing"), (False, False, False, True), (0, 1, 2, 3), ((0, 0, 0),) * 4)
    # few pixels of a: half of them prefer b, half c
    rows = [[0.0, 0.9, 0.1, 0.0]] * 7 + [[0.5, 0.3, 0.2, 0.0], [0.5, 0.2, 0.3, 0.0]] + [[0.0, 0.1, 0.9, 0.0]] * 7
    probabilities = classes(rows, 4, 16)
    merged = merge_conflicts(NOTHING, probabilities, (4, 16), c, Conflicts(stuff_area=9))
    assert merged.labels.tolist() == [1, 2]
    assert (merged.segments == np.where(np.arange(16) < 8, 1, 2)).all()


def test_where_no_stuff_is_frequent_the_most_frequent_stays(small_categories: Categories) -> None:
    rows = [[0.9, 0.06, 0.0, 0.04, 0.0]] * 3 + [[0.9, 0.04, 0.0, 0.06, 0.0]] * 5
    merged = merge_conflicts(NOTHING, classes(rows, 8, 8), (8, 8), small_categories, Conflicts())
    assert merged.labels.tolist() == [ROAD] and (merged.segments == 1).all()


def test_stuff_is_counted_before_things_cover_it_or_after(small_categories: Categories) -> None:
    # sky lies under the instance alone, and a little beside it
    rows = [[0.0, 0.9, 0.0, 0.1, 0.0]] * 5 + [[0.0, 0.1, 0.0, 0.9, 0.0]] * 3
    covering = instances([[0.0, 0.0, 32.0, 32.0]], torch.ones(1, 28, 28))
    before = Conflicts(stuff_area=300)
    for conflicts, labels in ((before, [SKY, ROAD]), (replace(before, count_after_things=True), [ROAD])):
        merged = merge_conflicts(covering, classes(rows, 32, 64), (32, 64), small_categories, conflicts)
        assert merged.labels.tolist() == [PERSON, *labels]


def test_the_options_of_the_next_network(small_categories: Categories) -> None:
    rows = [[0.0, 0.5, 0.0, 0.3, 0.0]] + [[0.0, 0.1, 0.0, 0.9, 0.0]] * 31
    few = classes(rows, 64, 32)  # sky has 64 of 2048 pixels
    share = Conflicts(stuff_share=1 / 32)
    assert merge_conflicts(NOTHING, few, (64, 32), small_categories, share).labels.tolist() == [ROAD]
    share = replace(share, stuff_share=1 / 32 - 1e-6)
    assert merge_conflicts(NOTHING, few, (64, 32), small_categories, share).labels.tolist() == [SKY, ROAD]
    doubt = Conflicts(stuff_area=1, stuff_threshold=0.6)
    merged = merge_conflicts(NOTHING, few, (64, 32), small_categories, doubt)
    assert merged.labels.tolist() == [ROAD] and (merged.segments[:, 0] == 0).all()


def test_every_detection_is_a_segment_and_hidden_ones_are_dropped(small_categories: Categories) -> None:
    boxes = [[0.0, 0.0, 20.0, 20.0], [20.0, 0.0, 40.0, 20.0], [4.0, 4.0, 16.0, 16.0]]
    masks = torch.stack([torch.ones(4, 4), torch.ones(4, 4), torch.full((4, 4), 0.7)])
    merged = merge_conflicts(
        instances(boxes, masks, [CAR, PERSON, CAR]),
        classes([[0.0, 1, 0, 0, 0]], 8, 8),
        (24, 48),
        small_categories,
        Conflicts(),
    )
    assert merged.labels.tolist() == [CAR, PERSON, SKY]  # the third one is nowhere the most probable
    assert merged.scores is not None and merged.scores.tolist() == pytest.approx([0.9, 0.9, 1.0])
    assert (merged.segments > 0).all()


def test_without_a_semantic_branch_the_rest_is_void(small_categories: Categories) -> None:
    merged = merge_conflicts(
        instances([[0.0, 0.0, 8.0, 8.0]], torch.ones(1, 28, 28)), None, (16, 16), small_categories, Conflicts()
    )
    assert merged.labels.tolist() == [PERSON]
    assert (merged.segments[:8, :8] == 1).all() and merged.segments.sum() == 64


def test_classes_are_chosen_a_few_at_a_time() -> None:
    torch.manual_seed(0)
    probabilities, allowed = torch.rand(40, 9, 7), list(range(1, 40, 2))
    best, chosen = most_probable(probabilities, (31, 20), allowed)
    whole = F.interpolate(probabilities[None], (31, 20), mode="bilinear")[0][allowed]
    assert torch.allclose(best, whole.amax(0))
    assert torch.equal(chosen, torch.tensor(allowed)[whole.argmax(0)])
