"""The catalogue of faults of data sets, by number: each is a row with a remedy, a repair, a warning or a refusal.

Unknown colours (36) are tested with the reader of CVAT's masks.
"""

from __future__ import annotations

import io
import json
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from panoptic.png import decode_ids, encode_ids
from panoptic.segmentation import Categories
from pipelines.data import duplicates
from pipelines.data.classes import with_equal_classes
from pipelines.data.duplicates import shared_photographs, warn_of_shared, write_keys
from pipelines.data.join import Roots
from pipelines.data.manifest import Manifest
from pipelines.data.prepare import COPIES, _manifest, _refusal
from pipelines.data.readers import coco_source, id_map, read_source, rows
from pipelines.data.readers.category_list import SAME_NAME, UNUSED_BACKGROUND
from pipelines.data.readers.coco_instances import BAD_POLYGONS, CONTESTED, OUTSIDE, WITHOUT_PIXEL
from pipelines.data.readers.coco_source import RENAMED, RESPELT_IDS
from pipelines.data.readers.source import OTHER_BOXES, SWAPPED, Problem, Source
from pipelines.data.shard_writer import Report, write_shard
from pipelines.data.validation import (
    ANIMATED,
    CMYK,
    GREY,
    SEVERAL_CROWDS,
    SIXTEEN_BITS,
    STUFF_CROWD,
    STUFF_UNITED,
)
from tests.support.coco_folder import CATEGORIES, write_folder, write_json
from tests.support.trees import CITY_FILES, photograph, png, put, zipped

IMAGES, PNGS = "images/train", "annotations/panoptic_train"
HEIGHT, WIDTH = 20, 30


class Found(NamedTuple):
    """What the check of a data set says."""

    source: Source
    problems: dict[str, Problem]
    repairs: Counter[str]
    manifest: Manifest

    @property
    def good(self) -> list[str]:
        return [row["name"] for row in self.source.rows.to_pylist() if row["name"] not in self.problems]


def found(root: Path, split: str = "train", reader: str = "auto", **options: Any) -> Found:
    """Read and check all of a data set in this process, as `--check` does."""
    source = read_source(reader, root, split, options)
    light = source.rows.append_column("shard", pa.array([0] * source.rows.num_rows))
    how = {"decode": source.decode, "orientation": source.orientation}
    reports = []
    if source.rows.num_rows:
        report = write_shard(light, None, source.categories, **how)["report"][0].as_py()
        reports = [Report(**json.loads(report))]
    manifest = _manifest(source, {}, reports, "")
    assert all(problem.reason and problem.remedy for problem in manifest.skipped), manifest.skipped
    problems = {problem.name: problem for problem in manifest.skipped}
    assert len(problems) == len(manifest.skipped)
    return Found(source, problems, Counter(manifest.repairs), manifest)


def broken(root: Path, change: Callable[[dict, Path], object], count: int = 4) -> Path:
    """A COCO-panoptic folder to which something was done."""
    content = write_folder(root, "train", count=count)
    change(content, root)
    write_json(root, "train", content)
    return root


def only(result: Found, name: str, words: str) -> Problem:
    """The one problem there is, with these words in its reason; the other three images are good."""
    assert list(result.problems) == [name] and len(result.good) == 3, result.problems
    assert words in result.problems[name].reason, result.problems[name].reason
    return result.problems[name]


def repaint(root: Path, change: Callable[[np.ndarray], np.ndarray | bytes], *names: str) -> None:
    """Change the ids of maps."""
    for file in sorted((root / PNGS).iterdir()):
        if not names or file.name in names:
            made = change(decode_ids(file.read_bytes()))
            file.write_bytes(made if isinstance(made, bytes) else encode_ids(made))


def segment(content: dict, image: int = 0, number: int = 0) -> dict:
    return content["annotations"][image]["segments_info"][number]


def test_01_maps_lost_by_a_count_of_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_source, "WRAPPED", 2)
    root = broken(tmp_path, lambda content, root: [(root / PNGS / f"00{k}.png").unlink() for k in (1, 2)])
    with pytest.raises(ValueError, match=r"2 of 4 id maps found .*16-bit count: unpack the zip again with unzip"):
        found(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [], "anno', "is the download complete"),
        ("version https://git-lfs.github.com/spec/v1\noid", "begins with 'version https://git-lfs.*git lfs pull"),
        ("<!DOCTYPE html><html>", "begins with '<!DOCTYPE html><html>'.*is the download complete"),
    ],
)
@pytest.mark.parametrize("name", ["annotations/panoptic_train.json", "annotations/instances_train.json"])
def test_02_no_json(tmp_path: Path, text: str, words: str, name: str) -> None:
    write_folder(tmp_path, "train", count=2)
    (tmp_path / "annotations/panoptic_train.json").unlink()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name.split('/')[1]}: .*{words}"):
        found(tmp_path)


