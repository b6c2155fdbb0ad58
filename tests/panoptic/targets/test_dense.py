"""Dense targets: parity with both published generators, and what must hold for any map."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic.segmentation import IGNORE, Categories, Sample, Segmentation, Targets, collate, renumber
from panoptic.targets import dense

FIXTURES = ("pdl_a_targets", "pdl_b_targets")


def categories_of(things: list[int], stuff: list[int]) -> Categories:
    count = max(things + stuff) + 1
    is_thing = tuple(i in things for i in range(count))
    return Categories(tuple(map(str, range(count))), is_thing, tuple(range(count)), ((0, 0, 0),) * count)


def batch(*maps: Segmentation, divisor: int = 1) -> Targets:
    samples = [Sample(np.zeros((*m.size, 3), np.uint8), m, str(i)) for i, m in enumerate(maps)]
    return collate(samples, divisor)[1]


def load(path):
    stored = np.load(path)
    return stored, json.loads(stored["__meta__"].tobytes())


def options(case: dict, name: str) -> dict:
    return dict(
        sigma=case["sigma"],
        rounding="truncate" if name == "pdl_a_targets" else "half_even",
        small_area=case["area"],
        small_weight=case["wt"],
        ignore_crowd=case["icrowd"],
        stuff_offsets=not case["ign"],
    )


def truth_of(ids: np.ndarray, segments: list[dict]) -> Segmentation:
    order, unlisted, _ = renumber(ids, [s["id"] for s in segments])
    assert not len(unlisted)
    return Segmentation(
        order,
        np.array([s["category_id"] for s in segments], np.int64),
        np.array([s["iscrowd"] for s in segments], bool),
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_the_published_generators(shared, name):
    arrays, meta = load(shared(f"fixtures/pixels/{name}.npz"))
    seen = {"__meta__"}
    for entry in meta["cases"]:
        case = entry["case"]

        def stored(*names, prefix=case["name"]):
            key = next(f"{prefix}/{n}" for n in names if f"{prefix}/{n}" in arrays)
            seen.add(key)
            return torch.from_numpy(arrays[key])

        truth = truth_of(stored("panoptic_ids").numpy(), entry["segments"])
        categories = categories_of(case["things"], case["stuff"])
        # twice in one batch, padded: neither the neighbour nor the padding may matter
        targets = batch(truth, truth, divisor=50)
        made = dense.centre_targets(targets, categories, **options(case, name))
        h, w = truth.size
        for b in range(2):
            semantic = made.semantic[b, :h, :w]
            torch.testing.assert_close(
                semantic.where(semantic != IGNORE, 255), stored("semantic", "sem_seg").long(), rtol=0, atol=0
            )
            for ours, theirs in (
                (made.semantic_weights[b], stored("semantic_weights", "sem_seg_weights")),
                (made.centre_weights[b, 0], stored("center_weights").reshape(h, w)),
                (made.offset_weights[b, 0], stored("offset_weights").reshape(h, w)),
            ):
                torch.testing.assert_close(ours[:h, :w], theirs, rtol=0, atol=0)
            torch.testing.assert_close(made.centre[b, 0, :h, :w], stored("center").view(h, w), rtol=0, atol=1e-6)
            torch.testing.assert_close(made.offset[b, :, :h, :w], stored("offset"), rtol=0, atol=0)
            if name == "pdl_a_targets":
                assert torch.equal(made.foreground[b, :h, :w], stored("foreground").bool())
            rows, columns, areas = dense.centres(targets, categories)
            points = torch.stack([rows[b], columns[b]], 1)[areas[b] > 0]
            points = points[~points[:, 0].isnan()]
            torch.testing.assert_close(points, stored("center_points"), rtol=0, atol=1e-12)
        outside = ~targets.frame.valid()
        assert outside.any()
        for plane in (made.centre, made.centre_weights, made.offset, made.offset_weights):
            assert not plane.movedim(1, -1)[outside].any()
    assert seen == set(arrays.files)


CATEGORIES = categories_of([0, 1], [2, 3])


@st.composite
def maps(draw) -> Segmentation:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    count = draw(st.integers(0, 6))
    pixels = draw(st.lists(st.integers(0, count), min_size=height * width, max_size=height * width))
    labels = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    crowd = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return Segmentation(
        np.array(pixels, np.int32).reshape(height, width), np.array(labels, np.int64), np.array(crowd, bool)
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(maps(), min_size=1, max_size=3), st.sampled_from(["truncate", "half_even"]))
def test_equals_a_loop_over_segments(truths, rounding):
    targets = batch(*truths, divisor=4)
    made = dense.centre_targets(targets, CATEGORIES, sigma=1, rounding=rounding, small_area=3)
    for b, truth in enumerate(truths):
        h, w = truth.size
        centre, offset = np.zeros((h, w)), np.zeros((2, h, w))
        weights = np.ones((3, h, w)) * np.array([1, 0, 0])[:, None, None]
        for k, (label, crowd) in enumerate(zip(truth.labels, truth.is_crowd(), strict=True), 1):
            rows, columns = np.nonzero(truth.segments == k)
            thing = CATEGORIES.is_thing[label]
            weights[1, rows, columns] = not crowd
            weights[2, rows, columns] = thing and not crowd
            if not thing or not len(rows):
                continue
            weights[0, rows, columns] = 3 if len(rows) < 3 else 1
            y, x = rows.mean(), columns.mean()
            offset[:, rows, columns] = y - rows, x - columns
            y, x = (int(y), int(x)) if rounding == "truncate" else (round(y), round(x))
            grid = np.mgrid[0:h, 0:w] - np.array([y, x])[:, None, None]
            bump = np.exp(-(grid**2).sum(0) / 2) * (abs(grid) <= 4).all(0)
            centre = np.maximum(centre, bump)
        np.testing.assert_array_equal(made.semantic[b, :h, :w], truth.semantic())
        np.testing.assert_array_equal(made.semantic_weights[b, :h, :w], weights[0])
        np.testing.assert_array_equal(made.centre_weights[b, 0, :h, :w], weights[1])
        np.testing.assert_array_equal(made.offset_weights[b, 0, :h, :w], weights[2])
        np.testing.assert_allclose(made.centre[b, 0, :h, :w], centre, atol=1e-6)
        np.testing.assert_array_equal(made.offset[b, :, :h, :w], offset.astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(st.lists(maps(), min_size=1, max_size=3))
def test_runs_and_histograms_sum_the_same(truths):
    targets = batch(*truths, divisor=3)
    by_histogram = dense._sums_by_histogram(targets)  # the GPU's way, which needs no GPU
    assert torch.equal(dense._sums_by_runs(targets)[:, :, 1:], by_histogram[:, :, 1:])
    present = by_histogram[0].sum(1)
    assert (present == targets.segments[0].numel()).all()


def test_no_segment_at_all_gives_targets_without_weight():
    empty = Segmentation(np.zeros((5, 7), np.int32), np.zeros(0, np.int64))
    made = dense.centre_targets(batch(empty), CATEGORIES)
    assert (made.semantic == IGNORE).all()
    for plane in (made.foreground, made.centre, made.centre_weights, made.offset, made.offset_weights):
        assert not plane.any()
    assert (made.semantic_weights == 1).all()


def test_hundreds_of_one_pixel_things_peak_on_themselves():
    count = 40 * 20
    truth = Segmentation(np.arange(1, count + 1, dtype=np.int32).reshape(40, 20), np.zeros(count, np.int64))
    made = dense.centre_targets(batch(truth), CATEGORIES)
    assert (made.centre == 1).all()
    assert not made.offset.any()
    assert (made.semantic_weights == 3).all()


def test_a_centroid_outside_of_its_thing_keeps_its_fraction():
    segments = np.zeros((3, 4), np.int32)
    segments[0, 0] = segments[2, 3] = segments[2, 2] = 1
    made = dense.centre_targets(batch(Segmentation(segments, np.array([0]))), CATEGORIES, sigma=1)
    assert made.centre[0, 0, 1, 1] == 1  # centroid (4/3, 5/3), truncated
    torch.testing.assert_close(made.offset[0, :, 0, 0], torch.tensor([4 / 3, 5 / 3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_what_the_cpu_gives():
    rng = np.random.default_rng(0)
    truth = Segmentation(rng.integers(0, 7, (33, 47), np.int32), rng.integers(0, 4, 6), rng.random(6) < 0.3)
    targets = batch(truth, truth, divisor=16)
    here = dense.centre_targets(targets, CATEGORIES)
    there = dense.centre_targets(targets.to("cuda"), CATEGORIES)
    for name, value in vars(here).items():
        torch.testing.assert_close(vars(there)[name].cpu(), value, rtol=0, atol=1e-6)
