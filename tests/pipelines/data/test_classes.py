"""Splits whose lists of classes differ: what is the same, what is copied, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from panoptic.segmentation import Categories
from pipelines.config import parse
from pipelines.data.classes import with_class_map, with_equal_classes
from pipelines.data.manifest import Manifest, Shard, content_hash
from pipelines.data.prepare import ensure_shards
from pipelines.data.readers.coco_panoptic import coco_panoptic
from pipelines.data.shard_index import write_index
from pipelines.data.shard_writer import Report, write_shard
from pipelines.data.verify import verify
from pipelines.presets import PRESETS
from pipelines.training.driver import prepare_data
from tests.support.coco_folder import CATEGORIES, write_folder, write_json

DOG = {"id": 99, "name": "dog", "isthing": 1}
"""A class that no image uses."""


def shards(root: Path, split: str, categories: list[dict]) -> Manifest:
    """Prepared as `prepare` does, in this process."""
    content = write_folder(root, split, count=3)
    ids = {category["name"].strip(): category["id"] for category in categories}
    names = dict(zip(CATEGORIES.ids, CATEGORIES.names, strict=True))
    for annotation in content["annotations"]:
        for info in annotation["segments_info"]:
            info["category_id"] = ids[names[info["category_id"]]]
    write_json(root, split, {**content, "categories": categories})
    source = coco_panoptic(root, split)
    rows = source.rows.append_column("shard", pa.array([0] * source.rows.num_rows))
    out = root / "shards" / split
    report = json.loads(write_shard(rows, str(out), source.categories)["report"][0].as_py())
    assert not report["problems"]
    written = (Shard(report["path"], report["rows"], report["size"], report["sha256"]),)
    index = write_index(out, [Report(**report).entries], pa.int64())
    segments = tuple(report["segments"])
    digest = content_hash(source.categories, report["digests"])
    manifest = Manifest(
        *(2, split, 3, digest, source.categories, written, index, 20, 30, segments, 2, 1, 0, (), 0, {}, {})
    )
    (out / "manifest.json").write_bytes(manifest.to_json())
    return Manifest.load(out)


def names_of_segments(manifest: Manifest) -> list[list[str]]:
    rows = pa.ipc.open_file(manifest.files[0]).read_all()["labels"].to_pylist()
    return [[manifest.categories.names[label] for label in row] for row in rows]


ENTRIES = CATEGORIES.to_coco()
EXPECTED = [["sky", "person", "person"]] * 2 + [[]]


@pytest.mark.parametrize(
    "other",
    [
        [{**entry, "color": [9, 9, 9]} for entry in ENTRIES],
        [{**entry, "id": entry["id"] + 100} for entry in ENTRIES],
        [{**entry, "name": f"{entry['name']} "} for entry in ENTRIES],
    ],
    ids=["colours", "ids", "spaces"],
)
def test_colours_and_ids_do_not_matter(tmp_path: Path, other: list[dict]) -> None:
    train, val = shards(tmp_path, "train", ENTRIES), shards(tmp_path, "val", other)
    assert with_equal_classes(train, val, "both", tmp_path / "cache") == (train, val)


def test_another_order_is_copied_into_that_of_the_training_split(tmp_path: Path) -> None:
    train, val = shards(tmp_path, "train", ENTRIES), shards(tmp_path, "val", ENTRIES[::-1])
    assert names_of_segments(val) == EXPECTED
    same, copy = with_equal_classes(train, val, "both", tmp_path / "cache")
    assert same == train and copy.categories == train.categories and copy.segments == train.segments
    assert names_of_segments(copy) == EXPECTED and copy.hash == train.hash != val.hash
    assert verify(copy.uri) == copy == with_equal_classes(train, val, "both", tmp_path / "cache")[1]
    assert pa.ipc.open_file(copy.files[0]).read_all()["image"] == pa.ipc.open_file(val.files[0]).read_all()["image"]


def test_a_class_of_one_split_is_named_with_what_to_do(tmp_path: Path) -> None:
    train, val = shards(tmp_path, "train", ENTRIES), shards(tmp_path, "val", [DOG, *ENTRIES])
    own = replace(train, categories=Categories.from_coco([*ENTRIES, {**DOG, "name": "cat"}]))
    with pytest.raises(ValueError, match=r"only train has cat; only val has dog\. .*--data\.classes-of train"):
        with_equal_classes(own, val, "both", tmp_path / "cache")
    same, copy = with_equal_classes(train, val, "train", tmp_path / "cache")
    assert same == train and copy.categories == train.categories and names_of_segments(copy) == EXPECTED
    copy, same = with_equal_classes(train, val, "val", tmp_path / "cache")
    assert same == val and copy.categories == val.categories and names_of_segments(copy) == EXPECTED
    assert copy.segments == val.segments


def test_images_that_use_a_missing_class_are_refused(tmp_path: Path) -> None:
    train, val = shards(tmp_path, "train", ENTRIES), shards(tmp_path, "val", ENTRIES)
    fewer = Categories.from_coco([entry for entry in ENTRIES if entry["name"] != "person"])
    with pytest.raises(ValueError, match=r"images of split val use classes that split train .*: person \(4 segments\)"):
        with_equal_classes(replace(train, categories=fewer), val, "train", tmp_path / "cache")


def test_a_class_of_two_kinds_is_refused(tmp_path: Path) -> None:
    train = shards(tmp_path, "train", ENTRIES)
    val = shards(tmp_path, "val", [{**entry, "isthing": 1} for entry in ENTRIES])
    with pytest.raises(ValueError, match="sky are things in one and stuff in the other; correct isthing"):
        with_equal_classes(train, val, "train", tmp_path / "cache")


def test_a_training_takes_the_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the command line to the data of the workers, without a training."""
    for split, categories in (("train", ENTRIES), ("val", [DOG, *ENTRIES])):
        shards(tmp_path, split, categories)

    def prepared(*options: str) -> tuple[Manifest, Manifest]:
        places = ["--data.root", str(tmp_path / "shards"), "--storage", str(tmp_path / "runs")]
        return prepare_data(parse(["demo", *places, *options], PRESETS)[1])

    train, val = prepared()
    assert len(train.categories) == len(val.categories) == 4
    assert "split train has no dog, which split val lists" in caplog.text
    train, val = prepared("--data.classes-of", "train")
    assert train.categories == val.categories == CATEGORIES and names_of_segments(val) == EXPECTED
    train, val = prepared("--data.classes-of", "val")
    assert len(train.categories) == len(val.categories) == 4 and names_of_segments(train) == EXPECTED


