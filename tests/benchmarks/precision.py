"""AP of masks against pycocotools and faster-coco-eval (row 5), from the same instances to the same figures."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from panoptic.metrics.average_precision import Precision, average_precision, match_instances
from panoptic.rle import encode_segments
from panoptic.segmentation import Categories, Instances, Segmentation
from tests.benchmarks import inputs
from tests.benchmarks.timing import Case

IMAGES, INSTANCES = 12, 100

PEERS = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "faster-coco-eval": ("faster_coco_eval",) * 2}
"""Where COCO and the evaluation of each are imported from; the second is taken where it is installed."""


@dataclass(frozen=True)
class Drawn:
    """Truths, what was found, and both as COCO keeps them."""

    classes: Categories
    truths: list[Segmentation]
    found: list[Instances]
    data: dict[str, list[dict]]
    results: list[dict]


def cases(names: Sequence[str], size: tuple[int, int]) -> list[Case]:
    """The case of row 5, if it is among the names; size is (H, W)."""
    if "5" not in names:
        return []
    drawn = _draw(np.random.default_rng(5), size)
    peers = {name: found for name, modules in PEERS.items() if (found := _imported(*modules))}

    def ours(_: int) -> Precision:
        pairs = zip(drawn.truths, drawn.found, strict=True)
        return average_precision([match_instances(*pair, drawn.classes) for pair in pairs], drawn.classes)

    def theirs(coco: Any, evaluation: Any) -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco()
            truth.dataset = drawn.data
            truth.createIndex()
            evaluator = evaluation(truth, truth.loadRes([dict(result) for result in drawn.results]), "segm")
            evaluator.rle_iou_max_workers = 1  # other threads' time would not be counted
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return 100 * np.asarray(evaluator.stats[:2])

    def compare(mine: Precision, other: np.ndarray) -> None:
        if not np.allclose([mine.mean_ap, mine.mean_ap50], other, atol=1e-9, rtol=0):
            raise ValueError(f"AP and AP50: ours {mine.mean_ap}, {mine.mean_ap50}, theirs {other}")

    return [
        Case(
            "5",
            f"AP of {IMAGES} images of {size[1]}x{size[0]}, {INSTANCES} instances each",
            ours,
            {name: lambda _, found=found: theirs(*found) for name, found in peers.items()},
            dict.fromkeys(peers, compare),
        )
    ]


def _imported(data: str, evaluation: str) -> tuple[Any, Any] | None:
    """COCO and its evaluation; None where they are not installed."""
    try:
        modules: list[ModuleType] = [importlib.import_module(name) for name in (data, evaluation)]
    except ImportError:
        return None
    return modules[0].COCO, getattr(modules[1], "COCOeval_faster", None) or modules[1].COCOeval


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> Drawn:
    """Things that were moved a little, a third of them under another class."""
    classes = inputs.categories(80, 53)
    truths = [inputs.draw_truth(rng, size, 14, 7, classes) for _ in range(IMAGES)]
    found = [_find(rng, truth, classes) for truth in truths]
    images = [{"id": k, "height": size[0], "width": size[1]} for k in range(IMAGES)]
    annotations, results = [], []
    for image, (truth, instances) in enumerate(zip(truths, found, strict=True)):
        things, areas, crowd = _things(truth, classes), truth.areas(), truth.is_crowd()
        masks: list[Any] = encode_segments(truth.segments, things + 1)
        for k, mask in zip(things, masks, strict=True):
            record = {"image_id": image, "category_id": int(truth.labels[k]), "segmentation": mask}
            box = rle.toBbox(mask).tolist()
            record |= {"id": len(annotations) + 1, "area": int(areas[k]), "iscrowd": int(crowd[k]), "bbox": box}
            annotations.append(record)
        for mask, label, score in zip(instances.masks, instances.labels, instances.scores, strict=True):
            result = {"image_id": image, "category_id": int(label), "segmentation": mask, "score": float(score)}
            results.append(result)
    categories = [{"id": k, "name": classes.names[k]} for k in classes.things]
    return Drawn(
        classes, truths, found, {"images": images, "categories": categories, "annotations": annotations}, results
    )


def _find(rng: np.random.Generator, truth: Segmentation, classes: Categories) -> Instances:
    chosen = rng.choice(_things(truth, classes), INSTANCES)
    planes = []
    for k in chosen:
        shift = np.array([[1, 0, rng.integers(-12, 13)], [0, 1, rng.integers(-12, 13)]], np.float32)
        planes.append(cv2.warpAffine((truth.segments == k + 1).astype(np.uint8), shift, truth.size[::-1]))
    wrong = rng.random(INSTANCES) < 1 / 3
    labels = np.where(wrong, rng.choice(np.array(classes.things), INSTANCES), truth.labels[chosen])
    masks: Any = rle.encode(np.asfortranarray(np.stack(planes, -1)))
    boxes = np.zeros((INSTANCES, 4), np.float32)
    return Instances(masks, labels, rng.random(INSTANCES).astype(np.float32), boxes)


def _things(truth: Segmentation, classes: Categories) -> np.ndarray:
    """The segments of things that have a pixel."""
    return np.flatnonzero(np.array(classes.is_thing, bool)[truth.labels] & (truth.areas() > 0))