def test_03_the_instance_form_for_the_panoptic_one(tmp_path: Path) -> None:
    entry = {"id": 1, "image_id": 100, "category_id": 3, "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 4, 0, 4, 4]]}
    root = broken(tmp_path, lambda content, root: content.update(annotations=[entry]))
    with pytest.raises(ValueError, match=r"this is the instance form.*--data.reader coco-instances"):
        found(root)
    write_folder(tmp_path / "other", "train", count=2)
    with pytest.raises(ValueError, match=r"this is the panoptic form.*--data.reader coco"):
        found(tmp_path / "other", reader="coco-instances", json_file="annotations/panoptic_train.json")


@pytest.mark.parametrize(("gone", "words"), [(f"{IMAGES}/002.jpg", "image is missing: 002.jpg was looked for in")])
def test_04_a_missing_image(tmp_path: Path, gone: str, words: str) -> None:
    only(found(broken(tmp_path, lambda content, root: (root / gone).unlink())), "002.jpg", words)


def test_04_a_missing_map_and_all_of_them(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, root: (root / PNGS / "002.png").unlink())
    only(found(root), "002.jpg", f"id map 002.png is missing: 002.png was looked for in {root / PNGS}")
    for file in (root / PNGS).iterdir():
        file.rename(file.with_name(f"map-{file.name}"))
    result = found(root)
    assert len(result.problems) == 4
    told = _refusal(result.source, result.manifest.skipped)
    assert "4 of 4 images failed" in told and "None is left" in told and str(root / PNGS) in told


@pytest.mark.parametrize("name", ["/home/anna/{}.jpg", "images\\{}.jpg", "{}.png", "{}.JPG"])
def test_05_images_under_another_name(tmp_path: Path, name: str) -> None:
    def rename(content: dict, root: Path) -> None:
        for image in content["images"]:
            image["file_name"] = name.format(image["file_name"][:3])

    result = found(broken(tmp_path, rename))
    assert len(result.good) == 4 and result.repairs == {RENAMED: 4}


def test_06_image_ids_as_text_and_as_number(tmp_path: Path) -> None:
    def as_text(content: dict, root: Path) -> None:
        for annotation in content["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])

    result = found(broken(tmp_path / "a", as_text))
    assert len(result.good) == 4 and result.repairs == {RESPELT_IDS: 4}
    with pytest.raises(ValueError, match=r"images\[0\].id is 100, annotations\[0\].image_id is '100 '"):
        found(broken(tmp_path / "b", lambda c, _: [a.update(image_id=f"{a['image_id']} ") for a in c["annotations"]]))


def test_07_annotations_of_other_images(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: content["annotations"][1].update(image_id=999))
    only(found(root), "001.png", "image id 999, which images does not list")
    assert found(root).source.unannotated == ("001.jpg",)
    with pytest.raises(ValueError, match="no annotation belongs to an image"):
        found(broken(tmp_path / "b", lambda c, _: [a.update(image_id=a["image_id"] + 9) for a in c["annotations"]]))


def test_08_images_listed_twice(tmp_path: Path) -> None:
    root = broken(tmp_path / "ids", lambda content, _: content["images"].append({"id": 101, "file_name": "x.jpg"}))
    result = found(root)
    assert "image id 101 appears 2 times ('001.jpg', 'x.jpg')" in next(iter(result.problems.values())).reason
    root = broken(tmp_path / "names", lambda content, _: content["images"].append({"id": 9, "file_name": "001.jpg"}))
    problem = only(found(root), "001.jpg", "file name appears 2 times (101, 9) in images")
    assert "join sets with --data.root A B" in problem.remedy


def test_09_a_second_annotation_of_an_image(tmp_path: Path) -> None:
    def twice(content: dict, root: Path) -> None:
        content["annotations"].append({**content["annotations"][1], "file_name": "other.png"})
        (root / PNGS / "other.png").write_bytes((root / PNGS / "001.png").read_bytes())

    problem = only(found(broken(tmp_path, twice)), "001.jpg", "second annotation")
    assert problem.remedy == "keep one annotation of each image"


def test_10_one_map_of_two_annotations(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: content["annotations"][2].update(file_name="001.png"))
    only(found(root), "002.jpg", "PNG 001.png already belongs to another image")


def test_11_width_and_height_exchanged(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: [i.update(height=WIDTH, width=HEIGHT) for i in content["images"]])
    result = found(root)
    assert len(result.good) == 4 and result.repairs == {SWAPPED: 4}


def test_12_a_map_of_another_size(tmp_path: Path) -> None:
    root = broken(tmp_path / "map", lambda content, root: repaint(root, lambda ids: ids[:-1], "001.png"))
    only(found(root), "001.jpg", "the map is 19x30 but the JSON says 20x30 (height x width)")
    small = cv2.imencode(".jpg", np.zeros((8, 9, 3), np.uint8))[1].tobytes()
    root = broken(tmp_path / "photo", lambda content, root: (root / IMAGES / "001.jpg").write_bytes(small))
    only(found(root), "001.jpg", "the map is 20x30 but the photograph 8x9, height x width")


def test_13_maps_that_were_smoothed_or_are_jpegs(tmp_path: Path) -> None:
    def lossy(ids: np.ndarray) -> bytes:
        channels = np.stack([ids * 40 & 255] * 3, -1).astype(np.uint8)
        return cv2.imencode(".jpg", channels)[1].tobytes()

    def smooth(ids: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(ids.astype(np.float32) * 70, (5, 5), 0).astype(np.int32)

    root = broken(tmp_path / "a", lambda content, root: repaint(root, lossy, "001.png"))
    only(found(root), "001.jpg", "the map is a JPEG")
    root = broken(tmp_path / "b", lambda content, root: repaint(root, smooth, "001.png"))
    only(found(root), "001.jpg", "it was saved as a JPEG, or resized smoothly")


def test_14_red_and_blue_exchanged(tmp_path: Path) -> None:
    def exchange(ids: np.ndarray) -> np.ndarray:
        return (ids & 0x00FF00) | (ids >> 16) | ((ids & 0xFF) << 16)

    result = found(broken(tmp_path / "all", lambda content, root: repaint(root, exchange)))
    assert len(result.good) == 4 and result.repairs == {id_map.BGR: 4}
    root = broken(tmp_path / "one", lambda content, root: repaint(root, exchange, "001.png"))
    only(found(root), "001.jpg", "channels of the map stand in BGR order, those of other maps in RGB")


def test_15_ids_cut_to_8_bits(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: [info.update(id=info["id"] + 512) for info in seg(content, 1)])
    only(found(root), "001.jpg", "it was saved with 8 bits")


def seg(content: dict, image: int) -> list[dict]:
    return content["annotations"][image]["segments_info"]


def test_16_maps_of_one_channel(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, root: repaint(root, lambda ids: png(ids.astype(np.uint8)), "001.png"))
    result = found(root)
    assert len(result.good) == 4 and result.repairs == {id_map.ONE_CHANNEL: 1}


def test_17_an_id_that_is_not_listed(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: seg(content, 1).pop())
    problem = only(found(root), "001.jpg", "segments in the PNG that the record does not list: 3 (50 pixels)")
    assert "--data.unlisted void" in problem.remedy
    result = found(root, unlisted="void")
    assert len(result.good) == 4 and result.repairs == {id_map.UNLISTED: 50}


def test_18_an_id_without_a_pixel(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: seg(content, 1).append({"id": 9, "category_id": 24}))
    only(found(root), "001.jpg", "segments that the record lists but the PNG does not hold: 9")


def test_19_an_id_listed_twice(tmp_path: Path) -> None:
    result = found(broken(tmp_path, lambda content, _: seg(content, 1).append({**segment(content, 1), "iscrowd": 1})))
    assert len(result.good) == 4 and result.repairs == {id_map.REPEATED: 1}


def test_20_an_id_listed_with_two_categories(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda c, _: seg(c, 1).append({**segment(c, 1), "category_id": 3}))
    only(found(root), "001.jpg", "segment 1 is listed twice, with the categories 7 and 3")


def test_21_void_listed_as_a_segment(tmp_path: Path) -> None:
    """Whatever category it has: it may be one that only stands for void."""
    root = broken(tmp_path, lambda content, _: seg(content, 1).append({"id": 0, "category_id": 0}))
    result = found(root)
    assert len(result.good) == 4 and result.repairs == {id_map.VOID_LISTED: 1}


@pytest.mark.parametrize("value", [1 << 24, -1, "one", 1.5, None])
def test_22_ids_that_are_none(tmp_path: Path, value: object) -> None:
    root = broken(tmp_path, lambda content, _: segment(content, 1).update(id=value))
    only(found(root), "001.jpg", "annotations[1].segments_info[0].id is")


def test_22_an_id_as_a_decimal_number(tmp_path: Path) -> None:
    result = found(broken(tmp_path, lambda content, _: segment(content, 1).update(id=1.0)))
    assert len(result.good) == 4 and result.repairs == {"segments_info.id given as a decimal number": 1}


def test_23_unknown_categories(tmp_path: Path) -> None:
    root = broken(tmp_path / "one", lambda content, _: segment(content, 1).update(category_id=0))
    problem = only(found(root), "001.jpg", "category_id 0 is not in the JSON's categories")
    assert "add it to categories, or take its segments out and make their pixels void" in problem.remedy

    def all_of_them(content: dict, root: Path) -> None:
        del content["annotations"][3]  # has no segment
        for image in range(3):
            segment(content, image).update(category_id=0)

    words = (
        r"panoptic_train\.json: each annotation has segments of category 0, which categories does not list \(ids of "
    )
    with pytest.raises(ValueError, match=rf"{words}categories begin at 3\); add it to categories"):
        found(broken(tmp_path / "all", all_of_them))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[1].update(id=24), "the id 24 of categories appears more than once"),
        (lambda c: c[0].pop("isthing"), r"categories\[0\] \('person'\) has no isthing"),
        (lambda c: c[0].update(isthing=2), r"categories\[0\] \('person'\).isthing is 2; it must be 0 or 1"),
        (lambda c: c.clear(), "the list of categories is empty"),
        (lambda c: c[1].update(name="Background"), "the category 'Background' has 3 segments.*--data.background"),
    ],
)
def test_24_categories_that_cannot_be_used(tmp_path: Path, change: Callable[[list], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        found(broken(tmp_path, lambda content, _: change(content["categories"])))


def test_24_a_background_without_segments_and_one_that_is_kept(tmp_path: Path) -> None:
    extra = {"id": 0, "name": "_background_", "isthing": 0}
    result = found(broken(tmp_path / "unused", lambda content, _: content["categories"].insert(0, extra)))
    assert result.source.categories == CATEGORIES and result.repairs == {UNUSED_BACKGROUND: 1}
    root = broken(tmp_path / "kept", lambda content, _: content["categories"][1].update(name="background"))
    assert found(root, background="background").source.categories.names == ("person", "background", "car")


def test_24_categories_of_one_name(tmp_path: Path) -> None:
    result = found(broken(tmp_path, lambda content, _: content["categories"][2].update(name="person")))
    assert result.source.categories.names == ("person (24)", "sky", "person (3)")
    assert len(result.good) == 4 and result.repairs == {SAME_NAME: 2}


def test_25_colours_that_are_none(tmp_path: Path) -> None:
    def recolour(content: dict, root: Path) -> None:
        content["categories"][0].update(color="red")
        content["categories"][1].update(color=[1, 2, 3, 255])
        del content["categories"][2]["color"]

    result = found(broken(tmp_path, recolour))
    assert len(result.good) == 4 and result.source.categories.colours[1] == (1, 2, 3)
    assert sum(result.repairs.values()) == 2 and all("categories.color" in kind for kind in result.repairs)


def test_26_27_28_stuff_in_parts_or_as_a_crowd_and_several_crowds(tmp_path: Path) -> None:
    def change(content: dict, root: Path) -> None:
        repaint(root, lambda ids: np.where((ids == 1) & (np.arange(WIDTH) > 9), 4, ids), "001.png")
        seg(content, 1)[0].update(iscrowd=1)
        seg(content, 1).append({"id": 4, "category_id": 7})
        seg(content, 2)[1].update(iscrowd=1)

    result = found(broken(tmp_path, change))
    assert len(result.good) == 4 and result.repairs == {STUFF_UNITED: 1, STUFF_CROWD: 1}
    assert result.manifest.warnings == {SEVERAL_CROWDS: 1, OTHER_BOXES: 1}


def test_29_areas_and_boxes_that_the_pixels_deny(tmp_path: Path) -> None:
    root = broken(tmp_path, lambda content, _: segment(content, 1).update(area=7, bbox=[0, 0, 3, 3]))
    result = found(root)
    assert len(result.good) == 4 and not result.repairs
    assert result.manifest.area_mismatches == 1 and result.manifest.warnings == {OTHER_BOXES: 1}
    assert f"1 {OTHER_BOXES}" in result.manifest.notes


def test_30_images_without_a_segment(tmp_path: Path) -> None:
    result = found(broken(tmp_path / "one", lambda content, root: None))
    assert result.manifest.empty == 1 and "1 images have no segment" in result.manifest.notes

    def clear(content: dict, root: Path) -> None:
        repaint(root, np.zeros_like)
        for annotation in content["annotations"]:
            annotation["segments_info"].clear()

    result = found(broken(tmp_path / "all", clear))
    assert "none of its 4 images has a segment; is this a test split" in _refusal(result.source, ())


SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]


def instances(root: Path, *annotations: dict, **changes: Any) -> Path:
    """One photograph of 8 x 10 and its instances."""
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 8, "width": 10}],
        "annotations": [{"id": k, "image_id": 7, "category_id": 1, **a} for k, a in enumerate(annotations, 1)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        **changes,
    }
    return put(root, {"images/a.png": photograph(8, 10), "instances.json": json.dumps(content).encode()})


