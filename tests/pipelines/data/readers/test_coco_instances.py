"""Instances that overlap, their masks in every form, and what is under them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from panoptic import rle
from panoptic.segmentation import Categories
from pipelines.data.readers import coco_instances as module
from pipelines.data.readers import read_source
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.coco_instances import (
    BAD_POLYGONS,
    CONTESTED,
    COVERED,
    FLAT,
    OTHER_BOX,
    OUTSIDE,
    UNCOVERED,
    WITHOUT_PIXEL,
    Instance,
    coco_instances,
    paint,
)
from pipelines.data.readers.source import SWAPPED, Truth
from tests.support.trees import photograph, png, put

SIZE = (8, 10)
CLASSES = Categories(("person", "car", "sky"), (True, True, False), (1, 2, 3), ((0, 0, 0),) * 3)


def box(top: int, left: int, bottom: int, right: int) -> dict:
    mask = np.zeros((1, *SIZE), np.uint8)
    mask[0, top:bottom, left:right] = 1
    return rle.encode_masks(mask)[0]


LARGE, SMALL = Instance(box(0, 0, 6, 6), 0, False, "large"), Instance(box(4, 4, 8, 8), 1, False, "small")
CROWD = Instance(box(0, 0, 8, 10), 0, True, "crowd")


@pytest.mark.parametrize(
    ("overlap", "areas"),
    [
        ("smaller-wins", {"large": 32, "small": 16}),
        ("later-wins", {"large": 36, "small": 12}),
        ("earlier-wins", {"large": 32, "small": 16}),
        ("void", {"large": 32, "small": 12}),
    ],
)
def test_overlaps(overlap: module.Overlap, areas: dict[str, int]) -> None:
    counts: Counter = Counter()
    truth = paint([SMALL, LARGE, CROWD], SIZE, CLASSES, counts, overlap=overlap)
    found = dict(zip(truth.labels.tolist(), truth.areas().tolist(), strict=True))
    assert truth.labels.tolist() == [1, 0, 0] and truth.is_crowd().tolist() == [False, False, True]
    assert truth.areas().tolist()[:2] == [areas["small"], areas["large"]], found
    assert counts == {CONTESTED: 4}  # what a crowd covers is not contested
    assert (truth.segments == 0).sum() == (4 if overlap == "void" else 0)


def test_of_equal_instances_the_later_lies_on_top_and_what_is_covered_is_left_out() -> None:
    counts: Counter = Counter()
    truth = paint([LARGE, LARGE._replace(label=1)], SIZE, CLASSES, counts)
    assert truth.labels.tolist() == [1] and counts == {CONTESTED: 36, COVERED: 1}
    with pytest.raises(ValueError, match="large and small overlap; choose who has"):
        paint([LARGE, SMALL], SIZE, CLASSES, counts, overlap="error")


def test_over_a_map_of_classes() -> None:
    base = np.full(SIZE, 2, np.int32)
    base[:, 8:], base[7, 0] = 1, -1
    for uncovered, labels in (("void", [0, 2]), ("crowd", [0, 1, 2])):
        counts: Counter = Counter()
        truth = paint([LARGE], SIZE, CLASSES, counts, uncovered=uncovered, base=base)  # type: ignore[arg-type]
        assert truth.labels.tolist() == labels and counts == {UNCOVERED: 16}
        assert truth.segments[7, 0] == 0 and bool(truth.segments[0, 9]) == (uncovered == "crowd")
        assert truth.is_crowd().tolist() == [label == 1 for label in labels]


def test_instances_of_stuff_are_one_segment() -> None:
    base = np.full(SIZE, 2, np.int32)
    truth = paint([LARGE._replace(label=2), SMALL._replace(label=2)], SIZE, CLASSES, Counter(), base=base)
    assert truth.labels.tolist() == [2] and truth.areas().tolist() == [80]


def write(root: Path, annotations: list[dict], **changes) -> Path:
    """A folder with one photograph of SIZE and its instances."""
    (root / "images").mkdir(parents=True)
    (root / "images/a.png").write_bytes(cv2.imencode(".png", np.full((*SIZE, 3), 99, np.uint8))[1].tobytes())
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"id": k, "image_id": 7, "category_id": 1, **a} for k, a in enumerate(annotations, 1)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        **changes,
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root


def truth_of(root: Path, **options) -> Truth:
    source = read_source("auto", root, "train", options)
    assert source.reader == "coco-instances" and not source.problems
    return source.decode(source.rows.to_pylist()[0], read_file, source.categories)


SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]
MASK = box(1, 1, 4, 5)
RUNS = rle.run_lengths(MASK["counts"])


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,
        [SQUARE, [0, 0, 1, 1]],
        {"size": list(SIZE), "counts": MASK["counts"].decode()},
        {"size": list(SIZE), "counts": RUNS},
    ],
)
def test_every_form_of_a_mask(tmp_path: Path, segmentation: list | dict) -> None:
    truth = truth_of(write(tmp_path, [{"segmentation": segmentation}]))
    np.testing.assert_array_equal(truth.segmentation.segments, coco.decode(MASK))  # type: ignore[arg-type]
    assert truth.repairs == (
        {FLAT: 1} if segmentation is SQUARE else {BAD_POLYGONS: 1} if "0, 0, 1" in str(segmentation) else {}
    )


def test_what_is_left_out_or_cut_is_counted(tmp_path: Path) -> None:
    row_major = {"size": list(SIZE), "counts": [20, 40, 20]}
    truth = truth_of(
        write(
            tmp_path,
            [
                {"segmentation": [[0, 0, 1]]},
                {"segmentation": [[2, 2, 2, 2, 2, 2]]},
                {"segmentation": [[8, 6, 14, 6, 14, 12, 8, 12]]},
                {"segmentation": row_major, "bbox": [0, 2, 10, 1]},
            ],
        )
    )
    assert (
        truth.repairs == {BAD_POLYGONS: 1, WITHOUT_PIXEL: 2, OUTSIDE: 1, OTHER_BOX: 1, **truth.repairs}
        and len(truth.segmentation.labels) == 2
    )


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [10, 8], "counts": RUNS}, r"the RLE has the size \[10, 8\], and the image \[8, 10\]"),
        ({"size": list(SIZE), "counts": [3, 4]}, "the runs add up to 7 pixels, and the image has 8x10"),
        ({"size": list(SIZE), "counts": "a!"}, "is none of a compressed RLE"),
        ({"size": list(SIZE)}, "the RLE has counts null"),
        ([[1e9, 0, 5, 1, 5, 4]], "far beyond the image"),
    ],
)
def test_masks_that_cannot_be_read_are_a_problem_of_their_image(
    tmp_path: Path, segmentation: object, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.png: annotation 1: .*{words}"):
        truth_of(write(tmp_path, [{"segmentation": segmentation}]))


def test_boxes_are_never_filled(tmp_path: Path) -> None:
    root = write(tmp_path / "some", [{"segmentation": [SQUARE]}, {"bbox": [0, 0, 4, 4]}])
    assert "box without mask (annotation 2)" in coco_instances(root, "x").problems[0].reason
    with pytest.raises(ValueError, match="boxes without a mask; a box is never filled"):
        coco_instances(write(tmp_path / "all", [{"bbox": [0, 0, 4, 4]}]), "x")


def test_sizes_crowds_and_background(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.png", "height": SIZE[1], "width": SIZE[0]}]
    root = write(tmp_path, [{"segmentation": [SQUARE], "iscrowd": 1}], images=images)
    truth = truth_of(root)
    assert truth.repairs == {SWAPPED: 1} and truth.segmentation.is_crowd().tolist() == [True]
    truth = truth_of(root, crowd="ignore", background="ground")
    assert truth.segmentation.is_crowd().tolist() == [False, False]
    assert truth.segmentation.areas().tolist() == [12, 68]


def test_crowds_that_a_tool_sets_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    brush = {"segmentation": {"size": list(SIZE), "counts": RUNS}, "iscrowd": 1, "attributes": {"occluded": False}}
    coco_instances(write(tmp_path, [{"segmentation": [SQUARE]}, brush]), "x")
    assert "all 1 RLE masks are crowds" in caplog.text and "--data.crowd ignore" in caplog.text


def test_lvis_names_its_images_by_their_addresses(tmp_path: Path) -> None:
    images = [{"id": 7, "coco_url": "http://x/train2017/a.png", "height": 8, "width": 10, "neg_category_ids": []}]
    root = write(tmp_path, [{"segmentation": [SQUARE]}], images=images)
    (root / "images").rename(root / "train2017")
    assert coco_instances(root, "val").rows["name"].to_pylist() == ["train2017/a.png"]
    with pytest.raises(ValueError, match="is federated"):
        coco_instances(root, "val", background="ground")


def test_the_group_of_a_project_is_no_class(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "project", "supercategory": "none"},
        {"id": 1, "name": "person", "supercategory": "project"},
    ]
    root = write(tmp_path, [{"segmentation": [SQUARE]}], categories=categories)
    assert coco_instances(root, "x").categories.names == ("person",)


def test_a_semantic_map_with_values_without_a_class(tmp_path: Path) -> None:
    root = write(tmp_path, [{"segmentation": [SQUARE]}])
    (root / "semantic").mkdir()
    values = np.full(SIZE, 3, np.uint8)
    (root / "semantic/a.png").write_bytes(cv2.imencode(".png", values)[1].tobytes())
    sky = {"value": 3, "id": 5, "name": "sky", "isthing": 0}
    (root / "classes.json").write_text(json.dumps({"classes": [sky]}))
    places = {"semantic": str(root / "semantic"), "semantic_classes": str(root / "classes.json")}
    truth = truth_of(root, **places)
    assert truth.segmentation.areas().tolist() == [12, 68]
    (root / "classes.json").write_text(json.dumps({"classes": [{**sky, "value": 4}]}))
    with pytest.raises(ValueError, match=r"without a class: 3 \(80 pixels\); do the values begin at another number"):
        truth_of(root, **places)
    (root / "classes.json").write_text(json.dumps({"classes": [{**sky, "id": 1}]}))
    with pytest.raises(ValueError, match=r"category 1 'person', --data\.semantic-classes 'sky'"):
        coco_instances(root, "x", **places)
    with pytest.raises(ValueError, match="belong together"):
        coco_instances(root, "x", semantic=str(root / "semantic"))


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((37, 53)) < rng.random()).astype(np.uint8)
    encoded = rle.encode_masks(mask[None])[0]
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    lengths = rle.run_lengths(encoded["counts"])
    assert np.cumsum(lengths).tolist() == edges.tolist() or sum(lengths) == flat.size
    np.testing.assert_array_equal(rle.decode(rle.from_run_lengths(lengths, (37, 53))), mask.astype(bool))


@pytest.mark.parametrize(
    ("preset", "values", "names", "wrong"),
    [
        ("cocostuff", [0, 0, 2, 156, 255, 91], ["car", "sky-other", "banner"], 183),
        ("cocostuff-challenge", [0, 183, 183, 157, 0, 92], ["car", "sky-other", "banner"], 255),
        ("panoptic-stuff", [0, 0, 0, 1, 53, 255], ["car", "banner", "rug-merged"], 54),
    ],
)
def test_values_of_public_semantic_maps_have_names(
    preset: str, values: list[int], names: list[str], wrong: int, tmp_path: Path
) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [entry],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    }
    files = {"instances_train.json": json.dumps(content).encode(), "images/a.png": photograph(1, 6)}
    put(tmp_path, {**files, "stuff/a.png": png(np.array([values], np.uint8))})
    options = {"semantic": str(tmp_path / "stuff"), "semantic_classes": preset}
    source = read_source("coco-instances", tmp_path, "train", options)
    (row,) = source.rows.to_pylist()
    truth = source.decode(row, read_file, source.categories)
    assert [source.categories.names[label] for label in truth.segmentation.labels] in (names, [names[0], *names[:0:-1]])
    assert int((truth.segmentation.segments == 0).sum()) == (6 - 2 - 2)
    put(tmp_path, {"stuff/a.png": png(np.array([[wrong] * 6], np.uint8))})
    with pytest.raises(ValueError, match=rf"without a class: {wrong} \(6 pixels\)"):
        source.decode(row, read_file, source.categories)


def test_categories_as_text_are_read_and_counted(tmp_path: Path) -> None:
    entry = {"id": 1, "image_id": 1, "category_id": "3", "segmentation": [[0, 0, 2, 0, 2, 1, 0, 1]]}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [entry],
        "categories": [{"id": "3", "name": "car"}],
    }
    put(tmp_path, {"instances_train.json": json.dumps(content).encode(), "images/a.png": photograph(1, 6)})
    source = coco_instances(tmp_path, "train")
    truth = source.decode(source.rows.to_pylist()[0], read_file, source.categories).segmentation
    assert truth.areas().tolist() == [2] and source.categories.ids == (3,)
    assert "annotations.category_id" in " ".join(source.repairs)
    entry["category_id"] = "car"
    put(tmp_path, {"instances_train.json": json.dumps(content).encode()})
    with pytest.raises(ValueError, match=r"annotations\[0\].category_id is .*car.*; it must be the id of a category"):
        coco_instances(tmp_path, "train")
