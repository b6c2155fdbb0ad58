"""AP against pycocotools run as it is usually run, over all images at once, with either library; bad input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pickle
import sys

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from panoptic.metrics.average_precision import LIMIT, average_precision, installed, instance_overlaps
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


def evaluated(truths: list[Segmentation], predictions: list[Instances], categories: Categories, library=None):
    records = [instance_overlaps(t, f, categories) for t, f in zip(truths, predictions, strict=True)]
    return average_precision(records, categories, library)


FASTER = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed (extra `fast`)"
)
LIBRARIES = ["pycocotools", pytest.param("faster-coco-eval", marks=FASTER)]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_pycocotools(
    seed: int, library, small_categories: Categories, random_segmentation, caplog: pytest.LogCaptureFixture
) -> None:
    truths, predictions = drawn(seed, small_categories, random_segmentation)
    precision = evaluated(truths, predictions, small_categories, library)
    stats = official(truths, predictions, small_categories).stats
    assert precision.mean_ap == pytest.approx(100 * stats[0], abs=1e-12)
    assert precision.mean_ap50 == pytest.approx(100 * stats[1], abs=1e-12)
    assert 0 < precision.mean_ap < precision.mean_ap50 < 100
    assert np.isnan(precision.ap[list(small_categories.stuff)]).all()
    assert not caplog.records  # the library that was asked for did it


@FASTER
@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_give_the_same_figures_of_every_class(
    seed: int, small_categories: Categories, random_segmentation
) -> None:
    truths, predictions = drawn(10 + seed, small_categories, random_segmentation, count=20)
    one, other = (
        evaluated(truths, predictions, small_categories, name) for name in ("pycocotools", "faster-coco-eval")
    )
    np.testing.assert_allclose(one.ap, other.ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.ap50, other.ap50, rtol=0, atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_best_of_many_instances_count(library, small_categories: Categories, random_segmentation) -> None:
    """More than `LIMIT` of a class: those of lowest score are left out, as official figures leave them out."""
    rng = np.random.default_rng(5)
    truths, predictions = drawn(5, small_categories, random_segmentation, count=2)
    many = rng.choice(len(predictions[0].masks), 3 * LIMIT)
    scores = rng.random(len(many)).astype(np.float32)
    masks = [predictions[0].masks[k] for k in many]
    predictions[0] = Instances(masks, np.full(len(many), small_categories.things[0]), scores, np.zeros((len(many), 4)))
    precision = evaluated(truths, predictions, small_categories, library)
    assert precision.mean_ap == pytest.approx(100 * official(truths, predictions, small_categories).stats[0], abs=1e-12)
    assert len(instance_overlaps(truths[0], predictions[0], small_categories).scores) == LIMIT


def test_the_faster_library_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert installed() == "faster-coco-eval"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert installed() == "pycocotools"


def test_another_release_of_the_faster_library_loses_nothing(
    small_categories: Categories,
    random_segmentation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    truths, predictions = drawn(2, small_categories, random_segmentation)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # its import fails
    mean = evaluated(truths, predictions, small_categories, "faster-coco-eval").mean_ap
    assert mean == evaluated(truths, predictions, small_categories, "pycocotools").mean_ap
    assert "pycocotools does" in caplog.text


def test_a_record_is_small_and_holds_no_mask(small_categories: Categories, random_segmentation) -> None:
    (truth,), (instances,) = drawn(1, small_categories, random_segmentation, count=1)
    record = instance_overlaps(truth, instances, small_categories)
    large = Segmentation(np.kron(truth.segments, np.ones((8, 8), np.int32)), truth.labels, truth.crowd)
    masks = [rle.encode(np.asfortranarray(np.kron(rle.decode(m), np.ones((8, 8), np.uint8)))) for m in instances.masks]
    larger = instance_overlaps(
        large, Instances(masks, instances.labels, instances.scores, instances.boxes), small_categories
    )
    assert len(pickle.dumps(larger)) == len(pickle.dumps(record)) < 4096
    np.testing.assert_allclose(larger.ious, record.ious)
    assert len(record.ious) == sum(part.ious.size for part in record.by_class()) > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_truth_itself_scores_a_hundred(library, small_categories: Categories, random_segmentation) -> None:
    truths, predictions = drawn(3, small_categories, random_segmentation, noise=0.0)
    precision = evaluated(truths, predictions, small_categories, library)
    assert precision.mean_ap == pytest.approx(100) and precision.mean_ap50 == pytest.approx(100)


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_found_is_zero_and_nothing_to_find_is_nan(library, small_categories: Categories) -> None:
    nothing = Instances([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    segments = np.ones((8, 8), np.int32)
    thing = Segmentation(segments, np.array([small_categories.things[0]]))
    assert evaluated([thing], [nothing], small_categories, library).mean_ap50 == 0
    crowd = Segmentation(segments, np.array([small_categories.things[0]]), np.array([True]))
    for truth in (crowd, Segmentation(segments, np.array([small_categories.stuff[0]]))):
        assert np.isnan(evaluated([truth], [nothing], small_categories, library).mean_ap)


def test_bad_instances_are_refused(small_categories: Categories) -> None:
    truth = Segmentation(np.ones((8, 8), np.int32), np.array([small_categories.stuff[0]]))

    def instance(label: int, score: float = 0.5, side: int = 8) -> Instances:
        mask = rle.encode(np.asfortranarray(np.ones((side, side), np.uint8)))
        return Instances([mask], np.array([label]), np.array([score], np.float32), np.zeros((1, 4), np.float32))

    thing = small_categories.things[0]
    with pytest.raises(ValueError, match="sky is stuff"):
        instance_overlaps(truth, instance(small_categories.stuff[0]), small_categories)
    with pytest.raises(ValueError, match="not finite"):
        instance_overlaps(truth, instance(thing, float("nan")), small_categories)
    with pytest.raises(ValueError, match=r"\(9, 9\) but the truth \(8, 8\)"):
        instance_overlaps(truth, instance(thing, side=9), small_categories)
    with pytest.raises(ValueError, match="no image"):
        average_precision([], small_categories)
