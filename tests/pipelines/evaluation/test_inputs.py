"""Images to predict have a name and an id of their own, whatever the files are called."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.manifest import Manifest
from pipelines.evaluation.inputs import photographs, rows, stems


def folder(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def ids(root: str, images_json: str = "") -> dict[str, int | str]:
    return {image.file_name: image.image_id for image in photographs(root, images_json)}


def listed(file: Path, *entries: tuple[int | str, str]) -> str:
    file.write_text(json.dumps({"images": [{"id": key, "file_name": name} for key, name in entries]}))
    return str(file)


def test_no_two_images_are_written_under_one_name(tmp_path: Path) -> None:
    root = folder(tmp_path, "a.jpg", "a.png", "a_jpg.png", "b.jpg", "v1.0/b.jpg", "v1.0/b.png")
    found = {image.file_name: image.stem for image in photographs(root)}
    assert found == {
        "a.jpg": "a_jpg_2",  # a_jpg is a_jpg.png
        "a.png": "a_png",
        "a_jpg.png": "a_jpg",
        "b.jpg": "b",
        "v1.0/b.jpg": "v1.0/b_jpg",
        "v1.0/b.png": "v1.0/b_png",
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("a_j.1/", min_size=1, max_size=6).map(lambda text: f"{text.strip('/.')}x.j"), max_size=8))
def test_names_are_unique_and_follow_from_the_names_alone(names: list[str]) -> None:
    names = [name.replace("//", "/").replace("..", ".") for name in names]
    found = stems(names)
    assert len(set(found)) == len(names) and stems(names) == found


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "..\\x.jpg", "", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"lead out of the folder of the predictions: '.*'; rename") as caught:
        stems(["good.jpg", name])
    assert repr(name) in str(caught.value) and "good" not in str(caught.value)


def test_numbers_are_ids_where_every_name_is_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", "000000000139.jpg", "below/000000000285.jpg")
    assert ids(root) == {"000000000139.jpg": 139, "below/000000000285.jpg": 285}
    assert ids(folder(tmp_path / "a", "more.jpg")) == {
        "000000000139.jpg": 1,
        "below/000000000285.jpg": 2,
        "more.jpg": 3,
    }
    assert ids(folder(tmp_path / "b", "7.jpg", "007.jpg")) == {"007.jpg": 1, "7.jpg": 2}  # one number, two images
    assert ids(folder(tmp_path / "c", "7.jpg", "٣.jpg")) == {"7.jpg": 1, "٣.jpg": 2}


def test_a_json_gives_the_ids_and_says_which_are_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder(tmp_path / "test2017", "000000000001.jpg", "000000000016.jpg", "other.jpg")
    file = listed(tmp_path / "image_info.json", (1001, "000000000001.jpg"), ("two", "other.jpg"), (5, "gone.jpg"))
    with caplog.at_level(logging.INFO, "pipelines.evaluation.inputs"):
        assert ids(root, file) == {"000000000001.jpg": 1001, "other.jpg": "two"}
    assert "1 of its images are not there, the ids [5]" in caplog.text and "2 of 3 photographs are in" in caplog.text
    assert ids(str(tmp_path), file) == {"test2017/000000000001.jpg": 1001, "test2017/other.jpg": "two"}
    assert ids(str(tmp_path / "test2017" / "other.jpg"), file) == {"other.jpg": "two"}


def test_a_json_by_the_last_part_of_a_name_only_where_it_is_one_image(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    file = listed(tmp_path / "images.json", (10, "b/1.jpg"), (11, "1.jpg"), (12, "2.jpg"))
    assert ids(root, file) == {"b/1.jpg": 10, "b/2.jpg": 12}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON with COCO's images"),
        ('{"annotations": []}', "no JSON with COCO's images"),
        ('{"images": [{"id": 1}]}', "no JSON with COCO's images"),
        ('{"images": [{"id": [1], "file_name": "a.jpg"}]}', "no JSON with COCO's images"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]}', "more than once"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]}', "more than once"),
        ('{"images": [{"id": 1, "file_name": "b.jpg"}]}', r"lists none of the photographs, such as a\.jpg"),
    ],
)
def test_jsons_that_say_nothing(tmp_path: Path, content: str, message: str) -> None:
    root = folder(tmp_path / "photos", "a.jpg")
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        photographs(root, str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=r"--images-json .*none\.json: no such file"):
        photographs(root, str(tmp_path / "none.json"))


def shards(root: Path, names: list[str]) -> Manifest:
    from tests.support.coco_folder import CATEGORIES
    from tests.support.shards import store

    row = {"image": b"", "segments": b"", "labels": [], "crowd": [], "height": 1, "width": 1}
    rows = [{**row, "name": name, "image_id": 10 + k} for k, name in enumerate(names)]
    stored, index = store(root, [rows])
    empty = Manifest(0, "val", 0, "", CATEGORIES, (), "", 0, 0, (0, 0, 0), 0, 0, 0, (), 0, {})
    return Manifest(**{**vars(empty), "shards": stored, "index": index, "uri": str(root)})


def test_rows_of_shards_have_names_of_their_own_too(tmp_path: Path) -> None:
    found = rows(shards(tmp_path, ["a.jpg", "a.png", "b/c.jpg"]))
    assert [(image.stem, image.image_id, image.row) for image in found] == [
        ("a_jpg", 10, 0),
        ("a_png", 11, 1),
        ("b/c", 12, 2),
    ]
    with pytest.raises(ValueError, match=r"lead out of the folder of the predictions: '\.\./x\.jpg'"):
        rows(shards(tmp_path, ["a.jpg", "../x.jpg"]))


def test_places_without_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        photographs(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"no photograph there; looked for \.jpg"):
        photographs(str(tmp_path))


def test_names_that_no_file_can_have_beside_others_are_changed() -> None:
    """A folder may be called as a file that is written, and a name may be too long with what is added to it."""
    found = stems(["a.jpg", "a.png/b.jpg", "c.jpg", "c_labelIds.png/d.jpg", "..jpg", "x" * 250 + ".jpg", ".jpg"])
    assert found[:4] == ["a_jpg", "a.png/b", "c_jpg", "c_labelIds.png/d"]
    assert len(found[5]) < 200 and len(set(found)) == len(found)
