"""AP against pycocotools run as it is usually run, over all images at once; memory; bad input."""

from __future__ import annotations

import contextlib
import io
import pickle
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from panoptic.metrics.average_precision import (
    LIMIT,
    InstanceMatches,
    PrecisionCounts,
    average_precision,
    match_instances,
)
from panoptic.segmentation import Categories, Instances, Segmentation


def as_instances(truth: Segmentation, categories: Categories, rng: np.random.Generator, noise: float) -> Instances:
    """The things of a map, shifted by a few pixels and sometimes of another class, scored at random."""
    masks, labels, scores = [], [], []
    for k, label in enumerate(truth.labels):
        for _ in range(1 + (rng.random() < noise)):
            if not categories.is_thing[label] or rng.random() < noise / 2:
                continue
            moved = np.roll(truth.segments == k + 1, rng.integers(-3, 4) if rng.random() < noise else 0, 1)
            masks.append(rle.encode(np.asfortranarray(moved.astype(np.uint8))))
            labels.append(int(rng.choice(categories.things)) if rng.random() < noise / 3 else int(label))
            scores.append(round(rng.random(), 1))  # with ties
    boxes = np.zeros((len(masks), 4), np.float32)
    return Instances(masks, np.array(labels, np.int64), np.array(scores, np.float32), boxes)


def official(truths: list[Segmentation], predictions: list[Instances], categories: Categories) -> COCOeval:
    annotations, results = [], []
    for image, (truth, instances) in enumerate(zip(truths, predictions, strict=True)):
        for k, label in enumerate(truth.labels):
            mask = rle.encode(np.asfortranarray((truth.segments == k + 1).astype(np.uint8)))
            if categories.is_thing[label]:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": int(label),
                        "segmentation": mask,
                        "area": int(rle.area(mask)),
                        "iscrowd": int(truth.is_crowd()[k]),
                    }
                )
        for mask, label, score in zip(instances.masks, instances.labels, instances.scores, strict=True):
            results.append({"image_id": image, "category_id": int(label), "segmentation": mask, "score": float(score)})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": t.size[0], "width": t.size[1]} for i, t in enumerate(truths)],
        "annotations": annotations,
        "categories": [{"id": i} for i in categories.things],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def drawn(seed: int, categories: Categories, random_segmentation, count: int = 8, noise: float = 0.6):
    rng = np.random.default_rng(seed)
    truths = [random_segmentation(rng, 40, 60, categories, things=6, crowd=k % 2 == 0) for k in range(count)]
    return truths, [as_instances(truth, categories, rng, noise) for truth in truths]


def evaluated(truths: list[Segmentation], predictions: list[Instances], categories: Categories):
    return average_precision(
        [match_instances(t, f, categories) for t, f in zip(truths, predictions, strict=True)], categories
    )


@pytest.mark.parametrize(
    ("seed", "images", "noise"), [(0, 8, 0.6), (1, 8, 0.6), (2, 20, 0.9), (3, 20, 0.2), (4, 1, 0.6)]
)
def test_the_figures_are_pycocotools(
    seed: int, images: int, noise: float, small_categories: Categories, random_segmentation
) -> None:
    truths, predictions = drawn(seed, small_categories, random_segmentation, images, noise)
    precision = evaluated(truths, predictions, small_categories)
    judge = official(truths, predictions, small_categories)
    assert precision.mean_ap == pytest.approx(100 * judge.stats[0], abs=1e-12)
    assert precision.mean_ap50 == pytest.approx(100 * judge.stats[1], abs=1e-12)
    assert 0 < precision.mean_ap < precision.mean_ap50 <= 100
    assert np.isnan(precision.ap[list(small_categories.stuff)]).all()
    for k, label in enumerate(small_categories.things):
        curves = judge.eval["precision"][:, :, k, 0, -1]  # [T, R], -1 where there is no truth
        expected = np.where(curves > -1, 100 * curves, np.nan)
        np.testing.assert_allclose(precision.ap[label], expected.mean(), rtol=0, atol=1e-11)
        np.testing.assert_allclose(precision.ap50[label], expected[0].mean(), rtol=0, atol=1e-11)


def test_the_same_instance_twice_and_equal_overlaps_are_matched_as_pycocotools_matches(
    small_categories: Categories,
) -> None:
    """Two truths that an instance covers alike, and instances that compete for one: ties go as they go there."""
    label = small_categories.things[0]
    segments = np.zeros((12, 24), np.int32)
    segments[2:8, 2:8], segments[2:8, 8:14] = 1, 2
    segments[2:8, 14:20] = 3
    truth = Segmentation(segments, np.array([label] * 3), np.array([False, False, True]))

    def instance(columns: slice) -> dict:
        mask = np.zeros((12, 24), np.uint8)
        mask[2:8, columns] = 1
        return rle.encode(np.asfortranarray(mask))

    spans = [slice(5, 11), slice(2, 8), slice(2, 14), slice(8, 14), slice(8, 14), slice(13, 20), slice(14, 20)]
    scores = np.array([0.9, 0.9, 0.8, 0.8, 0.7, 0.6, 0.5], np.float32)
    found = Instances([instance(s) for s in spans], np.array([label] * 7), scores, np.zeros((7, 4), np.float32))
    for order in (slice(None), slice(None, None, -1)):
        part = Instances(found.masks[order], found.labels[order], found.scores[order], found.boxes[order])
        precision, judge = (f([truth], [part], small_categories) for f in (evaluated, official))
        assert precision.mean_ap == pytest.approx(100 * judge.stats[0], abs=1e-12) and precision.mean_ap > 0