def test_prepared_shards_under_a_class_map(tmp_path: Path) -> None:
    val = shards(tmp_path, "val", ENTRIES)
    text = {"version": 1, "classes": [{"name": "scene", "from": ["sky"]}, {"name": "human", "from": ["person"]}]}
    (tmp_path / "map.json").write_text(json.dumps({**text, "void": ["car"], "crowd_to_void": ["person"]}))
    mapped = with_class_map(val, str(tmp_path / "map.json"), tmp_path / "cache")
    assert names_of_segments(mapped) == [["scene", "human"]] * 2 + [[]]
    assert mapped.segments == (2, 2) and mapped.crowds == 0 and mapped.empty == 1 and val.crowds == 2
    assert mapped.source["class_map"]["file"] == str(tmp_path / "map.json")
    assert verify(mapped.uri) == mapped == with_class_map(val, str(tmp_path / "map.json"), tmp_path / "cache")
    assert ensure_shards(val.uri, "val", tmp_path / "cache", class_map=str(tmp_path / "map.json")) == mapped
    assert not any("have no segment:" in note for note in val.notes + mapped.notes)
    (tmp_path / "kept.json").write_text(json.dumps({**text, "rest": "keep"}))
    kept = with_class_map(val, str(tmp_path / "kept.json"), tmp_path / "cache")
    assert "1 classes of the class map have no segment: car" in kept.notes
    with pytest.raises(ValueError, match="is car meant"):
        (tmp_path / "map.json").write_text(json.dumps({**text, "void": ["cars"]}))
        with_class_map(val, str(tmp_path / "map.json"), tmp_path / "cache")
