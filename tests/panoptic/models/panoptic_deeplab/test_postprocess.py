"""Merging: parity with both published post-processings, brute force, and what a partition must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic.models.panoptic_deeplab import grouping, instance_scores
from panoptic.models.panoptic_deeplab import postprocess as merging
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.targets.dense import centre_targets


def categories_of(things: list[int], count: int) -> Categories:
    is_thing = tuple(i in things for i in range(count))
    return Categories(tuple(map(str, range(count))), is_thing, tuple(range(count)), ((0, 0, 0),) * count)


CATEGORIES = categories_of([0, 1], 4)


def label_divisor_map(segmentation: Segmentation, categories: Categories, divisor: int, void: int) -> np.ndarray:
    """The references' form: class * divisor + a counter per thing class (0 for stuff)."""
    counters: dict[int, int] = {}
    ids = [void]
    for label in segmentation.labels.tolist():
        counters[label] = counters.get(label, 0) + 1
        ids.append(label * divisor + (counters[label] if categories.is_thing[label] else 0))
    return np.array(ids, np.int64)[segmentation.segments]


@pytest.mark.parametrize("flavour", ["a", "b"])
def test_parity_with_the_published_post_processing(fixture_arrays, flavour):
    inputs, _ = fixture_arrays("pdl_a_postproc")
    expected, meta = fixture_arrays(f"pdl_{flavour}_postproc")
    compared = set()
    for case in meta["cases"]:
        name = case["name"]
        categories = categories_of(case["things"], case["C"])
        logits, heatmap, offset = (torch.from_numpy(inputs[f"{name}/{k}"]) for k in ("sem_logits", "heatmap", "offset"))
        before = heatmap.clone(), offset.clone()
        peaks = dict(threshold=case["thr"], kernel=case["nms"], top_k=case["top_k"])
        semantic = logits.argmax(0)
        centres = grouping.find_centres(heatmap, **peaks)
        merged = merging.merge_centres(semantic, heatmap, offset, categories, stuff_area=case["stuff"], **peaks)
        void = 255 * case["div"] if flavour == "a" else -1
        panoptic = label_divisor_map(merged, categories, case["div"], void)
        np.testing.assert_array_equal(centres, expected[f"{name}/centers"])
        np.testing.assert_array_equal(panoptic, expected[f"{name}/panoptic"][0])
        compared |= {f"{name}/centers", f"{name}/panoptic"}
        assert torch.equal(heatmap, before[0])
        assert torch.equal(offset, before[1])
        if flavour == "b":
            continue
        thing = torch.tensor(categories.is_thing)[semantic]
        np.testing.assert_array_equal(grouping.group_pixels(centres, offset, thing), expected[f"{name}/instance"][0])
        compared |= {f"{name}/{k}" for k in ("sem_logits", "heatmap", "offset", "instance")}
        for score in ("semantic", "instance", "both"):
            instances = instance_scores.scored_instances(merged, logits, heatmap, categories, score)
            order = np.argsort(instances.labels, kind="stable")  # theirs are sorted by class
            np.testing.assert_array_equal(instances.labels[order], expected[f"{name}/inst_classes"])
            key = f"{name}/inst_scores_{score}"
            np.testing.assert_allclose(instances.scores[order], expected[key], rtol=1e-5, atol=1e-7)
            compared |= {key, f"{name}/inst_classes"}
    assert compared == set(expected)