def test_31_polygons_that_are_none(tmp_path: Path) -> None:
    crossing = [1, 1, 8, 6, 8, 1, 1, 6]
    polygons = [[0, 0, 1], [0, 0, 1, 1], [2, 2, 2, 2, 2, 2], [8, 6, 14, 6, 14, 12, 8, 12], crossing]
    result = found(instances(tmp_path, *({"segmentation": [polygon]} for polygon in polygons)))
    kept = {kind: result.repairs[kind] for kind in (BAD_POLYGONS, WITHOUT_PIXEL, OUTSIDE)}
    assert kept == {BAD_POLYGONS: 2, WITHOUT_PIXEL: 3, OUTSIDE: 1}
    assert result.good == ["a.png"] and result.manifest.segments == (2, 0)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ({"size": [8, 10], "counts": [3, 4]}, "annotation 1: the runs add up to 7 pixels"),
        ({"size": [10, 8], "counts": [80]}, "annotation 1: the RLE has the size [10, 8]"),
        ({"size": [8, 10], "counts": "a!"}, "is none of a compressed RLE"),
    ],
)
def test_32_run_lengths_that_do_not_fit(tmp_path: Path, mask: dict, words: str) -> None:
    result = found(instances(tmp_path, {"segmentation": mask}))
    assert words in result.problems["a.png"].reason and "export it again" in result.problems["a.png"].remedy


