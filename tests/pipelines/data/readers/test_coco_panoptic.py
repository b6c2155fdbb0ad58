"""Reading COCO-panoptic folders: where files are looked for, and what is wrong before a pixel is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.readers import READERS, coco_source
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.coco_source import RENAMED, RESPELT_IDS
from pipelines.data.readers.source import Source
from tests.support.coco_folder import CATEGORIES, write_folder, write_json


def reasons(source: Source) -> dict[str, str]:
    return {problem.name: problem.reason for problem in source.problems}


def test_rows(tmp_path: Path) -> None:
    write_folder(tmp_path, "val", count=3)
    source = READERS["coco"](tmp_path, "val")
    assert source.categories == CATEGORIES
    row = source.rows.to_pylist()[1]
    assert Path(row.pop("image")) == tmp_path / "images/val/001.jpg"
    assert Path(row.pop("png")) == tmp_path / "annotations/panoptic_val/001.png"
    assert len(json.loads(row.pop("record"))["segments_info"]) == 3
    assert row == {"name": "001.jpg", "height": 20, "width": 30, "image_id": 101}
    assert not source.problems and not source.unannotated
    files = [*(tmp_path / "images/val").iterdir(), *(tmp_path / "annotations/panoptic_val").iterdir()]
    assert source.bytes == sum(file.stat().st_size for file in files)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write_folder(tmp_path, "val", count=2)
    before = coco_panoptic(tmp_path, "val").fingerprint
    assert coco_panoptic(tmp_path, "val").fingerprint == before
    (tmp_path / "images/val/000.jpg").write_bytes(b"other")
    assert coco_panoptic(tmp_path, "val").fingerprint != before


def test_a_subset_shares_the_files_of_its_split(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=3)
    write_json(tmp_path, "val_novel", {**content, "annotations": content["annotations"][1:2]})
    source = coco_panoptic(tmp_path, "val_novel")
    assert source.rows["name"].to_pylist() == ["001.jpg"]
    assert source.unannotated == ("000.jpg", "002.jpg")


def test_layout_of_coco_itself(tmp_path: Path) -> None:
    write_folder(tmp_path, "val2017", count=2)
    shutil.move(tmp_path / "images" / "val2017", tmp_path / "val2017")
    assert Path(coco_panoptic(tmp_path, "val2017").rows["image"][0].as_py()).parent == tmp_path / "val2017"


def test_places_given(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "val", count=2)
    shutil.move(tmp_path / "a/images/val", tmp_path / "photographs")
    shutil.move(tmp_path / "a/annotations/panoptic_val", tmp_path / "maps")
    shutil.move(tmp_path / "a/annotations/panoptic_val.json", tmp_path / "all.json")
    source = coco_panoptic(
        tmp_path, "x", json_file=tmp_path / "all.json", pngs=tmp_path / "maps", images=tmp_path / "photographs"
    )
    assert source.rows.num_rows == 2 and not source.problems


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "annotations/panoptic_val.json",
            r"no annotation file; looked for(.|\n)*panoptic_val\.json(.|\n)*json-file",
        ),
        ("annotations/panoptic_val", r"no folder of PNG id maps(.|\n)*annotations/panoptic_val\n(.|\n)*--data.pngs"),
        ("images", r"no folder of images(.|\n)*images/val\n(.|\n)*--data.images"),
    ],
)
def test_missing_places_name_what_was_looked_for(tmp_path: Path, gone: str, message: str) -> None:
    write_folder(tmp_path / "set", "val", count=1)
    shutil.move(tmp_path / "set" / gone, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=message):
        coco_panoptic(tmp_path / "set", "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "has no categories"),
        (lambda content: content["images"][1].pop("file_name"), r"images\[1\] has no file_name"),
        (lambda content: content["annotations"][0].pop("image_id"), r"annotations\[0\] has no image_id"),
        (lambda content: content["categories"][0].pop("isthing"), "has no isthing"),
        (lambda content: content["images"][0].update(id="one"), "mixes numbers and text"),
    ],
)
def test_broken_json(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    content = write_folder(tmp_path, "val", count=2)
    change(content)
    if "mixes" in message:
        content["annotations"][0]["image_id"] = "one"
    write_json(tmp_path, "val", content)
    with pytest.raises(ValueError, match=rf"panoptic_val\.json: .*{message}"):
        coco_panoptic(tmp_path, "val")


def test_cut_json(tmp_path: Path) -> None:
    write_folder(tmp_path, "val", count=1)
    file = tmp_path / "annotations/panoptic_val.json"
    file.write_text(file.read_text()[:-10])
    with pytest.raises(ValueError, match="not valid JSON"):
        coco_panoptic(tmp_path, "val")


def test_ids_as_text_where_they_are_numbers(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=3)
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert source.rows.num_rows == 3 and source.repairs == {RESPELT_IDS: 3}
    for annotation in content["annotations"]:
        annotation["image_id"] += "x"
    write_json(tmp_path, "val", content)
    with pytest.raises(ValueError, match=r"images\[0\].id is 100, annotations\[0\].image_id is '100x'"):
        coco_panoptic(tmp_path, "val")


def test_the_instance_form_is_told_with_the_reader_for_it(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    content["annotations"] = [{"id": 1, "image_id": 100, "category_id": 3, "bbox": [0, 0, 1, 1], "segmentation": []}]
    write_json(tmp_path, "val", content)
    with pytest.raises(
        ValueError, match=r"panoptic_val\.json: this is the instance form.*--data.reader coco-instances"
    ):
        coco_panoptic(tmp_path, "val")


def test_things_can_be_named(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    for category in content["categories"]:
        del category["isthing"]
    write_json(tmp_path, "val", content)
    with pytest.raises(ValueError, match=r"name them with --data.things, of person, sky, car"):
        coco_panoptic(tmp_path, "val")
    with pytest.raises(ValueError, match=r"--data.things cat: .* has no such class; it has person, sky, car"):
        coco_panoptic(tmp_path, "val", things=("cat",))
    assert coco_panoptic(tmp_path, "val", things=("person", "car")).categories == CATEGORIES


def test_maps_lost_by_the_count_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "val", count=4)
    for k in (1, 2):
        (tmp_path / f"annotations/panoptic_val/00{k}.png").unlink()
    monkeypatch.setattr(coco_source, "WRAPPED", 2)
    with pytest.raises(ValueError, match=r"2 of 4 id maps found in .*; this is what is left when an unpacker stops"):
        coco_panoptic(tmp_path, "val")


def test_a_json_may_be_the_root(tmp_path: Path) -> None:
    write_folder(tmp_path, "val", count=2)
    source = coco_panoptic(tmp_path / "annotations/panoptic_val.json", "val", images=tmp_path / "images/val")
    assert source.rows.num_rows == 2


def test_partial_download(tmp_path: Path) -> None:
    write_folder(tmp_path, "val", count=4)
    (tmp_path / "images/val/001.jpg").unlink()
    (tmp_path / "annotations/panoptic_val/002.png").unlink()
    source = coco_panoptic(tmp_path, "val")
    assert source.rows["name"].to_pylist() == ["000.jpg", "003.jpg"]
    found = reasons(source)
    assert set(found) == {"001.jpg", "002.jpg"}
    assert "image is missing" in found["001.jpg"] and "002.png is missing" in found["002.jpg"]


@pytest.mark.parametrize(
    "written", ["images/{}", "images\\train\\{}", "http://host/{}", "/home/anna/{}", "{stem}.png", "{stem}.JPG"]
)
def test_images_are_found_by_the_name_of_the_file_alone(tmp_path: Path, written: str) -> None:
    content = write_folder(tmp_path, "val", count=3)
    for image in content["images"]:
        image["file_name"] = written.format(image["file_name"], stem=image["file_name"][:3])
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert source.rows["name"].to_pylist() == ["000.jpg", "001.jpg", "002.jpg"] and not source.problems
    assert source.repairs == {RENAMED: 3}


def test_missing_images_say_where_they_were_looked_for_and_what_is_there(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=3)
    for image in content["images"]:
        image["file_name"] += ".png"
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert not source.rows.num_rows and len(source.problems) == 3
    where = f"000.jpg.png was looked for in {tmp_path}/images/val, which holds 000.jpg"
    assert where in reasons(source)["000.jpg.png"]


def test_missing_maps_say_where_they_were_looked_for_and_what_is_there(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    content["annotations"][0]["file_name"] = "000_map.png"
    write_json(tmp_path, "val", content)
    folder = tmp_path / "annotations/panoptic_val"
    assert (
        f"000_map.png was looked for in {folder}, which holds 000.png"
        in coco_panoptic(tmp_path, "val").problems[0].reason
    )
    for file in folder.iterdir():
        file.unlink()
    assert f"looked for in {folder}, which is empty" in coco_panoptic(tmp_path, "val").problems[0].reason


def test_problems_in_the_json(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=8)
    content["annotations"][0]["image_id"] = 999
    content["annotations"][1]["segments_info"][0]["category_id"] = 77
    content["images"][3]["file_name"] = "002.jpg"
    content["annotations"].append({**content["annotations"][4], "file_name": "again.png"})
    content["annotations"][6]["file_name"] = "005.png"
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert source.rows["name"].to_pylist() == ["005.jpg", "007.jpg"]
    assert source.unannotated == ("000.jpg",)
    found = reasons(source)
    assert "image id 999, which images does not list" in found["000.png"]
    assert "category_id 77" in found["001.jpg"]
    assert "appears 2 times" in found["002.jpg"]
    assert "second annotation" in found["004.jpg"]
    assert "005.png already belongs" in found["006.jpg"]
    assert len(source.problems) == 6


def test_image_ids_that_appear_twice(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    content["images"][1]["id"] = 100
    content["annotations"][1]["image_id"] = 100
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert not source.rows.num_rows
    assert "image id 100 appears 2 times ('000.jpg', '001.jpg') in images" in source.problems[0].reason


def test_repairs_are_counted_and_change_the_fingerprint(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    plain = coco_panoptic(tmp_path, "val")
    assert not plain.repairs
    for category in content["categories"]:
        category["isthing"] = str(category["isthing"])
    content["images"][1].update(height="20", width=30.0)
    content["annotations"][1]["image_id"] = 101.0
    for info in content["annotations"][0]["segments_info"]:
        info.update(iscrowd=str(info["iscrowd"]), id=float(info["id"]), category_id=str(info["category_id"]))
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert source.categories == plain.categories and not source.problems
    assert source.rows.drop_columns("record") == plain.rows.drop_columns("record")
    for record, expected in zip(source.rows["record"].to_pylist(), plain.rows["record"].to_pylist(), strict=True):
        assert json.loads(record) == json.loads(expected)
    assert source.repairs == {
        "categories.isthing given as text": 3,
        "images.height given as text": 1,
        "images.width given as a decimal number": 1,
        "annotations.image_id given as a decimal number": 1,
        "segments_info.iscrowd given as text": 3,
        "segments_info.id given as a decimal number": 3,
        "segments_info.category_id given as text": 3,
    }
    assert source.fingerprint != plain.fingerprint


def test_wrong_segments_concern_their_image_alone(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=5)
    content["annotations"][0]["segments_info"] = None
    content["annotations"][1]["segments_info"][1]["id"] = -1
    content["annotations"][2]["segments_info"][2].update(category_id=[7], iscrowd="no")
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    assert source.rows["name"].to_pylist() == ["003.jpg", "004.jpg"]
    found = reasons(source)
    assert found["000.jpg"] == "annotations[0].segments_info is null; it must be the list of the image's segments"
    assert found["001.jpg"].startswith("annotations[1].segments_info[1].id is -1; it must be a whole number from 0")
    assert "annotations[2].segments_info[2].category_id is [7]; it must be the id of a category" in found["002.jpg"]
    assert "annotations[2].segments_info[2].iscrowd is 'no'; it must be 0 or 1" in found["002.jpg"]


def test_ids_of_text(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=2)
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        image["id"] = annotation["image_id"] = f"aachen_{image['id']}"
    write_json(tmp_path, "val", content)
    assert coco_panoptic(tmp_path, "val").rows["image_id"].to_pylist() == ["aachen_100", "aachen_101"]


def test_the_json_of_cityscapes_own_converter(tmp_path: Path) -> None:
    """Its ids are text, and its names of images (..._gtFine_leftImg8bit.png) are those of no file."""
    content = write_folder(tmp_path, "val", count=2)
    for k, (image, annotation) in enumerate(zip(content["images"], content["annotations"], strict=True)):
        key = f"frankfurt_000000_00029{k}"
        (tmp_path / "images/val" / f"{k:03d}.jpg").rename(tmp_path / "images/val" / f"{key}_leftImg8bit.png")
        (tmp_path / "annotations/panoptic_val" / f"{k:03d}.png").rename(
            tmp_path / "annotations/panoptic_val" / f"{key}_gtFine_panoptic.png"
        )
        image.update(id=key, file_name=f"{key}_gtFine_leftImg8bit.png")
        annotation.update(image_id=key, file_name=f"{key}_gtFine_panoptic.png")
    write_json(tmp_path, "val", content)
    source = coco_panoptic(tmp_path, "val")
    found = reasons(source)
    if source.rows.num_rows:  # read by the name that was meant
        assert source.rows["image_id"].to_pylist() == [f"frankfurt_000000_00029{k}" for k in range(2)]
        return
    assert list(found) == [f"frankfurt_000000_00029{k}_gtFine_leftImg8bit.png" for k in range(2)]
    for reason in found.values():
        assert "was looked for in" in reason and "_leftImg8bit.png" in reason and "\n" not in reason


def test_real_folders(shared: Callable[[str], Path]) -> None:
    root = shared("data/pedestrians")
    counts = {split: coco_panoptic(root, split) for split in ("train", "val", "val_novel")}
    assert [source.rows.num_rows for source in counts.values()] == [485, 127, 58]
    assert not any(source.problems for source in counts.values())
    sample = coco_panoptic(shared("data/coco_sample"), "sample")
    assert len(sample.categories) == 133 and sample.rows.num_rows == 4 and not sample.problems
