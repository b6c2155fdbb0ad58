"""The miniature trees of every format give exactly the segmentations stored beside them, from folders and from zips."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from panoptic.segmentation import Segmentation
from pipelines.data.readers import READERS
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.source import Source, Truth
from pipelines.data.validation import check_photograph

SEMANTIC = {"semantic": "@instances/semantic", "semantic_classes": "@instances/semantic_classes.json"}

CASES: dict[str, tuple[str, str, dict]] = {
    "coco": ("coco", "coco", {"split": "train2017"}),
    "coco_zip": ("coco", "coco_zip", {"split": "train2017"}),
    "cityscapes_train": ("cityscapes", "cityscapes", {"split": "train"}),
    "cityscapes_val": ("cityscapes", "cityscapes", {"split": "val"}),
    "cityscapes_train, zips": ("cityscapes", "cityscapes_zip", {"split": "train"}),
    "cityscapes_val, zips": ("cityscapes", "cityscapes_zip", {"split": "val"}),
    "cityscapes_train, JSON": ("cityscapes", "cityscapes_coco", {"split": "train"}),
    "cityscapes_val, JSON": ("cityscapes", "cityscapes_coco", {"split": "val"}),
    "mapillary_v1": ("mapillary", "mapillary_v1", {"split": "training"}),
    "mapillary_v1, zip": ("mapillary", "mapillary_v1_zip", {"split": "training"}),
    "mapillary_v1_instances": ("mapillary", "mapillary_v1", {"split": "training", "labels": "instances"}),
    "mapillary_v2": ("mapillary", "mapillary_v2", {"split": "training", "version": "2.0"}),
    "mapillary_v2, zip": ("mapillary", "mapillary_v2_zip/An_fixture.zip", {"split": "train"}),
    "mapillary_v2_instances": ("mapillary", "mapillary_v2", {"split": "training", "labels": "instances"}),
    "instances": ("coco-instances", "instances", SEMANTIC),
    "instances_later": ("coco-instances", "instances/instances.json", {**SEMANTIC, "overlap": "later-wins"}),
    "instances_void": ("coco-instances", "instances", {**SEMANTIC, "overlap": "void"}),
    "instances_alone": ("coco-instances", "instances", {}),
    "bdd100k": ("bdd100k", "bdd100k", {}),
    "kitti_step": ("kitti-step", "kitti_step", {}),
    "ade20k": ("ade20k", "ade20k", {"split": "training"}),
    "ade20k, prepared": ("ade20k", "ade20k", {"split": "train", "labels": "panoptic"}),
    "ade20k_prepared": (
        "coco",
        "ade20k/ADEChallengeData2016/ade20k_panoptic_train.json",
        {"images": "@ade20k/ADEChallengeData2016/images/training"},
    ),
    "segments_ai": ("coco", "segments_ai/export_coco-panoptic_me_set_v1.json", {}),
    "coconut": ("coconut", "coconut", {"split": "val2017"}),
    "exif": ("coco", "exif", {"split": "train"}),
    "faults": ("coco", "faults", {"split": "train"}),
}
"""Reader, folder, options of each stored expectation; what follows a comma is another form of the same data."""


def decoded(source: Source) -> tuple[dict[str, Truth], dict[str, str]]:
    """The truth of each image, and the fault of each that has one, as the workers find them."""
    truths, faults = {}, {problem.name: problem.reason for problem in source.problems}
    for row in source.rows.to_pylist():
        try:
            truth = source.decode(row, read_file, source.categories)
            _, kinds = check_photograph(
                read_file(row["image"]), row["name"], truth.segmentation.size, source.orientation
            )
            truths[row["name"]] = truth._replace(repairs=Counter(truth.repairs) + Counter(kinds))
        except ValueError as error:
            faults[row["name"]] = str(error)
    return truths, faults


def as_set(truth: Segmentation) -> set[tuple[int, bool, bytes]]:
    """(label, crowd, mask) of each segment: their order is no part of a segmentation."""
    marks = zip(truth.labels.tolist(), truth.is_crowd().tolist(), strict=True)
    return {(label, crowd, np.packbits(truth.segments == k).tobytes()) for k, (label, crowd) in enumerate(marks, 1)}


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_stored_segmentations(case: str, shared: Callable[[str], Path]) -> None:
    root = shared("fixtures/datasets")
    reader, folder, options = CASES[case]
    expected = json.loads((root / "expected" / f"{case.split(',')[0]}.json").read_text())
    arrays = np.load(root / "expected" / f"{case.split(',')[0]}.npz")
    options = {"split": "train", **options}
    options = {key: str(root / value[1:]) if str(value).startswith("@") else value for key, value in options.items()}
    source = READERS[reader](str(root / folder), options.pop("split"), **options)
    categories = source.categories
    assert list(categories.names) == [entry["name"] for entry in expected["categories"]]
    assert list(categories.ids) == [entry["id"] for entry in expected["categories"]]
    assert list(categories.is_thing) == [bool(entry["isthing"]) for entry in expected["categories"]]
    truths, faults = decoded(source)
    assert sorted(truths) == sorted(image["name"] for image in expected["images"])
    ids = dict(zip(source.rows["name"].to_pylist(), source.rows["image_id"].to_pylist(), strict=True))
    for k, image in enumerate(expected["images"]):
        truth = truths[image["name"]].segmentation
        wanted = Segmentation(arrays[f"{k}_segments"], arrays[f"{k}_labels"], arrays[f"{k}_crowd"])
        assert truth.size == (image["height"], image["width"]) and ids[image["name"]] == image["image_id"]
        assert len(truth.labels) == image["n"] == len(as_set(truth)) and as_set(truth) == as_set(wanted)
    assert faults.keys() == {problem["name"] for problem in expected["problems"]}
    for problem in expected["problems"]:
        assert all(word in faults[problem["name"]] for word in problem["message_holds"])


@pytest.mark.parametrize("folder", ["cityscapes", "cityscapes_zip", "cityscapes_coco"])
def test_the_test_split_of_cityscapes_points_to_predict(folder: str, shared: Callable[[str], Path]) -> None:
    with pytest.raises(
        ValueError, match=r"split test has no public labels(.|\n)*jobs/predict.py MODEL .*leftImg8bit/test"
    ):
        READERS["cityscapes"](shared("fixtures/datasets") / folder, "test")
