"""What labelling tools export: CVAT, Label Studio, Segments.ai, and Parquet files of Hugging Face's form."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from panoptic.png import encode_ids
from panoptic.segmentation import Segmentation
from pipelines.data.readers import READERS, read_source
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.coco_instances import UNCOVERED
from pipelines.data.readers.crowds import MERGED, merge_crowds
from pipelines.data.readers.cvat_masks import read_label_map
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.id_map import ONE_CHANNEL, UNLISTED
from pipelines.data.readers.label_studio import unpack
from pipelines.data.readers.source import Source, Truth
from tests.support.trees import photograph, png, put

SIZE = (8, 10)
PHOTO = photograph(*SIZE)


def truths(source: Source) -> dict[str, Truth]:
    return {row["name"]: source.decode(row, read_file, source.categories) for row in source.rows.to_pylist()}


def drawn(source: Source, truth: Truth) -> list[tuple[str, int, bool]]:
    """Class, pixels and crowd of each segment."""
    one = truth.segmentation
    parts = zip(one.labels.tolist(), one.areas().tolist(), one.is_crowd().tolist(), strict=True)
    return sorted((source.categories.names[label], area, crowd) for label, area, crowd in parts)


def cvat_file(*images: str, labels: tuple[str, ...] = ("car", "road")) -> bytes:
    listed = "".join(f"<label><name>{name}</name><color>#0000{k:02x}</color></label>" for k, name in enumerate(labels))
    meta = f"<version>1.1</version><meta><task><labels>{listed}</labels></task></meta>"
    return f"<?xml version='1.0' encoding='utf-8'?><annotations>{meta}{''.join(images)}</annotations>".encode()


def cvat_image(*shapes: str, name: str = "a.png", subset: str = "") -> str:
    subset = f' subset="{subset}"' if subset else ""
    return f'<image id="0" name="{name}" width="10" height="8"{subset}>{"".join(shapes)}</image>'


SQUARE = '<polygon label="car" points="0,0;4,0;4,4;0,4" z_order="{z}"{more}/>'
MASK = '<mask label="car" rle="{rle}" left="6" top="1" width="3" height="2" z_order="0"/>'
ROAD = '<polygon label="road" points="0,0;10,0;10,8;0,8" z_order="{z}"/>'


def read_cvat(tmp_path: Path, *shapes: str, **options: Any) -> tuple[Source, Truth]:
    put(tmp_path, {"annotations.xml": cvat_file(cvat_image(*shapes)), "images/a.png": PHOTO})
    source = read_source("auto", tmp_path, "train", options)
    assert source.reader == "cvat" and not source.problems
    return source, truths(source)["a.png"]


def test_cvat_masks_are_relative_to_their_box_and_row_by_row(tmp_path: Path) -> None:
    source, truth = read_cvat(tmp_path, MASK.format(rle="1, 2, 1, 2"))
    assert drawn(source, truth) == [("car", 4, False)]
    rows, columns = np.nonzero(truth.segmentation.segments)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 7), (1, 8), (2, 7), (2, 8)]
    assert source.categories.colours == ((0, 0, 0), (0, 0, 1)) and source.categories.is_thing == (True, True)


def test_cvat_layers_lie_as_annotators_stacked_them(tmp_path: Path) -> None:
    road = {"things": ("car",)}
    below, above = [ROAD.format(z=0), SQUARE.format(z=1, more="")], [ROAD.format(z=1), SQUARE.format(z=0, more="")]
    assert drawn(*read_cvat(tmp_path / "a", *below, **road)) == [("car", 16, False), ("road", 64, False)]
    assert drawn(*read_cvat(tmp_path / "b", *above, **road)) == [("road", 80, False)]


def test_cvat_shapes_of_a_group_are_one_object(tmp_path: Path) -> None:
    parts = [
        SQUARE.format(z=0, more=' group_id="3"'),
        MASK.format(rle="0,6").replace("z_order", 'group_id="3" z_order'),
        SQUARE.format(z=0, more="").replace("0,0;4,0;4,4;0,4", "0,5;3,5;3,8;0,8"),
    ]
    assert drawn(*read_cvat(tmp_path, *parts)) == [("car", 9, False), ("car", 22, False)]


def test_cvat_subsets_are_splits(tmp_path: Path) -> None:
    images = [cvat_image(SQUARE.format(z=0, more=""), name=f"{s}.png", subset=s) for s in ("Train", "Val")]
    put(tmp_path, {"annotations.xml": cvat_file(*images), "images/Train.png": PHOTO, "images/Val.png": PHOTO})
    assert list(truths(READERS["cvat"](tmp_path, "val"))) == ["Val.png"]
    with pytest.raises(ValueError, match="has no subset test; it has Train, Val"):
        READERS["cvat"](tmp_path, "test")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ('<box label="car" xtl="0" ytl="0" xbr="3" ybr="3" z_order="0"/>', r"shapes without a mask: 1 box"),
        (SQUARE.format(z=0, more="").replace('"car"', '"cat"'), "labels that the file's list of labels lacks: cat"),
        (SQUARE.format(z=0, more="").replace("4,4", "4,x"), "a shape cannot be read: could not convert"),
    ],
)
def test_cvat_shapes_that_are_rows_of_the_table(shape: str, words: str, tmp_path: Path) -> None:
    good = cvat_image(SQUARE.format(z=0, more=""), name="b.png")
    put(tmp_path, {"annotations.xml": cvat_file(cvat_image(shape), good), "a.png": PHOTO, "b.png": PHOTO})
    source = READERS["cvat"](tmp_path / "annotations.xml", "train")
    (problem,) = source.problems
    assert problem.name == "a.png" and words in problem.reason and problem.remedy
    assert list(truths(source)) == ["b.png"]


def test_cvat_runs_that_do_not_fill_their_box(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.png: annotation 1: the runs of the mask add up to 5 pixels.*2x3"):
        read_cvat(tmp_path, MASK.format(rle="1,4"))
    with pytest.raises(ValueError, match=r"does not lie in the image of 8x10"):
        read_cvat(tmp_path, MASK.format(rle="0,6").replace('left="6"', 'left="8"'))


def test_cvat_files_that_are_none(tmp_path: Path) -> None:
    for data, words in (
        (b"<annotations><track/></annotations>", "tracks of a video; export the task as CVAT for images"),
        (b"<annotations>", "not valid XML"),
        (cvat_file(labels=()), "lists no labels"),
    ):
        put(tmp_path, {"annotations.xml": data})
        with pytest.raises(ValueError, match=words):
            READERS["cvat"](tmp_path, "train")


VOC = b"# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:200,0,0::\nroad:0,200,0::\nbike:0,0,200::\n"
BLACK, CAR, GREEN, BIKE, ONE, TWO = (0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200), (5, 5, 5), (6, 6, 6)


def voc(tmp_path: Path, classes: list, objects: list, more: dict[str, bytes] | None = None) -> Path:
    files = {
        "labelmap.txt": VOC,
        "SegmentationClass/a.png": png(np.array([classes], np.uint8)),
        "SegmentationObject/a.png": png(np.array([objects], np.uint8)),
        "ImageSets/Segmentation/default.txt": b"a\n",
        "JPEGImages/a.jpg": photograph(1, len(classes)),
    }
    return put(tmp_path, {**files, **(more or {})})


def test_cvat_colours(tmp_path: Path) -> None:
    classes = [BLACK, CAR, CAR, CAR, GREEN, GREEN, BIKE, CAR]
    objects = [BLACK, ONE, TWO, TWO, ONE, TWO, TWO, BLACK]  # a car and a bike share a colour; one car has no object
    root = voc(tmp_path, classes, objects)
    source = read_source("auto", root, "train", {"things": ("car", "bike")})
    (truth,) = truths(source).values()
    assert source.reader == "cvat-masks" and source.categories.ids == (1, 2, 3)
    assert drawn(source, truth) == [("bike", 1, False), ("car", 1, False), ("car", 2, False), ("road", 2, False)]
    assert dict(truth.repairs) == {UNCOVERED: 1} and source.categories.colours[0] == CAR
    stuff = read_source("cvat-masks", root, "train", {"things": ("none",)})
    assert drawn(stuff, *truths(stuff).values()) == [("bike", 1, False), ("car", 4, False), ("road", 2, False)]


def test_cvat_colours_that_no_class_has(tmp_path: Path) -> None:
    root = voc(tmp_path, [CAR, (203, 4, 0), (203, 4, 0), GREEN], [ONE, ONE, ONE, TWO])
    options: dict[str, Any] = {"things": ("car",)}
    with pytest.raises(Fault, match=r"\(203, 4, 0\) \(2 pixels; nearest is car \(200, 0, 0\), 5 away\)") as raised:
        truths(read_source("cvat-masks", root, "train", options))
    assert "labelmap.txt" in raised.value.remedy and "--data.unlisted void" in raised.value.remedy
    source = read_source("cvat-masks", root, "train", {**options, "unlisted": "void"})
    (truth,) = truths(source).values()
    assert drawn(source, truth) == [("car", 1, False), ("road", 1, False)] and truth.repairs[UNLISTED] == 2


def test_cvat_does_not_guess_which_classes_are_things(tmp_path: Path) -> None:
    root = voc(tmp_path, [CAR, CAR, GREEN], [ONE, TWO, ONE])
    with pytest.raises(ValueError, match=r"--data.things .*car, road, bike; some image has several objects of car$"):
        READERS["cvat-masks"](root, "train")
    with pytest.raises(ValueError, match=r"cat: .*has no such class"):
        READERS["cvat-masks"](root, "train", things=("cat",))


def test_cvat_lists_are_splits(tmp_path: Path) -> None:
    more = {"ImageSets/Segmentation/val.txt": b"b\n", "ImageSets/Segmentation/default.txt": b"a\n"}
    more |= {
        f"{folder}/b.png": png(np.array([[GREEN]], np.uint8)) for folder in ("SegmentationClass", "SegmentationObject")
    }
    root = voc(tmp_path, [CAR], [ONE], {**more, "JPEGImages/b.jpg": photograph(1, 1)})
    assert list(truths(READERS["cvat-masks"](root, "val", things=("car",)))) == ["b.jpg"]
    with pytest.raises(ValueError, match=r"has no train.txt; the splits are default, val"):
        READERS["cvat-masks"](root, "train", things=("car",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("car:1,2::", "line 1 is 'car:1,2::'"),
        ("car:1,2,3::\nbus:1,2,3::", "two classes have the colour"),
        ("car:1,2,3::\ncar:1,2,4::", "two classes have the name car"),
        ("background:0,0,0::", "lists no class"),
    ],
)
def test_label_maps_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_label_map(text, "labelmap.txt")


def packed(values: np.ndarray) -> list[int]:
    """A brush as the tool packs it: runs where there are some, single values otherwise."""
    sizes, flat, bits = (3, 4, 8, 16), values.ravel().tolist(), ""
    bits += f"{len(flat):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    place = 0
    while place < len(flat):
        run = next((k for k in range(place, len(flat)) if flat[k] != flat[place]), len(flat)) - place
        if run > 1:
            run = min(run, 1 << 16)
            which = next(k for k, size in enumerate(sizes) if run <= 1 << size)
            bits += f"1{which:02b}{run - 1:0{sizes[which]}b}{flat[place]:08b}"
        else:
            run = min(3, len(flat) - place)
            bits += f"000{run - 1:03b}" + "".join(f"{value:08b}" for value in flat[place : place + run])
        place += run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def brush(mask: np.ndarray) -> list[int]:
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = mask * 7, mask * 127
    return packed(rgba)


def test_brushes_are_unpacked() -> None:
    values = np.random.default_rng(0).integers(0, 3, 4000).astype(np.uint8)
    values[100:3000] = 9
    assert (unpack(bytes(packed(values)), 4000) == values).all()
    with pytest.raises(ValueError, match="has 4000 values of 8 bits, and the image needs 4004"):
        unpack(bytes(packed(values)), 4004)
    with pytest.raises(ValueError, match="ends before its last pixel"):
        unpack(bytes(packed(values)[:-40]), 4000)


MASK_A = np.zeros(SIZE, bool)
MASK_A[2:5, 3:9] = True


def region(kind: str, value: dict, number: str = "r1", **more: Any) -> dict:
    return {
        "id": number,
        "type": kind,
        "value": value,
        "original_width": 10,
        "original_height": 8,
        "image_rotation": 0,
        **more,
    }


CAR_BRUSH = region("brushlabels", {"format": "rle", "rle": brush(MASK_A), "brushlabels": ["car"]})
POLYGON = region("polygonlabels", {"points": [[0, 0], [40, 0], [40, 25], [0, 25]], "polygonlabels": ["bus"]}, "r2")


def task(*annotations: list, image: str = "/data/upload/1/0123abcd-a%20b.png", **more: Any) -> dict:
    listed = [{"id": k, "result": result, **more} for k, result in enumerate(annotations)]
    return {"id": 7, "data": {"text": "x", "image": image}, "annotations": listed}


def read_tasks(tmp_path: Path, *tasks: dict) -> Source:
    put(tmp_path, {"project-1-at-2026.json": json.dumps(tasks).encode(), "images/a b.png": PHOTO})
    return read_source("auto", tmp_path / "project-1-at-2026.json", "train", {})


def test_label_studio_brushes_and_polygons(tmp_path: Path) -> None:
    choice = {"type": "choices", "value": {"choices": ["day"]}, "id": "c"}
    source = read_tasks(tmp_path, task([CAR_BRUSH, POLYGON, choice]), task(image="skipped.png"))
    assert source.reader == "label-studio" and not source.problems and source.unannotated == ("skipped.png",)
    assert source.categories.names == ("bus", "car") and source.categories.is_thing == (True, True)
    (truth,) = (truths(source)[name] for name in ["a b.png"])  # without the letters that the tool adds
    assert drawn(source, truth) == [("bus", 8, False), ("car", 18, False)]
    assert ((truth.segmentation.segments > 0)[2:5] == MASK_A[2:5]).all()
    assert READERS["label-studio"](tmp_path, "train").fingerprint == source.fingerprint


def test_label_studio_labels_that_stand_apart_from_their_brush(tmp_path: Path) -> None:
    shape = region("brush", {"format": "rle", "rle": brush(MASK_A)})
    source = read_tasks(tmp_path, task([shape, region("labels", {"labels": ["car"]})]))
    assert drawn(source, truths(source)["a b.png"]) == [("car", 18, False)]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([[CAR_BRUSH], [POLYGON]], "the task 7 has 2 annotations, of several annotators"),
        ([[{**CAR_BRUSH, "image_rotation": 90}]], "drawn over the image turned by 90 degrees"),
        ([[region("rectanglelabels", {"x": 1, "rectanglelabels": ["car"]})]], "regions without a mask: 1 rectangle"),
        ([[CAR_BRUSH, {**POLYGON, "original_width": 99}]], "do not agree on original_height and original_width"),
        ([[region("brushlabels", {"rle": [1], "brushlabels": ["car", "bus"]})]], r"has 2 labels \(car, bus\)"),
    ],
)
def test_label_studio_tasks_that_are_rows_of_the_table(result: list, words: str, tmp_path: Path) -> None:
    put(tmp_path, {"images/good.png": PHOTO})
    source = read_tasks(tmp_path, task(*result), task([CAR_BRUSH], image="good.png"))
    (problem,) = source.problems
    assert re.search(words, problem.reason) and problem.remedy
    assert list(truths(source)) == ["good.png"]


def test_label_studio_takes_the_annotation_that_is_ground_truth(tmp_path: Path) -> None:
    both = task([CAR_BRUSH], [POLYGON])
    both["annotations"][1]["ground_truth"] = True
    cancelled = task([CAR_BRUSH], [POLYGON], image="a b.png")
    cancelled["annotations"][0]["was_cancelled"] = True
    for one in (both, cancelled):
        source = read_tasks(tmp_path, one)
        assert drawn(source, truths(source)["a b.png"]) == [("bus", 8, False)]


def test_label_studio_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"id": 1, "image": "a.png", "original_width": 3}]')
    with pytest.raises(ValueError, match="JSON-MIN and CSV leave out"):
        READERS["label-studio"](tmp_path, "train")
    (tmp_path / "task-1-annotation-2-by-3-tag-car-0.png").write_bytes(PHOTO)
    with pytest.raises(ValueError, match=r"a PNG for each region.*export the project as JSON"):
        READERS["label-studio"](tmp_path, "train")


IDS = np.zeros(SIZE, np.int32)
IDS[:4], IDS[4:6], IDS[6:, 5:] = 1, 70000, 2


def release(**changes: Any) -> bytes:
    label = {"attributes": {"annotations": [{"id": i, "category_id": c} for i, c in ((1, 4), (70000, 4), (2, 9))]}}
    samples = [
        {"name": "dir/a.png", "labels": {"ground-truth": label}},
        {"name": "b.png", "labels": {"ground-truth": None}},
    ]
    categories = [
        {"id": 4, "name": "car", "has_instances": True, "color": [1, 2, 3, 255]},
        {"id": 9, "name": "sky", "has_instances": False},
    ]
    dataset = {"task_type": "segmentation-bitmap", "samples": samples, "task_attributes": {"categories": categories}}
    return json.dumps({"name": "v1", "dataset": {**dataset, **changes}}).encode()


def with_alpha(ids: np.ndarray) -> bytes:
    return png(np.ascontiguousarray(ids | 7 << 24, "<i4").view(np.uint8).reshape(*ids.shape, 4))


def test_segments_ai_bitmaps(tmp_path: Path) -> None:
    put(tmp_path, {"v1.json": release(), "dir/a.png": PHOTO, "dir/a_label_ground-truth.png": with_alpha(IDS)})
    for root in (tmp_path / "v1.json", tmp_path):
        source = read_source("auto" if root.suffix else "segments-ai", root, "train", {})
        assert source.reader == "segments-ai" and source.unannotated == ("b.png",) and not source.problems
        assert source.categories.is_thing == (True, False) and source.categories.colours[0] == (1, 2, 3)
        (truth,) = truths(source).values()
        assert drawn(source, truth) == [("car", 20, False), ("car", 40, False), ("sky", 10, False)]
    small = np.where(IDS == 70000, 3, IDS)
    data = release().replace(b"70000", b"3")
    put(tmp_path, {"v1.json": data, "dir/a_label_ground-truth.png": png(small.astype(np.uint16))})
    source = READERS["segments-ai"](tmp_path, "train")
    (truth,) = truths(source).values()
    assert len(drawn(source, truth)) == 3 and truth.repairs == {ONE_CHANNEL: 1}


def test_segments_ai_releases_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, {"dir/a.png": PHOTO, "dir/a_label_ground-truth.png": with_alpha(IDS)})
    for data, words in (
        (release(task_type="bboxes"), "its task type is bboxes"),
        (b"{}", "is no release file"),
        (release(task_attributes={"categories": [{"id": 4, "name": "car"}]}), "name them with --data.things, of car"),
    ):
        put(tmp_path, {"v1.json": data})
        with pytest.raises(ValueError, match=words):
            READERS["segments-ai"](tmp_path, "train")
    put(tmp_path, {"v1.json": release()})
    with pytest.raises(ValueError, match=r"no label set x; name one with --data.label-set: ground-truth"):
        READERS["segments-ai"](tmp_path, "train", label_set="x")
    put(tmp_path, {"v1.json": release().replace(b'"category_id": 9', b'"category_id": 8')})
    (problem,) = READERS["segments-ai"](tmp_path, "train").problems
    assert problem.name == "dir/a.png" and "category_id 8" in problem.reason


def test_parquet_files_with_photographs(tmp_path: Path) -> None:
    infos = [{"id": 1, "category_id": 4}, {"id": 70000, "category_id": 4}, {"id": 2, "category_id": 9}]
    table = pa.table(
        {
            "image": [{"bytes": PHOTO, "path": "x\\a.png"}, {"bytes": PHOTO, "path": "x\\b.png"}],
            "mask": [{"bytes": encode_ids(IDS), "path": "m\\a.png"}] * 2,
            "segments_info": [infos, [{**infos[0], "category_id": 5}]],
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="do not name their classes; give a JSON"):
        READERS["huggingface"](tmp_path, "train")
    put(tmp_path, {"c.json": b'[{"id": 4, "name": "car"}, {"id": 9, "name": "sky"}]'})
    with pytest.raises(ValueError, match=r"name them with --data.things, of car, sky"):
        READERS["huggingface"](tmp_path, "train", json_file="c.json")
    source = READERS["huggingface"](tmp_path, "train", json_file="c.json", things=("car",))
    assert [(p.name, p.reason) for p in source.problems] == [("b.png", "category_id 5 is not in the categories")]
    (truth,) = truths(source).values()
    assert list(truths(source)) == ["a.png"]
    assert drawn(source, truth) == [("car", 20, False), ("car", 40, False), ("sky", 10, False)]
    assert read_file(source.rows["image"][0].as_py()) == PHOTO


def test_ids_that_nothing_lists_become_void_where_that_is_asked_for(tmp_path: Path) -> None:
    infos = [{"id": 1, "category_id": 4}, {"id": 2, "category_id": 9}]
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": infos}],
        "categories": [{"id": 4, "name": "car", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}],
    }
    files = {"annotations/panoptic_train.json": json.dumps(content).encode(), "images/train/a.png": PHOTO}
    put(tmp_path, {**files, "annotations/panoptic_train/a.png": encode_ids(IDS)})
    with pytest.raises(ValueError, match=r"does not list: 70000 \(20 pixels\)"):
        truths(read_source("coco", tmp_path, "train", {}))
    source = read_source("coco", tmp_path, "train", {"unlisted": "void"})
    (truth,) = truths(source).values()
    assert drawn(source, truth) == [("car", 40, False), ("sky", 10, False)] and truth.repairs == {UNLISTED: 20}
    assert source.fingerprint != read_source("coco", tmp_path, "train", {}).fingerprint


def test_crowds_of_a_class_are_merged_where_that_is_asked_for() -> None:
    segments = np.array([[1, 2, 3, 4, 5, 0]], np.int32)
    truth = Segmentation(segments, np.array([0, 1, 0, 0, 1]), np.array([True, False, True, False, True]))
    merged, gone = merge_crowds(truth)
    assert gone == 1 and merged.segments.tolist() == [[1, 2, 1, 3, 4, 0]]
    assert merged.labels.tolist() == [0, 1, 0, 1] and merged.is_crowd().tolist() == [True, False, False, True]
    assert merge_crowds(merged) == (merged, 0)


def test_merged_crowds_are_counted(tmp_path: Path) -> None:
    crowd = {"id": 1, "category_id": 4, "iscrowd": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [crowd, {**crowd, "id": 2}]}],
        "categories": [{"id": 4, "name": "car", "isthing": 1}],
    }
    files = {"annotations/panoptic_train.json": json.dumps(content).encode(), "images/train/a.png": PHOTO}
    put(tmp_path, {**files, "annotations/panoptic_train/a.png": encode_ids(np.where(IDS == 70000, 0, IDS))})
    source = read_source("coco", tmp_path, "train", {"merge_crowds": "yes"})
    (truth,) = truths(source).values()
    assert drawn(source, truth) == [("car", 50, True)] and Counter(truth.repairs) == {MERGED: 1}