def test_32_runs_row_by_row(tmp_path: Path) -> None:
    rows_of = {"segmentation": {"size": [8, 10], "counts": [20, 40, 20]}, "bbox": [0, 2, 10, 1]}
    result = found(instances(tmp_path, rows_of))
    assert any("are their runs row by row?" in kind for kind in result.repairs)


def test_33_brush_masks_marked_as_crowds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    brush = {"segmentation": {"size": [8, 10], "counts": [20, 40, 20]}, "iscrowd": 1, "attributes": {"occluded": False}}
    root = instances(tmp_path, {"segmentation": [SQUARE]}, brush)
    assert found(root).manifest.crowds == 1 and "--data.crowd ignore" in caplog.text
    assert found(root, crowd="ignore").manifest.crowds == 0


def test_34_instances_that_overlap(tmp_path: Path) -> None:
    root = instances(tmp_path, {"segmentation": [SQUARE]}, {"segmentation": [[4, 1, 8, 1, 8, 4, 4, 4]]})
    result = found(root)
    assert result.repairs[CONTESTED] == 3
    assert any(f"{CONTESTED} (3.75 % of all)" in note for note in result.manifest.notes)
    problem = found(root, overlap="error").problems["a.png"]
    assert "annotation 1 and annotation 2 overlap" in problem.reason and "--data.overlap" in problem.remedy


