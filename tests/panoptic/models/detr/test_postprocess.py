"""DETR's post-processors against the plain way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle

from panoptic.layers.upsampled_argmax import highest
from panoptic.models.detr.class_space import ClassSpace
from panoptic.models.detr.postprocess import (
    _resized,
    binary_masks,
    box_masks,
    encode,
    merge_boxes,
    merge_masks,
    postprocess,
)
from panoptic.segmentation import Categories, Frame


def blobs(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Smooth logits [count, *size] with some noise."""
    torch.manual_seed(seed)
    smooth = F.interpolate(torch.randn(1, count, 4, 5) * 3, size=size, mode="bilinear")[0]
    return smooth + 0.2 * torch.randn(count, *size)


def plain_merge(masks, labels, categories, size, output_size, min_area) -> tuple[np.ndarray, list[int]]:
    """The published loop, step by step, over whole maps: ids from 0 as in the original, and the queries left."""
    up = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    rows, columns = (
        ((np.arange(after) + 0.5) * before / after).astype(int) for before, after in zip(size, output_size, strict=True)
    )
    left = list(range(len(masks)))

    def ids(dedup: bool) -> np.ndarray:
        owners = up[left].argmax(0).numpy()
        if dedup:
            for label in categories.stuff:
                same = [i for i, q in enumerate(left) if labels[q] == label]
                for other in same[1:]:
                    owners[owners == other] = same[0]
        return owners[rows][:, columns]

    owners = ids(dedup=True)
    while left:
        areas = [(owners == i).sum() for i in range(len(left))]
        if min(areas) > min_area:
            break
        left = [q for q, area in zip(left, areas, strict=True) if area > min_area]
        if left:
            owners = ids(dedup=False)
    return owners, left


@pytest.mark.parametrize(
    "shape", [((25, 33), (100, 132)), ((13, 9), (49, 35)), ((20, 20), (20, 20)), ((7, 1), (26, 3))]
)
def test_the_highest_query_is_that_of_the_interpolated_maps(shape) -> None:
    low, canvas = shape
    masks = blobs(7, low, 0)
    up = F.interpolate(masks[None], size=canvas, mode="bilinear", align_corners=False)[0]
    assert (highest(masks, canvas, canvas) != up.argmax(0)).float().mean() < 1e-3
    inside = (canvas[0] - 5, canvas[1] - 2)
    assert (highest(masks, canvas, inside) != up[:, : inside[0], : inside[1]].argmax(0)).float().mean() < 1e-3
    needed = torch.zeros(canvas, dtype=torch.bool)
    needed[::2] = True
    assert (highest(masks, canvas, canvas, needed) != up.argmax(0))[needed].float().mean() < 1e-3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("output_size", [(59, 79), (112, 46), (60, 82)])
def test_merging_follows_the_published_loop(seed, output_size, small_categories) -> None:
    masks, labels = blobs(9, (15, 20), seed), torch.from_numpy(np.random.default_rng(seed).integers(0, 5, 9))
    masks[3] -= 1.5  # a few pixels at most
    scores, min_area = torch.rand(9), 40
    sizes = dict(canvas=(59, 79), size=(59, 79), output_size=output_size)
    merged = merge_masks(masks, labels, scores, small_categories, min_area=min_area, **sizes)
    expected, left = plain_merge(masks, labels.tolist(), small_categories, (59, 79), output_size, min_area)
    np.testing.assert_array_equal(merged.labels, labels[left])
    np.testing.assert_allclose(merged.scores, scores[left])
    assert (merged.segments - 1 != expected).mean() < 1e-3


def test_nothing_kept_and_nothing_left_is_void(small_categories) -> None:
    sizes = dict(canvas=(8, 8), size=(8, 8), output_size=(5, 6))
    none = merge_masks(
        torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.long), torch.zeros(0), small_categories, **sizes
    )
    one = (torch.ones(1, 2, 2), torch.zeros(1, dtype=torch.long), torch.ones(1), small_categories)
    small = merge_masks(*one, min_area=30, **sizes)
    for void in (none, small):
        assert void.size == (5, 6) and not void.segments.any() and not len(void.labels)
    assert merge_masks(*one, min_area=29, **sizes).areas().tolist() == [30]


