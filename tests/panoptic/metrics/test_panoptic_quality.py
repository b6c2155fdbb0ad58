"""Panoptic quality: the rules one by one, the official evaluation, published figures, and what must always hold."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from panoptic.metrics import panoptic_quality
from panoptic.metrics.panoptic_quality import QualityCounts, _runs_of_colours, count, count_coco, quality
from panoptic.metrics.semantic import BLOCK
from panoptic.png import MAX_ID, decode_colours, encode_ids, from_coco, to_coco
from panoptic.segmentation import Categories, Segmentation, renumber

CLASSES = 3


def row(*parts: tuple[int, int]) -> np.ndarray:
    """int32 [1, W] from (segment, pixels) parts."""
    return np.concatenate([np.full(n, k, np.int32) for k, n in parts])[None]


def scene(segments: np.ndarray, labels: list[int], crowd: list[bool] | None = None) -> Segmentation:
    return Segmentation(segments, np.array(labels, np.int64), None if crowd is None else np.array(crowd, bool))


def rows_of(counts: QualityCounts) -> list[tuple[float, int, int, int]]:
    return [tuple(values) for values in counts.to_array().tolist()]


def plain_counts(truth: Segmentation, prediction: Segmentation, classes: int) -> np.ndarray:
    """float64 [C, 4] by the rules as the paper words them, one mask per segment: slow, and written on its own."""
    result = np.zeros((classes, 4))
    void, crowd = truth.segments == 0, truth.is_crowd()
    true = {k: truth.segments == k + 1 for k in range(len(truth.labels)) if truth.areas()[k]}
    predicted = {k: prediction.segments == k + 1 for k in range(len(prediction.labels)) if prediction.areas()[k]}
    pairs = {}
    for t in (t for t in true if not crowd[t]):
        for p in (p for p in predicted if prediction.labels[p] == truth.labels[t]):
            iou = np.sum(true[t] & predicted[p]) / np.sum(true[t] | (predicted[p] & ~void))
            if iou > 0.5:
                pairs[t, p] = iou
    for (t, _), iou in pairs.items():
        result[truth.labels[t]] += (iou, 1, 0, 0)
    for p in predicted.keys() - {p for _, p in pairs}:
        ignored = void
        crowds = [t for t in true if crowd[t] and truth.labels[t] == prediction.labels[p]]
        if crowds:
            ignored = ignored | true[crowds[-1]]
        if np.sum(predicted[p] & ignored) / np.sum(predicted[p]) <= 0.5:
            result[prediction.labels[p], 2] += 1
    for t in true.keys() - {t for t, _ in pairs}:
        result[truth.labels[t], 3] += not crowd[t]
    return result


@st.composite
def segmentations(draw: st.DrawFn, size: tuple[int, int], crowds: bool = True) -> Segmentation:
    """Coarse blocks, so that matches happen; with void, and with segments that have no pixel."""
    number = draw(st.integers(0, 6))
    blocks = draw(hnp.arrays(np.int32, (3, 4), elements=st.integers(0, number)))
    segments = np.kron(blocks, np.ones((size[0] // 3, size[1] // 4), np.int32))
    labels = draw(hnp.arrays(np.int64, number, elements=st.integers(0, CLASSES - 1)))
    crowd = draw(hnp.arrays(bool, number)) if crowds else None
    shift = draw(st.integers(0, 2))
    return Segmentation(np.roll(segments, shift, 1), labels, crowd)


IMAGES = st.tuples(segmentations((6, 12)), segmentations((6, 12), crowds=False))


@settings(max_examples=50, deadline=None)
@given(IMAGES)
def test_counts_are_those_of_the_rules_read_mask_by_mask(images: tuple[Segmentation, Segmentation]) -> None:
    np.testing.assert_allclose(count(*images, CLASSES).to_array(), plain_counts(*images, CLASSES), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(images=IMAGES, seed=st.integers(0, 99))
def test_numbering_does_not_matter(images: tuple[Segmentation, Segmentation], seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = images
    if truth.is_crowd().sum() > 1:
        truth = Segmentation(truth.segments, truth.labels)  # of several crowds the last counts, so order may matter

    def shuffled(image: Segmentation) -> Segmentation:
        order = rng.permutation(len(image.labels))
        table = np.concatenate([[0], np.argsort(order) + 1]).astype(np.int32)
        return Segmentation(table[image.segments], image.labels[order], image.is_crowd()[order])

    before = count(truth, prediction, CLASSES).to_array()
    after = count(shuffled(truth), shuffled(prediction), CLASSES).to_array()
    np.testing.assert_allclose(after, before, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(IMAGES, min_size=3, max_size=3))
def test_merging_is_associative_and_zero_is_neutral(images: list[tuple[Segmentation, Segmentation]]) -> None:
    a, b, c = (count(*pair, CLASSES) for pair in images)
    left, right = (a + b) + c, a + (b + c)
    for name in ("tp", "fp", "fn"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    np.testing.assert_allclose(left.iou, right.iou, rtol=1e-12)
    np.testing.assert_array_equal((a + QualityCounts.zeros(CLASSES)).to_array(), a.to_array())


@settings(max_examples=30, deadline=None)
@given(truth=segmentations((6, 12)))
def test_the_truth_itself_is_perfect(truth: Segmentation) -> None:
    counts = count(truth, Segmentation(truth.segments, truth.labels), CLASSES)
    real = (truth.areas() > 0) & ~truth.is_crowd()
    assert counts.tp.sum() == counts.iou.sum() == real.sum()
    assert counts.fn.sum() == 0
    if not truth.is_crowd().any():
        assert counts.fp.sum() == 0


@settings(max_examples=30, deadline=None)
@given(images=IMAGES, data=st.data())
def test_leaving_a_segment_unpredicted_never_earns_a_match(
    images: tuple[Segmentation, Segmentation], data: st.DataObject
) -> None:
    truth, prediction = images
    victim = data.draw(st.integers(0, len(prediction.labels)))
    blanked = np.where(prediction.segments == victim, 0, prediction.segments)
    before, after = count(truth, prediction, CLASSES), count(truth, Segmentation(blanked, prediction.labels), CLASSES)
    assert (after.tp <= before.tp).all()
    assert (after.iou <= before.iou + 1e-12).all()
    assert (after.fn >= before.fn).all()
    nothing = count(truth, Segmentation(np.zeros_like(blanked), np.zeros(0, np.int64)), CLASSES)
    assert nothing.tp.sum() == nothing.fp.sum() == 0
    assert nothing.fn.sum() == ((truth.areas() > 0) & ~truth.is_crowd()).sum()


def test_half_is_no_match() -> None:
    truth = scene(row((1, 4)), [0])
    half = scene(row((1, 2), (0, 2)), [0])
    more = scene(row((1, 3), (0, 1)), [0])
    assert rows_of(count(truth, half, 1)) == [(0, 0, 1, 1)]
    assert rows_of(count(truth, more, 1)) == [(0.75, 1, 0, 0)]


def test_another_class_is_a_miss_and_a_false_positive() -> None:
    truth, prediction = scene(row((1, 4)), [0]), scene(row((1, 4)), [1])
    assert rows_of(count(truth, prediction, 2)) == [(0, 0, 0, 1), (0, 0, 1, 0)]


def test_void_truth_is_left_out_of_the_union() -> None:
    truth, prediction = scene(row((1, 6), (0, 94)), [0]), scene(row((1, 100)), [0])
    assert rows_of(count(truth, prediction, 1)) == [(1, 1, 0, 0)]


def test_void_in_the_prediction_counts_in_the_union() -> None:
    # 40 of 100 pixels found, the rest left void: no match (a known reimplementation answers IoU 1 here)
    truth, prediction = scene(row((1, 100)), [0]), scene(row((1, 40), (0, 60)), [0])
    assert rows_of(count(truth, prediction, 1)) == [(0, 0, 1, 1)]


@pytest.mark.parametrize(("on_void", "false"), [(5, 1), (6, 0)])
def test_a_segment_mostly_on_void_is_forgiven(on_void: int, false: int) -> None:
    truth = scene(row((0, on_void), (1, 10 - on_void + 30)), [1])
    prediction = scene(row((1, 10), (2, 30)), [0, 1])
    assert rows_of(count(truth, prediction, 2))[0] == (0, 0, false, 0)


@pytest.mark.parametrize(("label", "false"), [(0, 0), (1, 1)])
def test_a_crowd_forgives_its_own_class_only(label: int, false: int) -> None:
    truth = scene(row((1, 20), (2, 5)), [0, 2], [True, False])
    prediction = scene(row((1, 9), (2, 9), (0, 2), (3, 5)), [label, label, 2])
    counts = count(truth, prediction, 3)
    assert counts.fp.sum() == 2 * false
    assert counts.fn.tolist() == [0, 0, 0]  # a crowd is never missed
    assert counts.tp.tolist() == [0, 0, 1]  # nor matched


def test_void_and_crowd_forgive_together() -> None:
    truth = scene(row((0, 3), (1, 3), (2, 4)), [0, 1], [True, False])
    prediction = scene(row((1, 10)), [0])
    assert count(truth, prediction, 2).fp.tolist() == [0, 0]


def test_of_several_crowds_of_a_class_the_last_listed_counts() -> None:
    segments, prediction = row((1, 10), (2, 10)), scene(row((1, 10), (0, 10)), [0])
    last_elsewhere = scene(segments, [0, 0], [True, True])
    assert count(last_elsewhere, prediction, 1).fp.tolist() == [1]
    last_here = scene(row((2, 10), (1, 10)), [0, 0], [True, True])
    assert count(last_here, prediction, 1).fp.tolist() == [0]


def test_segments_without_a_pixel_do_not_exist() -> None:
    truth, prediction = scene(row((2, 4)), [0, 1, 0], [True, False, False]), scene(row((3, 4)), [0, 0, 1])
    assert rows_of(count(truth, prediction, 2)) == [(0, 0, 0, 0), (1, 1, 0, 0)]


def test_images_without_segments_count_nothing() -> None:
    empty = scene(row((0, 5)), [])
    assert rows_of(count(empty, empty, 2)) == [(0, 0, 0, 0)] * 2


def test_bad_input_is_refused_with_a_reason(small_categories: Categories) -> None:
    truth = scene(row((1, 4)), [0])
    with pytest.raises(ValueError, match=r"\(1, 4\) but the prediction is \(1, 5\)"):
        count(truth, scene(row((1, 5)), [0]), 1)
    with pytest.raises(ValueError, match="prediction: segments run from 2 to 2 but 1 are listed"):
        count(truth, scene(row((2, 4)), [0]), 1)
    with pytest.raises(ValueError, match="prediction: labels run from 7 to 7, expected 0 to 1"):
        count(truth, scene(row((1, 4)), [7]), 2)
    with pytest.raises(ValueError, match="counts of 2 classes do not fit a dataset of 5"):
        quality(QualityCounts.zeros(2), small_categories)


def test_dense_and_sparse_forms_come_back() -> None:
    counts = QualityCounts(
        np.array([0.1, 0, 2.3]), np.array([1, 0, 3]), np.array([0, 0, 2**40 + 1]), np.array([4, 0, 0])
    )
    for back in (
        QualityCounts.from_array(counts.to_array()),
        QualityCounts.from_nonzero(*counts.nonzero(), size=3),
    ):
        np.testing.assert_array_equal(back.to_array(), counts.to_array())
        assert back.tp.dtype == np.int64
    classes, values = counts.nonzero()
    assert classes.tolist() == [0, 2]
    twice = QualityCounts.from_nonzero(np.tile(classes, 2), np.tile(values, (2, 1)), 3)
    np.testing.assert_array_equal(twice.to_array(), (counts + counts).to_array())
    empty = QualityCounts.from_nonzero(*QualityCounts.zeros(3).nonzero(), size=3)
    assert not empty.to_array().any()


def test_averages_are_over_classes_that_occur(small_categories: Categories) -> None:
    counts = QualityCounts(
        np.array([1.2, 0.8, 0, 0, 0]), np.array([1, 1, 0, 0, 0]), np.array([1, 2, 0, 0, 0]), np.array([1, 0, 3, 0, 0])
    )
    result = quality(counts, small_categories)
    np.testing.assert_allclose(result.pq, [60, 40, 0, np.nan, np.nan])
    np.testing.assert_allclose(result.sq, [120, 80, 0, np.nan, np.nan])
    np.testing.assert_allclose(result.rq, [50, 50, 0, np.nan, np.nan])
    assert (result.all.classes, result.things.classes, result.stuff.classes) == (3, 2, 1)
    assert result.things.pq == pytest.approx(30)
    assert result.all.rq == pytest.approx(100 / 3)


@pytest.mark.parametrize("thing", [True, False])
def test_datasets_of_only_things_or_only_stuff(thing: bool) -> None:
    categories = Categories(("a", "b"), (thing, thing), (1, 2), ((0, 0, 0), (1, 1, 1)))
    truth = scene(row((1, 4), (2, 4)), [0, 1])
    result = quality(count(truth, truth, categories), categories)
    present, absent = (result.things, result.stuff) if thing else (result.stuff, result.things)
    assert present == result.all
    assert (present.pq, present.sq, present.rq, present.classes) == (100, 100, 100, 2)
    assert absent.classes == 0
    assert np.isnan([absent.pq, absent.sq, absent.rq]).all()


def test_nothing_at_all_is_nan(small_categories: Categories) -> None:
    result = quality(QualityCounts.zeros(5), small_categories)
    assert result.all.classes == 0
    assert np.isnan([result.all.pq, *result.pq, *result.sq, *result.rq]).all()


def test_files_are_counted_without_renumbered_maps(
    small_categories: Categories, random_segmentation: Callable[..., Segmentation]
) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        truth = random_segmentation(rng, 24, 30, small_categories, crowd=True)
        prediction = Segmentation(np.roll(truth.segments, 1, 0), truth.labels)
        files = [to_coco(s, small_categories, 1, "a.png") for s in (truth, prediction)]
        direct = count_coco(*files, small_categories, "a.png")
        np.testing.assert_array_equal(direct.to_array(), count(truth, prediction, small_categories).to_array())


@pytest.mark.parametrize("alpha", [False, True])
def test_files_of_several_blocks_are_counted_as_their_maps(small_categories: Categories, alpha: bool) -> None:
    """A run that goes on from block to block is one, and an alpha channel is no part of an id."""
    rng = np.random.default_rng(3)
    size = 1 + BLOCK // 256, 523
    segments = np.kron(rng.integers(0, 5, (3, 4)), np.ones((90, 140), np.int32))[: size[0], : size[1]].astype(np.int32)
    labels = np.array([0, 1, 3, 4])
    truth, prediction = (Segmentation(np.ascontiguousarray(np.roll(segments, by, 1)), labels) for by in (0, 9))
    files = []
    for segmentation in (truth, prediction):
        png, record = to_coco(segmentation, small_categories, 1, "a.png")
        if alpha:
            bgr = decode_colours(png)[..., ::-1]
            bgra = np.concatenate([bgr, rng.integers(0, 256, (*size, 1), np.uint8)], 2)
            png = cv2.imencode(".png", bgra)[1].tobytes()
        files.append((png, record))
    assert segments.size > 2 * BLOCK
    direct = count_coco(files[0], files[1], small_categories, "a.png")
    np.testing.assert_array_equal(direct.to_array(), count(truth, prediction, small_categories).to_array())


def test_pairs_of_colours_are_never_maps_of_integers() -> None:
    """Fresh memory for every image would cost as much as the decoding where the system takes it back in between."""
    colours = np.zeros((1200, 1600, 3), np.uint8)
    tracemalloc.start()
    try:
        _, _, lengths = _runs_of_colours(colours, colours)
        assert lengths.tolist() == [1200 * 1600]
        assert tracemalloc.get_traced_memory()[1] < 4 * lengths[0] / 2
    finally:
        tracemalloc.stop()


def test_files_that_do_not_fit_are_refused(small_categories: Categories) -> None:
    sky = {"segments_info": [{"id": 70000, "category_id": 7}]}
    file = encode_ids(np.full((2, 3), 70000)), sky
    with pytest.raises(ValueError, match=r"^a\.png: the PNG holds segments .*not list: \[9\]"):
        count_coco(file, (encode_ids(np.full((2, 3), 9)), sky), small_categories, "a.png")
    with pytest.raises(ValueError, match=r"^a\.png: the truth is \(2, 3\) but the prediction is \(3, 2\)"):
        count_coco(file, (encode_ids(np.full((3, 2), 70000)), sky), small_categories, "a.png")
    with pytest.raises(ValueError, match=r"^a\.png: category 8 is not among"):
        count_coco(file, (file[0], {"segments_info": [{"id": 70000, "category_id": 8}]}), small_categories, "a.png")
    with pytest.raises(ValueError, match=r"^a\.png: not a PNG"):
        count_coco(file, (b"", sky), small_categories, "a.png")


@pytest.mark.parametrize("name", ["deeplab2_team", "deeplab2_bird_cat_team", "bdd100k_pan_seg"])
def test_published_predictions_score_what_the_official_evaluation_says(
    name: str, shared: Callable[[str], Path]
) -> None:
    root = shared("data/pq_reference")
    expected = json.loads((root / "expected.json").read_text())[name]
    truth, prediction = (json.loads((root / expected[key]).read_text()) for key in ("gt_json", "pred_json"))
    categories = Categories.from_coco(truth["categories"])
    predicted = {record["image_id"]: record for record in prediction["annotations"]}
    total, direct = QualityCounts.zeros(len(categories)), QualityCounts.zeros(len(categories))
    for record in truth["annotations"]:
        other = predicted[record["image_id"]]
        files = (
            ((root / expected["gt_dir"] / record["file_name"]).read_bytes(), record),
            ((root / expected["pred_dir"] / other["file_name"]).read_bytes(), other),
        )
        total += count(*(from_coco(*file, categories, name) for file in files), categories)
        direct += count_coco(*files, categories, name)
    np.testing.assert_array_equal(direct.to_array(), total.to_array())
    result = quality(total, categories)
    for group, key in ((result.all, "All"), (result.things, "Things"), (result.stuff, "Stuff")):
        reference = expected["result"][key]
        assert group.classes == reference["n"]
        if reference["n"]:
            for field in ("pq", "sq", "rq"):
                assert getattr(group, field) == pytest.approx(reference[field], abs=1e-9)
    for dataset_id, reference in expected["result"]["per_class"].items():
        c = categories.ids.index(int(dataset_id))
        assert (total.tp[c], total.fp[c], total.fn[c]) == (reference["tp"], reference["fp"], reference["fn"])
        assert total.iou[c] == pytest.approx(reference["iou_sum"], abs=1e-9)
        assert result.pq[c] == pytest.approx(reference["pq"], abs=1e-9)
        assert result.sq[c] == pytest.approx(reference["sq"], abs=1e-9)


def test_reference_maps_with_crowd_and_void(fixture_arrays: Callable[[str], tuple[dict, dict]]) -> None:
    arrays, meta = fixture_arrays("pq_metric")
    categories = Categories.from_coco(list(meta["categories"].values()))

    def read(id_map: np.ndarray, infos: list[dict]) -> Segmentation:
        segments, unlisted, _ = renumber(id_map, [info["id"] for info in infos])
        assert not unlisted.size
        labels = np.array([categories.ids.index(info["category_id"]) for info in infos], np.int64)
        return Segmentation(segments, labels, np.array([info.get("iscrowd", 0) == 1 for info in infos]))

    images = [
        (read(arrays[f"gt{i}"], image["gt"]), read(arrays[f"pred{i}"], image["pred"]))
        for i, image in enumerate(meta["images"])
    ]
    total = reduce(add, (count(*pair, categories) for pair in images))
    result = quality(total, categories)
    for key, (tp, fp, fn, iou) in meta["raw_tp_fp_fn_iou"].items():
        c = categories.ids.index(int(key))
        assert (total.tp[c], total.fp[c], total.fn[c]) == (tp, fp, fn)
        assert total.iou[c] == pytest.approx(iou, abs=1e-9)
        if tp + fp + fn:
            for field in ("pq", "sq", "rq"):
                expected = 100 * meta["per_class"][key][field]
                assert getattr(result, field)[c] == pytest.approx(expected, abs=1e-9)
    for group, key in ((result.all, "All"), (result.things, "Things"), (result.stuff, "Stuff")):
        expected = meta["results"][key]
        assert group.classes == expected["n"]
        for field in ("pq", "sq", "rq"):
            assert getattr(group, field) == pytest.approx(100 * expected[field], abs=1e-9)


def test_official_evaluation_agrees_to_the_last_bit(
    tmp_path: Path, small_categories: Categories, random_segmentation: Callable[..., Segmentation]
) -> None:
    official = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    infos = {entry["id"]: entry for entry in small_categories.to_coco()}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = random_segmentation(rng, 60, 80, small_categories, things=9, crowd=True)
        crowd = truth.is_crowd() | (rng.random(len(truth.labels)) < 0.3)
        truth = Segmentation(truth.segments, truth.labels, crowd & np.isin(truth.labels, small_categories.things))
        labels = np.where(rng.random(len(truth.labels)) < 0.2, rng.integers(0, 5, len(truth.labels)), truth.labels)
        moved = np.roll(truth.segments, rng.integers(0, 6, 2), (0, 1))
        prediction = Segmentation(np.where(moved == 1, 0, moved).astype(np.int32), labels).compact()
        pair = []
        for folder, image in (("truth", truth), ("prediction", prediction)):
            png, record = to_coco(image, small_categories, seed, f"{folder}{seed}.png")
            (tmp_path / record["file_name"]).write_bytes(png)
            pair.append(record)
        theirs = official.pq_compute_single_core(0, [tuple(pair)], str(tmp_path), str(tmp_path), infos)
        ours = count(truth, prediction, small_categories)
        for c, dataset_id in enumerate(small_categories.ids):
            stat = theirs[dataset_id]
            assert (ours.iou[c], ours.tp[c], ours.fp[c], ours.fn[c]) == (stat.iou, stat.tp, stat.fp, stat.fn)


@pytest.mark.parametrize("count", [0, 1, 2, 22, 88, 91, 500])
def test_ids_are_found_whatever_they_are(count: int) -> None:
    """By a table up to 90 ids, by a search beyond; void is place 0."""
    rng = np.random.default_rng(count)
    for _ in range(20):
        listed = (1 + rng.choice(MAX_ID, count, replace=False)).tolist()
        values = rng.choice(np.array([0, *listed]), 200).astype(np.int32)
        places = panoptic_quality._indices(values, listed, "x.png")
        assert np.array_equal(np.array([0, *listed])[places], values)
        other = int(rng.integers(1, MAX_ID))
        if other not in listed:
            values[7] = other
            with pytest.raises(ValueError, match=rf"x\.png: the PNG holds segments .* not list: \[{other}\]"):
                panoptic_quality._indices(values, listed, "x.png")


def test_an_id_that_is_listed_twice_means_the_first_of_its_entries() -> None:
    assert panoptic_quality._indices(np.array([9, 5, 0], np.int32), [5, 9, 9], "x").tolist() == [2, 1, 0]