def test_35_a_value_without_a_class(tmp_path: Path) -> None:
    root = instances(tmp_path, {"segmentation": [SQUARE]})
    classes = {"classes": [{"value": 4, "id": 5, "name": "sky", "isthing": 0}]}
    put(root, {"semantic/a.png": png(np.full((8, 10), 3, np.uint8)), "c.json": json.dumps(classes).encode()})
    result = found(root, semantic=str(root / "semantic"), semantic_classes=str(root / "c.json"))
    assert "without a class: 3 (80 pixels); do the values begin at another number" in result.problems["a.png"].reason
    assert "--data.semantic-classes" in result.problems["a.png"].remedy


def test_37_38_training_ids_and_a_split_without_labels(tmp_path: Path) -> None:
    root = put(tmp_path, CITY_FILES)
    with pytest.raises(ValueError, match=r"split test has no public labels.*jobs/predict\.py"):
        found(root, "test")
    values = np.full((4, 6), 255, np.uint16)
    values[0] = 11
    for file in root.glob("gtFine/train/*/*.png"):
        file.write_bytes(png(values))
    with pytest.raises(ValueError, match=r"the maps hold training ids.*unpack gtFine_trainvaltest\.zip again"):
        found(root)


def test_39_a_bitmask_without_alpha(tmp_path: Path) -> None:
    names = [f"bdd100k/{{}}/train/{name}" for name in "ab"]
    files = {name.format("images/10k") + ".jpg": photograph() for name in names}
    masks = [name.format("labels/pan_seg/bitmasks") + ".png" for name in names]
    flat, deep = np.full((4, 6, 3), 1, np.uint8), np.full((4, 6, 4), 1, np.uint8)
    with pytest.raises(ValueError, match=r"a\.png: needs the RGBA file"):
        found(put(tmp_path / "all", {**files, masks[0]: png(flat), masks[1]: png(flat)}))
    result = found(put(tmp_path / "one", {**files, masks[0]: png(deep), masks[1]: png(flat)}))
    assert result.good == ["a.jpg"] and "8-bit RGBA" in result.problems["b.jpg"].reason


