"""Targets of Panoptic FCN against the published implementation's, and what it has no numbers for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panoptic.models.panoptic_fcn.targets import (
    KernelTargets,
    at_centres,
    gaussian_radius,
    kernel_targets,
    region_centres,
)
from panoptic.segmentation import Categories, Sample, Segmentation, Targets, collate

SCALES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))

COCO = Categories(
    names=tuple(f"class {i}" for i in range(133)),
    is_thing=tuple(i < 80 for i in range(133)),
    ids=tuple(range(133)),
    colours=((0, 0, 0),) * 133,
)

SMALLEST = 12
"""Pixels of the largest thing that the fixtures leave out of the instances."""


def truth_of(ids: np.ndarray, records: list[dict]) -> Segmentation:
    """A fixture's map; things that its instances leave out become crowds, which keep their place in the regions."""
    table = np.zeros(max(r["id"] for r in records) + 1, np.int32)
    table[[r["id"] for r in records]] = np.arange(1, len(records) + 1)
    crowd = [r["iscrowd"] or (r["category_id"] < 80 and r["area"] <= SMALLEST) for r in records]
    return Segmentation(table[ids], np.array([r["category_id"] for r in records]), np.array(crowd, bool))


def targets_of(truths: list[Segmentation]) -> Targets:
    return collate([Sample(np.zeros((*t.size, 3), np.uint8), t, str(k)) for k, t in enumerate(truths)], 32)[1]