@st.composite
def scenes(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small maps of few distinct values, so that ties are everywhere."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    semantic = torch.from_numpy(rng.integers(-1, 5, (height, width)))
    heatmap = torch.from_numpy(rng.choice([0.0, 0.1, 0.2, 0.5, 1.0], (height, width), p=[0.9, 0.04, 0.02, 0.02, 0.02]))
    offset = torch.from_numpy(rng.integers(-60, 60, (2, height, width)) / 2)
    return semantic, heatmap.float(), offset.float()


@settings(max_examples=50, deadline=None)
@given(scenes(), st.sampled_from([0, 1, 5]), st.booleans())
def test_the_result_is_a_partition(scene, stuff_area, with_foreground):
    semantic, heatmap, offset = scene
    foreground = heatmap.roll(1, 0) < 0.5 if with_foreground else None
    merged = merging.merge_centres(
        semantic, heatmap, offset, CATEGORIES, kernel=3, stuff_area=stuff_area, foreground=foreground
    )
    assert merged.segments.dtype == np.int32
    assert merged.labels.dtype == np.int64
    assert set(np.unique(merged.segments)) - {0} == set(range(1, len(merged.labels) + 1))
    thing = np.array([CATEGORIES.is_thing[label] for label in merged.labels], bool)
    assert (thing[:-1] >= thing[1:]).all()  # things first
    stuff = merged.labels[~thing]
    assert (np.diff(stuff) > 0).all()
    assert (merged.areas()[~thing] >= stuff_area).all()
    classes = merged.semantic()
    is_thing = np.array([*CATEGORIES.is_thing, False])
    given_class = np.where((semantic >= 0) & (semantic < 4), semantic, -1)
    covered = merged.segments > 0
    assert (is_thing[classes] == is_thing[given_class])[covered].all()
    assert (classes == given_class)[covered & ~is_thing[classes]].all()


def test_the_majority_takes_the_smallest_of_equally_frequent_classes():
    semantic = torch.tensor([[1, 1, 0, 0, 2]])
    heatmap = torch.tensor([[0.0, 0.9, 0.0, 0.0, 0.0]])
    merged = merging.merge_centres(semantic, heatmap, torch.zeros(2, 1, 5), CATEGORIES, stuff_area=1)
    np.testing.assert_array_equal(merged.segments, [[1, 1, 1, 1, 2]])
    np.testing.assert_array_equal(merged.labels, [0, 2])


def test_without_a_centre_things_are_void_and_small_stuff_too():
    semantic = torch.tensor([[0, 2, 2, 3, -1, 7]])
    merged = merging.merge_centres(semantic, torch.zeros(1, 6), torch.zeros(2, 1, 6), CATEGORIES, stuff_area=2)
    np.testing.assert_array_equal(merged.segments, [[0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(merged.labels, [2])


def test_foreground_keeps_instances_inside():
    semantic = torch.tensor([[0, 0, 0, 2, 2]])
    heatmap = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0]])
    foreground = torch.tensor([[True, True, False, True, False]])
    merged = merging.merge_centres(
        semantic, heatmap, torch.zeros(2, 1, 5), CATEGORIES, stuff_area=1, foreground=foreground
    )
    np.testing.assert_array_equal(merged.segments, [[1, 1, 0, 0, 2]])


@pytest.mark.parametrize("rounding", ["truncate", "half_even"])
def test_true_targets_give_the_truth_back(random_segmentation, small_categories, rounding):
    for seed in range(5):
        truth = random_segmentation(np.random.default_rng(seed), 61, 83, small_categories, things=9).compact()
        _, targets = collate([Sample(np.zeros((61, 83, 3), np.uint8), truth, "drawn")])
        made = centre_targets(targets, small_categories, rounding=rounding)
        merged = merging.merge_centres(
            made.semantic[0],
            made.centre[0, 0],
            made.offset[0],
            small_categories,
            kernel=1,
            threshold=0.999,
            stuff_area=0,
        )
        pairs = np.unique(np.stack([truth.segments, merged.segments], -1).reshape(-1, 2), axis=0)
        assert len(pairs) == len(set(pairs[:, 0])) == len(set(pairs[:, 1]))
        np.testing.assert_array_equal(merged.semantic(), truth.semantic())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives():
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(-1, 5, (90, 120), generator=generator)
    heatmap = torch.rand(90, 120, generator=generator)
    offset = 9 * torch.randn(2, 90, 120, generator=generator)
    here = merging.merge_centres(semantic, heatmap, offset, CATEGORIES, stuff_area=1)
    there = merging.merge_centres(semantic.cuda(), heatmap.cuda(), offset.cuda(), CATEGORIES, stuff_area=1)
    np.testing.assert_array_equal(here.segments, there.segments)
    np.testing.assert_array_equal(here.labels, there.labels)