def stored(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
PHOTOGRAPHS = {
    "none": (b"no image", "cannot be decoded"),
    "empty": (b"", "the image file is empty (0 bytes)"),
    "cut": (stored(PICTURE, "JPEG")[:-40], "the JPEG ends before its image does"),
    "CMYK": (stored(PICTURE.convert("CMYK"), "JPEG"), CMYK),
    "grey": (stored(PICTURE.convert("L"), "JPEG"), GREY),
    "16 bits": (png(np.random.default_rng(0).integers(0, 1 << 16, (HEIGHT, WIDTH, 3), np.uint16)), SIXTEEN_BITS),
    "animated": (stored(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]), ANIMATED),
}


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_40_photographs_of_all_kinds(tmp_path: Path, kind: str) -> None:
    data, words = PHOTOGRAPHS[kind]
    result = found(broken(tmp_path, lambda content, root: (root / IMAGES / "001.jpg").write_bytes(data)))
    if kind in ("none", "empty", "cut"):
        only(result, "001.jpg", words)
    else:
        assert len(result.good) == 4 and result.repairs == {words: 1}


def manifest_of(root: Path, split: str, categories: Categories = CATEGORIES) -> Manifest:
    """A set as far as the comparison of two splits reads it."""
    base = found(root, split, "coco").manifest
    return replace(base, split=split, uri=str(root / "shards" / split), categories=categories)


