"""Repairs in the manifest, the table of problems, and sets of which nothing is left; no image is read here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.manifest import Manifest, problem_table
from pipelines.data.prepare import prepare
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.readers.source import Problem
from tests.support.coco_folder import write_folder, write_json
from tests.support.shards import change_manifest, write_shards


def test_a_set_without_a_valid_image_ends_in_its_table(tmp_path: Path) -> None:
    content = write_folder(tmp_path / "data", "val", count=3)
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace(".jpg", "x.jpg")
    write_json(tmp_path / "data", "val", content)
    with pytest.raises(ValueError, match=r"3 of 3 images failed validation(.|\n)*which holds 000\.jpg") as caught:
        prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and "--data.images" in lines[-1]


def test_an_empty_split_says_so(tmp_path: Path) -> None:
    content = write_folder(tmp_path / "data", "val", count=1)
    write_json(tmp_path / "data", "val", {**content, "images": [], "annotations": []})
    with pytest.raises(ValueError, match=r"split val of .*: the annotations hold no annotated image; check the split"):
        prepare(coco_panoptic(tmp_path / "data", "val"), tmp_path / "out")


def test_repairs_are_kept_and_printed_and_older_manifests_have_none(tmp_path: Path) -> None:
    kind = "categories.isthing given as text"
    folder = write_shards(tmp_path)
    assert Manifest.load(folder).repairs == {}
    change_manifest(folder, lambda content: content.update(repairs={kind: 3}))
    manifest = Manifest.load(folder)
    assert manifest.repairs == {kind: 3} and f"note: repaired 3 times: {kind}" in manifest.summary()
    change_manifest(folder, lambda content: content.pop("repairs"))
    assert Manifest.load(folder).repairs == {}


def test_a_problem_is_one_line_of_the_table() -> None:
    table = problem_table([Problem("a.jpg", "cannot be read:\n  error\n"), Problem("b" * 300, "is missing")])
    head = f"  file{' ' * 56}  problem\n"
    assert table == f"{head}  a.jpg{' ' * 55}  cannot be read: error\n  {'b' * 300}  is missing"
    table = problem_table([Problem("a.jpg", "is cut", "copy it\nagain")] * 3, limit=1)
    assert table == "  file   problem\n  a.jpg  is cut → copy it again\n  and 2 more"


def test_remedies_are_kept_and_older_manifests_have_none(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    listed = [{"name": "a.jpg", "reason": "is cut"}, {"name": "b.jpg", "reason": "is cut", "remedy": "copy it again"}]
    change_manifest(folder, lambda content: content.update(skipped=listed))
    skipped = Manifest.load(folder).skipped
    assert skipped == (Problem("a.jpg", "is cut"), Problem("b.jpg", "is cut", "copy it again"))
