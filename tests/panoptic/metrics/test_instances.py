"""AP against pycocotools run as it is usually run, over all images at once; joining; bad input."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from panoptic.metrics.instances import average_precision, join, match
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


def official(truths: list[Segmentation], found: list[Instances], categories: Categories) -> COCOeval:
    annotations, results = [], []
    for image, (truth, instances) in enumerate(zip(truths, found, strict=True)):
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


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_pycocotools(seed: int, small_categories: Categories, random_segmentation) -> None:
    truths, found = drawn(seed, small_categories, random_segmentation)
    precision = average_precision(
        join([match(t, f, small_categories) for t, f in zip(truths, found, strict=True)]), small_categories
    )
    stats = official(truths, found, small_categories).stats
    assert precision.mean_ap == pytest.approx(100 * stats[0], abs=1e-12)
    assert precision.mean_ap50 == pytest.approx(100 * stats[1], abs=1e-12)
    assert 0 < precision.mean_ap < precision.mean_ap50 < 100
    assert np.isnan(precision.ap[list(small_categories.stuff)]).all()


def test_joining_in_any_grouping_is_joining_at_once(small_categories: Categories, random_segmentation) -> None:
    truths, found = drawn(9, small_categories, random_segmentation)
    parts = [match(t, f, small_categories) for t, f in zip(truths, found, strict=True)]
    whole, grouped = join(parts), join([join(parts[:3]), join(parts[3:])])
    for name in ("labels", "scores", "matched", "ignored", "truths"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(grouped, name))


def test_the_truth_itself_scores_a_hundred(small_categories: Categories, random_segmentation) -> None:
    truths, found = drawn(3, small_categories, random_segmentation, noise=0.0)
    precision = average_precision(
        join([match(t, f, small_categories) for t, f in zip(truths, found, strict=True)]), small_categories
    )
    assert precision.mean_ap == pytest.approx(100) and precision.mean_ap50 == pytest.approx(100)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan(small_categories: Categories) -> None:
    nothing = Instances([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    segments = np.ones((8, 8), np.int32)
    thing = Segmentation(segments, np.array([small_categories.things[0]]))
    assert average_precision(match(thing, nothing, small_categories), small_categories).mean_ap50 == 0
    crowd = Segmentation(segments, np.array([small_categories.things[0]]), np.array([True]))
    for truth in (crowd, Segmentation(segments, np.array([small_categories.stuff[0]]))):
        assert np.isnan(average_precision(match(truth, nothing, small_categories), small_categories).mean_ap)


def test_bad_instances_are_refused(small_categories: Categories) -> None:
    truth = Segmentation(np.ones((8, 8), np.int32), np.array([small_categories.stuff[0]]))

    def found(label: int, score: float = 0.5, side: int = 8) -> Instances:
        mask = rle.encode(np.asfortranarray(np.ones((side, side), np.uint8)))
        return Instances([mask], np.array([label]), np.array([score], np.float32), np.zeros((1, 4), np.float32))

    thing = small_categories.things[0]
    with pytest.raises(ValueError, match="sky is stuff"):
        match(truth, found(small_categories.stuff[0]), small_categories)
    with pytest.raises(ValueError, match="not finite"):
        match(truth, found(thing, float("nan")), small_categories)
    with pytest.raises(ValueError, match=r"\(9, 9\) but the truth \(8, 8\)"):
        match(truth, found(thing, side=9), small_categories)
    with pytest.raises(ValueError, match="no image"):
        join([])