def test_41_photographs_of_both_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path, split, count=3)
    file = tmp_path / "images/val/001.jpg"
    file.write_bytes(cv2.imencode(".jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes())
    train, val = (manifest_of(tmp_path, split) for split in ("train", "val"))
    for manifest in (train, val):
        source = read_source("coco", tmp_path, manifest.split)
        light = source.rows.append_column("shard", pa.array([0] * 3))
        report = json.loads(write_shard(light, None, source.categories)["report"][0].as_py())
        write_keys(manifest.uri, report["photographs"])
    monkeypatch.setattr(duplicates, "list_images", lambda shards: [(f"00{k}.jpg", k) for k in range(3)])
    assert shared_photographs(val, train) == ["000.jpg", "002.jpg"] and warn_of_shared(val, train) == 2
    assert "2 photographs of split val are in split train" in caplog.text and "000.jpg, 002.jpg" in caplog.text
    assert shared_photographs(val, replace(train, uri=str(tmp_path))) == []  # prepared by an earlier version
    root = broken(
        tmp_path / "c", lambda _, r: (r / IMAGES / "001.jpg").write_bytes((r / IMAGES / "000.jpg").read_bytes())
    )
    assert found(root).manifest.warnings == {COPIES: 1}


def test_42_names_in_other_case_or_unicode_form(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "straße_ä") for form in ("NFC", "NFD"))

    def rename(content: dict, root: Path) -> None:
        (root / IMAGES / "001.jpg").rename(root / IMAGES / f"{apart}.JPG")
        (root / PNGS / "002.png").rename(root / PNGS / "ABC.PNG")
        content["images"][1]["file_name"] = f"{composed}.jpg"
        content["annotations"][2]["file_name"] = "abc.png"

    result = found(broken(tmp_path / "coco", rename))
    assert len(result.good) == 4 and result.repairs == {RENAMED: 1}
    files = {
        f"bdd100k/images/10k/train/{composed}.jpg": photograph(),
        f"bdd100k/labels/pan_seg/bitmasks/train/{apart.upper()}.png": png(np.full((4, 6, 4), 1, np.uint8)),
    }
    result = found(put(tmp_path / "bdd", files))
    assert result.good == [f"{composed}.jpg"] and result.repairs == {rows.RESPELT: 1}


def test_43_archives_that_are_damaged(tmp_path: Path) -> None:
    root = zipped(tmp_path / "crc", CITY_FILES)
    archive = root / "leftImg8bit.zip"
    with zipfile.ZipFile(archive) as file:
        member = next(m for m in file.infolist() if "/aachen_" in m.filename)
    data = bytearray(archive.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 255
    archive.write_bytes(data)
    result = found(root)
    (problem,) = result.problems.values()
    assert len(result.good) == 1 and f"{archive}!/leftImg8bit/train/aachen/" in problem.reason
    assert problem.remedy == "copy the archive again from its source"
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"leftImg8bit\.zip: is not a complete zip archive .*are all parts"):
        found(root)
    locked = zipped(tmp_path / "locked", CITY_FILES) / "leftImg8bit.zip"
    data = locked.read_bytes()
    marks = ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6))
    for mark, place in marks:
        data = mark.join(
            p if not k else p[: place - 4] + b"\1" + p[place - 3 :] for k, p in enumerate(data.split(mark))
        )
    locked.write_bytes(data)
    with pytest.raises(ValueError, match=r"leftImg8bit\.zip: .* is encrypted; unpack it with its password"):
        found(locked.parent)


def test_44_45_classes_that_differ_between_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name in another order (see test_classes); one list within the other; each with classes of its own."""
    write_folder(tmp_path, "train", count=2)
    entries = CATEGORIES.to_coco()
    train = manifest_of(tmp_path, "train")
    fewer = replace(train, split="val", segments=(0, 1, 0), categories=Categories.from_coco(entries[:2]))
    other = Categories.from_coco([*entries[:2], {**entries[2], "name": "bus"}])
    with pytest.raises(ValueError, match="only train has car; only val has bus"):
        with_equal_classes(train, replace(train, split="val", categories=other), "both", tmp_path)
    stuff = Categories.from_coco([{**entries[0], "isthing": 0}, *entries[1:]])
    with pytest.raises(ValueError, match="person are things in one and stuff in the other"):
        with_equal_classes(train, replace(train, split="val", categories=stuff), "both", tmp_path)
    same = replace(fewer, categories=train.categories)
    copies: list[Manifest] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.classes._with_classes", lambda m, counts, cache: copies.append(counts) or same)
        assert with_equal_classes(train, fewer, "both", tmp_path) == (train, same) and copies == [train]
    assert "split val has no car, which split train lists" in caplog.text


def test_46_things_without_an_instance(tmp_path: Path) -> None:
    result = found(broken(tmp_path, lambda content, root: None))
    assert "1 thing classes have no segment (car)" in result.manifest.notes[1]


def test_faults_of_joined_sets_keep_their_remedies(tmp_path: Path) -> None:
    for name in "ab":
        broken(tmp_path / name, lambda content, root: (root / IMAGES / "002.jpg").unlink())
    source = Roots.of([str(tmp_path / "a"), str(tmp_path / "b")], "coco").open("train")
    assert [problem.name for problem in source.problems] == ["a/002.jpg", "b/002.jpg"]
    assert all(problem.remedy for problem in source.problems)
