"""Peaks, regions, fusion, drawing and merging of Panoptic FCN against the published implementation's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from torch.nn import functional

from panoptic.models.panoptic_fcn.conv_stack import with_coordinates
from panoptic.models.panoptic_fcn.kernel_fusion import (
    Level,
    best_cells,
    collect_regions,
    collect_things,
    find_things,
    fuse,
    fuse_classes,
    similar,
)
from panoptic.models.panoptic_fcn.kernels import region_kernels
from panoptic.models.panoptic_fcn.postprocess import (
    Things,
    View,
    as_instances,
    class_map,
    combine,
    draw_regions,
    draw_things,
)


@pytest.fixture(scope="module")
def units(fixture_arrays):
    arrays, meta = fixture_arrays("pfcn_units")
    return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta


def test_coordinates(units) -> None:
    expected = units[0]["coord"]
    assert torch.equal(with_coordinates(expected[:, :1]), expected)


def test_published_ranking_over_classes(units) -> None:
    arrays, _ = units
    cell, label, score = best_cells(arrays["topk_in"][0], 7)
    assert torch.equal(cell, arrays["topk_inds"][0]) and torch.equal(label, arrays["topk_cls"][0])
    assert torch.equal(score, arrays["topk_score"][0])
    width = arrays["topk_in"].shape[-1]
    assert torch.equal(
        torch.stack([cell // width, cell % width]).float(), torch.cat([arrays["topk_ys"], arrays["topk_xs"]])
    )


def test_a_score_is_the_mean_with_its_window_and_only_peaks_count() -> None:
    logits = torch.full((2, 6, 8), -20.0)
    logits[0, 0, 0], logits[1, 3, 4], logits[1, 3, 5] = 2.0, 3.0, 1.0
    cell, label, score = find_things(logits, 3, 0.05, 50)
    p = torch.tensor([3.0, 1.0, 2.0]).sigmoid()
    # at the corner five of the window's nine cells lie beyond the border, and count as 0
    assert cell.tolist() == [3 * 8 + 4, 0] and label.tolist() == [1, 0]
    torch.testing.assert_close(score, torch.stack([(p[0] + (p[0] + p[1]) / 9) / 2, (p[2] + p[2] / 9) / 2]))
    assert find_things(logits, 3, 0.05, 1)[0].tolist() == [28]
    assert len(find_things(logits, 3, 0.6, 50)[0]) == 0


@pytest.mark.parametrize(("prefix", "aware"), [("fuse_thing", True), ("fuse_agn", False)])
def test_published_fusion(units, prefix: str, aware: bool) -> None:
    arrays, _ = units
    kernels, kept = fuse(arrays["fuse_kern"], similar(arrays["fuse_kern"], arrays["fuse_cate"], 0.9, aware))
    torch.testing.assert_close(kernels, arrays[f"{prefix}_kern"], rtol=0, atol=1e-6)
    assert torch.equal(arrays["fuse_cate"][kept], arrays[f"{prefix}_cate"])
    assert torch.equal(arrays["fuse_score"][kept], arrays[f"{prefix}_score"])


def test_published_fusion_of_stuff(units) -> None:
    arrays, _ = units
    kernels, labels, scores = fuse_classes(arrays["fuse_kern"], arrays["fuse_cate"], arrays["fuse_score"])
    torch.testing.assert_close(kernels, arrays["fuse_stuff_kern"], rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, arrays["fuse_stuff_score"], rtol=0, atol=1e-6)
    assert torch.equal(labels, arrays["fuse_stuff_cate"])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(0.3, 1.0), st.booleans())
def test_fusing_identical_kernels_changes_nothing(seed: int, copies: list[int], threshold: float, aware: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    apart = torch.eye(8)[: len(copies)] * torch.rand(len(copies), 1, generator=rng).add(0.1)
    labels = torch.randint(0, 3, (len(copies),), generator=rng)
    repeated = torch.tensor(copies)
    order = torch.randperm(int(repeated.sum()), generator=rng)
    owner = torch.arange(len(copies)).repeat_interleave(repeated)[order]
    kernels, kept = fuse(apart[owner], similar(apart[owner], labels[owner], threshold, aware))
    torch.testing.assert_close(kernels, apart[owner[kept]])
    assert sorted(owner[kept].tolist()) == list(range(len(copies)))
    again, still = fuse(kernels, similar(kernels, labels[owner[kept]], threshold, aware))
    torch.testing.assert_close(again, kernels)
    assert still.tolist() == list(range(len(copies)))


def test_a_kernel_of_zeros_and_no_kernel_at_all() -> None:
    kernels = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    fused, kept = fuse(kernels, similar(kernels, torch.tensor([0, 0]), 0.9, True))
    assert torch.equal(fused, kernels) and kept.tolist() == [0, 1]
    empty = torch.zeros(0, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert fuse(empty, similar(empty, none, 0.9, True))[0].shape == (0, 2)
    assert fuse_classes(empty, none, torch.zeros(0))[0].shape == (0, 2)


def test_published_scoring_and_masks(units) -> None:
    arrays, _ = units
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


def test_published_merge(units) -> None:
    arrays, meta = units
    masks = np.unpackbits(arrays["proc_masks"].numpy(), axis=2)[:, :, :117].astype(bool)
    count = len(masks)
    labels, scores = arrays["proc_out_cls"].numpy().astype(np.int64), arrays["proc_out_score"].numpy()
    things = Things(list(masks), [(0, 0)] * count, labels, scores, (90, 117))
    regions = arrays["comb_sem"].numpy()
    stuff = {region: (1000 + region, 0.5) for region in range(1, 6)}
    rule = meta["comb"]
    merged = combine(things, regions, stuff, lowest=rule["thr"], overlap=rule["overlap"], stuff_area=rule["stuff"])
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
    logits = 3 * functional.interpolate(coarse[None], cells, mode="bicubic")[0] - 1
    view = View.of(cells, size, output, logits)
    whole = functional.interpolate(logits.sigmoid()[None], scale_factor=4, mode="bilinear", align_corners=False)
    whole = functional.interpolate(whole[..., : size[0], : size[1]], output, mode="bilinear", align_corners=False)[0]
    scores = torch.linspace(1, 0.5, 6)
    things = draw_things(logits, torch.arange(6), scores, view, threshold=0.4, lowest=0.0)
    for k, label in enumerate(things.labels):
        plane = np.zeros(output, bool)
        plane[things.window(k)] = things.masks[k]
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
    merged = combine(things, regions, {})
    assert len(merged.labels) == 0 and not merged.segments.any()
    assert as_instances(things).boxes.shape == (0, 4)


def test_a_pixel_without_any_probability_has_no_region() -> None:
    """The reference scatters the classes over zeros before it takes the highest."""
    view = View.of((4, 4), (16, 16), (16, 16), torch.zeros(()))
    logits = torch.full((2, 4, 4), -200.0)
    logits[1, :, 2:] = 3.0
    regions = draw_regions(logits, torch.tensor([3, 5]), view)
    assert (regions[:, :6] == 0).all() and (regions[:, 8:] == 5).all()


def test_nothing_passes_the_thresholds() -> None:
    level = Level(torch.full((2, 3, 4), -9.0), torch.full((3, 3, 4), -9.0), torch.ones(5, 3, 4))
    kernels, labels, scores, owners = collect_things([level] * 5, (3,) * 5, 0.05, 50)
    assert kernels.shape == (0, 5) and len(labels) == len(scores) == len(owners) == 0
    kernels, labels, scores = collect_regions([level] * 5, 0.05)
    assert kernels.shape == (0, 5) and len(labels) == len(scores) == 0


def test_a_kernel_is_a_mean_over_the_map_or_over_its_region() -> None:
    logits = torch.full((2, 2, 4), -9.0)
    logits[1, 0, 0] = 9.0  # one cell of eight
    level = Level(torch.full((1, 2, 4), -9.0), logits, torch.arange(24.0).view(3, 2, 4) + 1)
    for own, expected in ((False, [1 / 8, 9 / 8, 17 / 8]), (True, [1.0, 9.0, 17.0])):
        kernels, labels, _ = collect_regions([level], 0.05, own=own)
        assert labels.tolist() == [1] and kernels.tolist() == [pytest.approx(expected)]
        image, region, trained = region_kernels(level.kernels[None], (logits > 0).float()[None], own)
        assert (image.tolist(), region.tolist()) == ([0], [1]) and torch.equal(trained, kernels)


def test_the_merged_map_names_the_things_of_a_class_map(small_categories) -> None:
    things = Things([np.ones((2, 3), bool)], [(0, 0)], np.array([small_categories.things[0]]), np.ones(1), (4, 3))
    regions = np.array([[1, 1, 2], [1, 3, 2], [1, 2, 2], [0, 3, 3]])
    stuff = {2: (small_categories.stuff[0], 0.5), 3: (small_categories.stuff[1], 0.5)}
    merged = combine(things, regions, stuff, stuff_area=1)
    thing, first, second = small_categories.things[0], *small_categories.stuff[:2]
    classes = class_map(regions, merged, (-1, *small_categories.stuff), np.array(small_categories.is_thing))
    expected = [[thing, thing, first], [thing, second, first], [-1, first, first], [-1, second, second]]
    assert classes.tolist() == expected and classes.dtype == np.int32