def test_the_reference_resizes_ids_as_pillow_does() -> None:
    pillow = pytest.importorskip("PIL.Image")
    ids = torch.arange(37 * 53, dtype=torch.int32).view(37, 53)
    for size in [(37, 53), (74, 106), (123, 161), (11, 200), (36, 52)]:
        image = pillow.fromarray(ids.numpy()).resize(size[::-1], pillow.Resampling.NEAREST)
        np.testing.assert_array_equal(_resized(ids, size), np.asarray(image))


def test_boxes_are_painted_the_more_certain_one_in_front(small_categories: Categories) -> None:
    thing, stuff = small_categories.things[0], small_categories.stuff[0]
    boxes = torch.tensor([[0.0, 0, 3, 3], [2, 2, 5, 5], [-4, 0, 1, 9], [7, 7, 7, 7], [20, 20, 30, 30]])
    labels = torch.tensor([thing, thing, stuff, stuff, thing])
    painted = merge_boxes(boxes, labels, torch.tensor([0.5, 0.9, 0.7, 0.6, 1.0]), small_categories, (8, 8))
    assert painted.labels.tolist() == [thing, thing, stuff]
    assert painted.segments[2, 2] == 2 and painted.segments[0, 0] == 3 and painted.segments[0, 3] == 1
    assert painted.segments[7, 7] == 3 and painted.segments[6, 6] == 0


def test_instance_masks_overlap_and_come_at_the_output_size() -> None:
    masks = blobs(4, (6, 8), 1)
    up = F.interpolate(masks[None], size=(24, 32), mode="bilinear", align_corners=False)[0].sigmoid() > 0.5
    binary = binary_masks(masks, (24, 32), (20, 30), (40, 60))
    np.testing.assert_array_equal(binary, up[:, :20, :30].repeat_interleave(2, 1).repeat_interleave(2, 2))
    encoded = encode(binary)
    np.testing.assert_array_equal(rle.decode(encoded).transpose(2, 0, 1), binary)
    boxes = box_masks(torch.tensor([[1.0, 2, 3, 2]]), (5, 6))
    assert boxes.nonzero().tolist() == [[0, 2, 1], [0, 2, 2], [0, 2, 3]]


@pytest.mark.parametrize("want", [["maps"], ["semantics"], ["instances"], ["maps", "instances", "semantics"]])
def test_masks_are_made_once_of_the_queries_that_need_one(want, small_categories) -> None:
    """Query 0 is stuff, 1 an uncertain thing, 2 a certain one, 3 no object whose best class is stuff."""
    thing, stuff, nothing = small_categories.things[0], small_categories.stuff[0], len(small_categories)
    logits = torch.full((1, 4, nothing + 1), -9.0)
    logits[0, range(4), [stuff, thing, thing, nothing]] = torch.tensor([9.0, -7.0, 9.0, 9.0])
    logits[0, 3, stuff] = -8.0
    calls = []

    def query_masks(image: int, queries: torch.Tensor) -> torch.Tensor:
        calls.append((image, queries.tolist()))
        return torch.arange(float(len(queries)))[:, None, None].expand(-1, 2, 2) + 1

    size = torch.tensor([[8, 8]])
    outputs, frame = {"logits": logits, "boxes": torch.rand(1, 4, 4)}, Frame((8, 8), size, size)
    prediction = postprocess(
        outputs, frame, want, classes=ClassSpace(nothing), categories=small_categories, query_masks=query_masks
    )
    confident, things = {0, 2}, {1, 2}
    needed = {"maps": confident, "semantics": confident, "instances": things}
    assert calls == [(0, sorted(set.union(*(needed[name] for name in want))))]
    assert [getattr(prediction, name) is not None for name in needed] == [name in want for name in needed]
    for semantic in prediction.semantics or ():
        assert (semantic == thing).all()
    for instances in prediction.instances or ():
        assert instances.labels.tolist() == [thing, thing] and rle.area(instances.masks).tolist() == [64, 64]
