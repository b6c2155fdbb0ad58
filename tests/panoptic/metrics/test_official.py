"""The official implementations on the same random maps: counts to the last bit where they are installed, else recorded.

`boundary_iou` is the Boundary IoU paper's boundary_iou_api, which needs panopticapi; `cityscapesscripts` the Cityscapes
package. None of them need be installed: folders that hold them, and pyquaternion, in PYTHONPATH do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from panoptic.metrics.boundary import boundary_overlaps
from panoptic.metrics.panoptic_quality import QualityCounts, count, overlaps, pair
from panoptic.metrics.semantic import confusion, mean_iou
from panoptic.png import encode_ids, to_coco
from panoptic.segmentation import Categories, Segmentation

Draw = Callable[..., Segmentation]

RECORDED = {
    0: [
        [9.286737952840104, 13, 14, 13],
        [5.145355863712822, 7, 3, 5],
        [6.735923903145246, 10, 12, 13],
        [3.4296523367238736, 5, 1, 7],
        [8.344014976397718, 11, 16, 17],
    ],
    0.02: [
        [3.0650592365075906, 5, 22, 21],
        [1.798733503618561, 3, 7, 9],
        [1.9926798322990562, 3, 19, 20],
        [0.541371158392435, 1, 5, 11],
        [4.7076473171790045, 7, 20, 21],
    ],
    0.06: [
        [8.590151468399068, 13, 14, 13],
        [4.155740112413478, 6, 4, 6],
        [4.883432443421047, 7, 15, 16],
        [2.0278213745013787, 3, 3, 9],
        [7.904659208331451, 11, 16, 17],
    ],
}
"""What they said of all 12 pairs of maps together: summed IoU, matches, false positives and misses of each class. Keys
are the dilation of boundary_iou (a share of the diagonal), and 0 for cityscapesscripts, which has no boundaries."""


def moved_pairs(draw: Draw, categories: Categories, count: int, size: tuple[int, int]) -> list[tuple]:
    """Truths with crowds and void, and predictions that are moved, relabelled and lack a segment."""
    pairs = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        truth = draw(rng, *size, categories, things=7, crowd=True)
        labels = np.where(rng.random(len(truth.labels)) < 0.2, rng.integers(0, 5, len(truth.labels)), truth.labels)
        shifted = np.roll(truth.segments, rng.integers(0, 5, 2), (0, 1))
        pairs.append((truth, Segmentation(np.where(shifted == 1, 0, shifted).astype(np.int32), labels).compact()))
    return pairs


def write_pair(folder: Path, k: int, images: tuple[Segmentation, Segmentation], categories: Categories) -> tuple:
    """Both as PNGs; their records, whose ids are far above any category's."""
    records = []
    for kind, image in zip(("truth", "prediction"), images, strict=True):
        _, record = to_coco(image, categories, k, f"{kind}{k}.png")
        for info in record["segments_info"]:
            info["id"] += 5000
        ids = image.compact().segments
        (folder / record["file_name"]).write_bytes(encode_ids(np.where(ids > 0, ids + 5000, 0)))
        records.append(record)
    return tuple(records)


def assert_same(ours: QualityCounts, theirs: object, categories: Categories) -> None:
    for c, dataset_id in enumerate(categories.ids):
        stat = theirs[dataset_id]  # type: ignore[index]
        assert (ours.iou[c], ours.tp[c], ours.fp[c], ours.fn[c]) == (stat.iou, stat.tp, stat.fp, stat.fn)


def counted(truth: Segmentation, prediction: Segmentation, categories: Categories, dilation: float) -> QualityCounts:
    """Of boundaries where there is a dilation."""
    if not dilation:
        return count(truth, prediction, categories)
    inner = boundary_overlaps(truth, prediction, dilation)
    pairs = pair(overlaps(truth, prediction), truth.labels, truth.is_crowd(), prediction.labels, inner)
    return pairs.counts(truth.labels, prediction.labels, len(categories))


@pytest.mark.parametrize("dilation", RECORDED)
def test_quality_as_recorded(small_categories: Categories, random_segmentation: Draw, dilation: float) -> None:
    total = QualityCounts.zeros(len(small_categories))
    for truth, prediction in moved_pairs(random_segmentation, small_categories, 12, (50, 70)):
        total += counted(truth, prediction, small_categories, dilation)
    np.testing.assert_allclose(total.to_array(), RECORDED[dilation], rtol=1e-12)


@pytest.mark.parametrize("dilation", [0.02, 0.06])
def test_boundary_quality(
    tmp_path: Path, small_categories: Categories, random_segmentation: Draw, dilation: float
) -> None:
    official = pytest.importorskip(
        "boundary_iou.coco_panoptic_api.evaluation", reason="boundary_iou_api is not installed"
    )
    infos = {entry["id"]: entry for entry in small_categories.to_coco()}
    for k, (truth, prediction) in enumerate(moved_pairs(random_segmentation, small_categories, 12, (50, 70))):
        records = write_pair(tmp_path, k, (truth, prediction), small_categories)
        theirs = official.pq_compute_single_core(
            0, [records], str(tmp_path), str(tmp_path), infos, "boundary", dilation
        )
        assert_same(counted(truth, prediction, small_categories, dilation), theirs, small_categories)


def test_quality_of_cityscapes(tmp_path: Path, small_categories: Categories, random_segmentation: Draw) -> None:
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPanopticSemanticLabeling", reason="cityscapesScripts is not installed"
    )
    infos = {entry["id"]: entry for entry in small_categories.to_coco()}
    for k, (truth, prediction) in enumerate(moved_pairs(random_segmentation, small_categories, 12, (50, 70))):
        records = write_pair(tmp_path, k, (truth, prediction), small_categories)
        theirs = official.pq_compute_single_core(0, [records], str(tmp_path), str(tmp_path), infos)
        assert_same(counted(truth, prediction, small_categories, 0), theirs, small_categories)


def test_regions_of_cityscapes(random_segmentation: Draw) -> None:
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="cityscapesScripts is not installed"
    )
    kept = [label for label in official.labels if label.id >= 0 and not label.ignoreInEval]
    categories = Categories(
        tuple(label.name for label in kept),
        tuple(label.hasInstances for label in kept),
        tuple(label.id for label in kept),
        tuple(label.color for label in kept),
    )
    table = np.zeros((len(kept), len(kept) + 1), np.int64)
    for truth, prediction in moved_pairs(random_segmentation, categories, 5, (60, 80)):
        table += confusion(truth.semantic(), prediction.semantic(), len(categories))
    args = SimpleNamespace(evalLabels=[label.id for label in kept])
    # their matrix is indexed by label id; void predictions are those of an ignored label, id 0 ("unlabeled")
    size = 1 + max(label.id for label in kept)
    theirs = np.zeros((size, size), np.ulonglong)
    theirs[np.ix_(categories.ids, (*categories.ids, 0))] = table
    args.evalLabels = [0, *args.evalLabels]
    ours = mean_iou(table)
    expected = [official.getIouScoreForLabel(label.id, theirs, args) for label in kept]
    np.testing.assert_allclose(ours.iou, 100 * np.array(expected, np.float64), atol=1e-12)
    assert ours.mean_iou == pytest.approx(100 * np.nanmean(expected))