def test_the_best_of_many_instances_count(small_categories: Categories, random_segmentation) -> None:
    """More than `LIMIT` of a class: those of lowest score are left out, as official figures leave them out."""
    rng = np.random.default_rng(5)
    truths, predictions = drawn(5, small_categories, random_segmentation, count=2)
    many = rng.choice(len(predictions[0].masks), 3 * LIMIT)
    scores = rng.random(len(many)).astype(np.float32)
    masks = [predictions[0].masks[k] for k in many]
    predictions[0] = Instances(masks, np.full(len(many), small_categories.things[0]), scores, np.zeros((len(many), 4)))
    precision = evaluated(truths, predictions, small_categories)
    assert precision.mean_ap == pytest.approx(100 * official(truths, predictions, small_categories).stats[0], abs=1e-12)
    assert len(match_instances(truths[0], predictions[0], small_categories).scores) == LIMIT


def test_a_record_is_small_and_holds_no_mask(small_categories: Categories, random_segmentation) -> None:
    (truth,), (instances,) = drawn(1, small_categories, random_segmentation, count=1)
    record = match_instances(truth, instances, small_categories)
    large = Segmentation(np.kron(truth.segments, np.ones((8, 8), np.int32)), truth.labels, truth.crowd)
    masks = [rle.encode(np.asfortranarray(np.kron(rle.decode(m), np.ones((8, 8), np.uint8)))) for m in instances.masks]
    larger = match_instances(
        large, Instances(masks, instances.labels, instances.scores, instances.boxes), small_categories
    )
    assert len(pickle.dumps(larger)) == len(pickle.dumps(record)) < 4096
    for one, other in zip(vars(larger).values(), vars(record).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert record.taken.any() and len(record.taken) == len(instances.masks)


def test_many_images_take_a_few_bytes_an_instance(small_categories: Categories) -> None:
    """An evaluation of a million images must not keep an object for each instance."""
    rng, label, per_image = np.random.default_rng(0), small_categories.things[0], 20
    labels, truths = np.full(per_image, label), np.full(5, label)
    tracemalloc.start()
    counts = PrecisionCounts(len(small_categories))
    for _ in range(5000):
        bits = rng.integers(0, 1024, per_image).astype(np.uint16)
        counts.add(InstanceMatches(labels, np.sort(rng.random(per_image))[::-1], bits, 0 * bits, truths))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert counts.precision(small_categories).mean_ap > 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    instances = 5000 * per_image
    assert kept < 20 * instances and peak < 100 * instances


def test_the_truth_itself_scores_a_hundred(small_categories: Categories, random_segmentation) -> None:
    truths, predictions = drawn(3, small_categories, random_segmentation, noise=0.0)
    precision = evaluated(truths, predictions, small_categories)
    assert precision.mean_ap == pytest.approx(100) and precision.mean_ap50 == pytest.approx(100)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan(small_categories: Categories) -> None:
    nothing = Instances([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    segments = np.ones((8, 8), np.int32)
    thing = Segmentation(segments, np.array([small_categories.things[0]]))
    assert evaluated([thing], [nothing], small_categories).mean_ap50 == 0
    crowd = Segmentation(segments, np.array([small_categories.things[0]]), np.array([True]))
    for truth in (crowd, Segmentation(segments, np.array([small_categories.stuff[0]]))):
        assert np.isnan(evaluated([truth], [nothing], small_categories).mean_ap)


def test_bad_instances_are_refused(small_categories: Categories) -> None:
    truth = Segmentation(np.ones((8, 8), np.int32), np.array([small_categories.stuff[0]]))

    def instance(label: int, score: float = 0.5, side: int = 8) -> Instances:
        mask = rle.encode(np.asfortranarray(np.ones((side, side), np.uint8)))
        return Instances([mask], np.array([label]), np.array([score], np.float32), np.zeros((1, 4), np.float32))

    thing = small_categories.things[0]
    with pytest.raises(ValueError, match="sky is stuff"):
        match_instances(truth, instance(small_categories.stuff[0]), small_categories)
    with pytest.raises(ValueError, match="not finite"):
        match_instances(truth, instance(thing, float("nan")), small_categories)
    with pytest.raises(ValueError, match=r"\(9, 9\) but the truth \(8, 8\)"):
        match_instances(truth, instance(thing, side=9), small_categories)
    with pytest.raises(ValueError, match="no image"):
        average_precision([], small_categories)