def build_targets(targets: Targets, categories: Categories = COCO, **options) -> KernelTargets:
    height, width = targets.frame.canvas
    shapes = [(height // 8, width // 8)]
    for _ in range(4):
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    return kernel_targets(targets, categories, cells=(height // 4, width // 4), shapes=shapes, scales=SCALES, **options)


@pytest.mark.parametrize("name", ["two_img", "big", "without_thing"])
def test_published_targets(fixture_arrays, name: str) -> None:
    arrays, meta = fixture_arrays("pfcn_targets")
    case = next(c for c in meta["cases"] if c["name"] == name)
    truths = [truth_of(arrays[f"{name}/panoptic{i}"], segments) for i, segments in enumerate(case["segs"])]
    options = dict(zip(case["extra"][::2], case["extra"][1::2], strict=True))
    stuff = options.get("MODEL.POSITION_HEAD.STUFF.WITH_THING") is False
    found = build_targets(
        targets_of(truths),
        regions="stuff" if stuff else "with_things",
        centre=options.get("MODEL.POSITION_HEAD.THING.CENTER_TYPE", "mass"),
    )
    for k, level in enumerate(found.levels):
        expected = {
            key: arrays[f"{name}/{key}_{k}"] for key in ("center", "sem_scores", "index", "index_mask", "class")
        }
        np.testing.assert_allclose(level.things, expected["center"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(level.regions, expected["sem_scores"], rtol=0, atol=1e-6)
        used = expected["index_mask"] > 0
        assert len(level.cell) == used.sum() == case["n_per_level"][k]
        np.testing.assert_array_equal(level.cell, expected["index"][used])
        np.testing.assert_array_equal(level.label, expected["class"][used])
        masks = found.masks[level.image, level.thing].numpy()
        np.testing.assert_allclose(masks, arrays[f"{name}/inst_{k}"][used], rtol=0, atol=1e-3)  # float16
        present = (level.regions > 0).flatten(2).any(2)
        chosen = arrays[f"{name}/sem_index_{k}"] > 0
        np.testing.assert_array_equal(present.sum(1), chosen.sum(1))
        np.testing.assert_allclose(
            found.region_masks[present].numpy(), arrays[f"{name}/sem_labels_{k}"][chosen], rtol=0, atol=1e-3
        )
        np.testing.assert_array_equal(level.regions[present] > 0, arrays[f"{name}/sem_masks_{k}"][chosen] > 0)


def test_published_radius(fixture_arrays) -> None:
    arrays, _ = fixture_arrays("pfcn_units")
    width, height = torch.from_numpy(arrays["radius_wh"]).unbind(1)
    np.testing.assert_allclose(gaussian_radius(width, height, 0.7), arrays["radius"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(62, 90), (33, 70), (7, 5), (1, 1)])
def test_masks_are_those_of_a_bilinear_resize(size, small_categories, random_segmentation) -> None:
    truth = random_segmentation(np.random.default_rng(1), *size, small_categories, things=4)
    found = build_targets(targets_of([truth]), small_categories)
    cells = tuple(max(1, int(side / 4 + 0.5)) for side in size)
    for place, segment in enumerate(found.segments[0].tolist()):
        plane = torch.from_numpy(truth.segments == segment).float()[None, None] * (segment > 0)
        resized = F.interpolate(plane, cells, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(found.masks[0, place, : cells[0], : cells[1]], resized, rtol=0, atol=1e-6)
        assert not found.masks[0, place, cells[0] :].any() and not found.masks[0, place, :, cells[1] :].any()


def squares(sides: list[int], categories: Categories, size: tuple[int, int] = (128, 256)) -> Segmentation:
    segments, left = np.zeros(size, np.int32), 0
    for k, side in enumerate(sides):
        segments[:side, left : left + side] = k + 1
        left += side + 1
    return Segmentation(segments, np.full(len(sides), categories.things[0]))


def test_ends_of_the_ranges_belong_to_a_level(small_categories) -> None:
    found = build_targets(targets_of([squares([64, 32, 1, 100], small_categories)]), small_categories)
    assert [level.thing.tolist() for level in found.levels] == [[0, 1, 2], [0, 1, 3], [0, 3], [], []]


def test_of_too_many_things_the_largest_stay_in_their_order(small_categories) -> None:
    sides = [10, 20, 5, 20, 8]
    found = build_targets(
        targets_of([squares(sides, small_categories), squares([9], small_categories)]), small_categories, most=2
    )
    finest = found.levels[0]
    assert finest.image.tolist() == [0, 0, 1] and found.masks.shape[1] == 2
    assert found.segments.tolist() == [[2, 4], [1, 0]]


def test_a_thing_between_the_cells_has_its_peak_in_its_box(small_categories) -> None:
    segments = np.zeros((64, 64), np.int32)
    segments[40:41, 28:40] = 1  # a cell reads rows 1 and 2 of its four
    found = build_targets(
        targets_of([Segmentation(segments, np.array([small_categories.things[1]]))]), small_categories
    )
    finest = found.levels[0]
    assert not found.masks.any() and finest.cell.tolist() == [5 * 8 + 4]
    assert finest.things[0, 1].argmax() == 5 * 8 + 4 and finest.things.max() == 1


def test_neither_crowds_nor_nothing_are_things(small_categories) -> None:
    crowd = Segmentation(np.ones((32, 32), np.int32), np.array([small_categories.things[0]]), np.array([True]))
    nothing = Segmentation(np.zeros((32, 32), np.int32), np.zeros(0, np.int64))
    found = build_targets(targets_of([crowd, nothing]), small_categories)
    assert all(len(level.cell) == 0 and not level.things.any() for level in found.levels)
    assert found.region_masks[0, 0].all() and not found.region_masks[1].any()
    assert not build_targets(targets_of([crowd]), small_categories, regions="stuff").region_masks.any()
    whole = build_targets(targets_of([crowd]), small_categories, regions="all").region_masks[0]
    assert whole.any((1, 2)).nonzero()[:, 0].tolist() == [small_categories.things[0]]


def test_the_centre_of_a_region_is_its_covered_cell_nearest_to_the_middle() -> None:
    covered = torch.zeros(2, 3, 5, 9)
    covered[0, 1, :, 2:7] = 0.8  # a square
    covered[1, 2, 0, :] = covered[1, 2, 4, :] = covered[1, 2, :, 0] = covered[1, 2, :, 8] = 1.0  # a ring
    found = region_centres(covered, 0.7)
    assert (found == 1).sum((2, 3)).tolist() == [[0, 1, 0], [0, 0, 1]] and found[0, 1, 2, 4] == 1
    assert (found[0, 0] == 0).all() and (found <= 1).all() and found[0, 1, 2, 5] > 0
    row, column = (found[1, 2] == 1).nonzero()[0].tolist()
    assert column == 4 and row in (0, 4)  # the middle itself is not covered
    assert torch.equal(at_centres(found), (found == 1).float())
    one = torch.zeros(1, 1, 1, 1)
    assert region_centres(one, 0.7).item() == 0 and region_centres(one + 1, 0.7).item() == 1
