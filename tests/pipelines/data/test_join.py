"""Sources under class maps, and several joined to one: names, ids, classes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from panoptic.segmentation import Categories, Segmentation
from pipelines.config import parse
from pipelines.data import prepare as preparing
from pipelines.data.join import JOINED, Roots, absolute
from pipelines.data.readers import ReaderOptions
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.source import Source
from pipelines.data.shard_writer import write_shard
from pipelines.presets import PRESETS
from pipelines.training import driver
from tests.pipelines.data.test_class_map import as_set
from tests.support.coco_folder import write_folder, write_json
from tests.support.stored import write_shards

OTHER = [
    {"id": 1, "name": "Sky", "isthing": 0},
    {"id": 2, "name": "person", "isthing": 1},
    {"id": 3, "name": "boat", "isthing": 1},
]


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two data sets with the same file names and ids, and classes of other ids in another order."""
    write_folder(tmp_path / "a", "train", 3)
    content = write_folder(tmp_path / "b", "train", 2)
    ids = {24: 2, 7: 1}
    for annotation in content["annotations"]:
        for info in annotation["segments_info"]:
            info["category_id"] = ids[info["category_id"]]
    write_json(tmp_path / "b", "train", {**content, "categories": OTHER})
    return str(tmp_path / "a"), str(tmp_path / "b")


def labels(source: Source) -> list[list[str]]:
    """Names of the classes of each row's segments."""
    truths = [source.decode(row, read_file, source.categories) for row in source.rows.to_pylist()]
    return [[source.categories.names[label] for label in truth.segmentation.labels] for truth in truths]


def test_a_source_under_a_class_map(two: tuple[str, str], tmp_path: Path) -> None:
    text = {"version": 1, "classes": [{"name": "scene", "thing": False, "from": ["person", "sky"]}], "void": ["car"]}
    (tmp_path / "map.json").write_text(json.dumps(text))
    plain, roots = Roots.of(two[0]).open("train"), Roots.of(two[0], class_map=str(tmp_path / "map.json"))
    source = roots.open("train")
    assert source.categories.names == ("scene",) and labels(source) == [["scene"], ["scene"], []]
    assert source.rows == plain.rows and source.fingerprint != plain.fingerprint
    assert source.about["class_map"]["sets"]["a"]["targets"] == {"24": 0, "7": 0, "3": -1}
    assert roots.folder != Roots.of(two[0]).folder
    text["void"], text["rest"] = [], "void"  # says the same
    (tmp_path / "map.json").write_text(json.dumps(text))
    assert roots.open("train").fingerprint == source.fingerprint


def test_joined_sets_keep_names_and_ids_apart(two: tuple[str, str]) -> None:
    source = Roots.of(two).open("train")
    assert source.reader == JOINED and source.split == "train"
    assert source.categories.names == ("person", "sky", "car", "boat")
    assert source.categories.is_thing == (True, False, True, True)
    assert source.rows["name"].to_pylist() == ["a/000.jpg", "a/001.jpg", "a/002.jpg", "b/000.jpg", "b/001.jpg"]
    assert source.rows["image_id"].to_pylist() == [1, 2, 3, 4, 5]
    assert labels(source) == [["sky", "person", "person"]] * 2 + [[], ["sky", "person", "person"], []]
    assert [(one["name"], one["images"]) for one in source.about["sets"]] == [("a", 3), ("b", 2)]
    assert source.rows.equals(Roots.of(two).open("train").rows)
    assert (
        source.fingerprint == Roots.of(two).open("train").fingerprint != Roots.of(two[::-1]).open("train").fingerprint
    )


def test_joined_sets_say_what_each_never_annotates(two: tuple[str, str]) -> None:
    assert Roots.of(two).open("train").about["absent"] == {"a": ["boat"], "b": ["car"]}
    assert Roots.of((two[0], f"again={two[0]}")).open("train").about["absent"] == {}


def test_problems_of_a_joined_set_have_its_name(two: tuple[str, str]) -> None:
    (Path(two[1]) / "images/train/000.jpg").unlink()
    source = Roots.of(two).open("train")
    assert [problem.name for problem in source.problems] == ["b/000.jpg"]


def test_names_of_sets(two: tuple[str, str], tmp_path: Path) -> None:
    assert Roots.of([f"street={two[0]}", two[1]]).names == ("street", "b")
    with pytest.raises(ValueError, match="2 data sets are called a; name them, as a1="):
        Roots.of([two[0], two[0]]).open("train")
    assert absolute(("x=rel", "/abs")) == (f"x={Path('rel').absolute()}", "/abs")


@pytest.mark.parametrize(
    ("roots", "readers", "words"),
    [
        ((), "coco", "names 0 data sets"),
        (("a", "b"), ("coco",) * 3, "3 formats"),
        (("a",), "png", "png: unknown; there are"),
    ],
)
def test_what_does_not_fit_is_refused(roots: tuple, readers: str | tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Roots.of(roots, readers)


def test_places_and_splits_belong_to_roots(two: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--data\.json-file: cannot be given for several"):
        Roots.of(two, options=ReaderOptions(json_file="x")).open("train")
    with pytest.raises(ValueError, match="names 3 splits for 2 roots"):
        Roots.of(two).open(("train", "val", "test"))
    assert Roots.of(two).open(("train", "train")).split == "train"


def test_one_shard_of_two_sets(two: tuple[str, str], tmp_path: Path) -> None:
    source = Roots.of(two).open("train")
    rows = source.rows.append_column("shard", pa.array([0] * source.rows.num_rows))
    report = json.loads(write_shard(rows, str(tmp_path / "out"), source.categories, source.decode)["report"][0].as_py())
    assert report["rows"] == 5 and not report["problems"] and report["segments"] == [6, 3, 0, 0]


def test_a_stuff_class_that_is_a_thing_elsewhere_stops_the_join(two: tuple[str, str]) -> None:
    content = json.loads((Path(two[1]) / "annotations/panoptic_train.json").read_text())
    content["categories"][1]["isthing"] = 0
    write_json(Path(two[1]), "train", content)
    with pytest.raises(ValueError, match="person of a is thing, person of b is stuff"):
        Roots.of(two).open("train")


def test_readers_may_differ(two: tuple[str, str], shared: Callable[[str], Path]) -> None:
    root = str(shared("fixtures/datasets/cityscapes"))
    source = Roots.of([two[0], root], ("coco", "cityscapes")).open("train")
    assert source.rows.num_rows == 5 and source.rows.schema.field("image_id").type == pa.int64()
    person = source.categories.names.index("person")
    truths = [source.decode(row, read_file, source.categories).segmentation for row in source.rows.to_pylist()]
    assert sum(int((truth.labels == person).sum()) for truth in truths) == 5
    assert {name.split("/")[0] for name in source.rows["name"].to_pylist()} == {"a", "cityscapes"}
    assert len(source.categories) == 19  # all three of the first are among those of the second


def test_the_stored_result_from_the_files(shared: Callable[[str], Path]) -> None:
    root = shared("fixtures/datasets")
    source = Roots.of(root / "cityscapes", "cityscapes", str(root / "class_maps/classes.json")).open("train")
    expected = json.loads((root / "expected/class_map.json").read_text())["images"]
    rows = {row["image_id"]: row for row in source.rows.to_pylist()}
    with np.load(root / "expected/class_map.npz") as stored:
        for k, image in enumerate(expected):
            truth = source.decode(rows[image["image_id"]], read_file, source.categories).segmentation
            wanted = Segmentation(stored[f"{k}_segments"], stored[f"{k}_labels"], stored[f"{k}_crowd"])
            assert as_set(truth) == as_set(wanted)


def test_prepared_shards_are_joined_as_the_sets_they_were_made_of(
    two: tuple[str, str], tmp_path: Path, small_categories: Categories
) -> None:
    shards = write_shards(tmp_path / "c" / "train", small_categories, 5)
    manifest = json.loads((tmp_path / "c/train/manifest.json").read_text())
    manifest |= {"split": "train", "source": {"reader": "cityscapes", "absent": {"x": ["dog"]}}}
    (tmp_path / "c/train/manifest.json").write_text(json.dumps(manifest))
    source = Roots.of([two[1], str(tmp_path / "c")], ("coco", "auto")).open("train")
    names = source.categories.names
    assert names == ("Sky", "person", "boat", "car", "road", "dog") and source.rows.num_rows == 2 + 5
    assert source.rows["name"].to_pylist()[-1] == "c/4.jpg"
    assert source.about["absent"] == {"b": ["car", "road", "dog"], "c": ["boat"], "c/x": ["boat", "dog"]}
    rows = source.rows.append_column("shard", pa.array([0] * 7))
    report = json.loads(write_shard(rows, str(tmp_path / "out"), source.categories, source.decode)["report"][0].as_py())
    assert report["rows"] == 7 and not report["problems"]
    stored = preparing.read_row  # the images of the shards came through, byte by byte, with their maps
    joined = pa.ipc.open_file(str(tmp_path / "out/shard-00000.arrow")).read_all().to_pylist()[2:]
    first = pa.ipc.open_file(shards.files[0]).read_all().to_pylist()
    for a, b in zip(joined, first, strict=True):
        assert a["image"] == b["image"]
        own, theirs = stored(a).truth, stored(b).truth
        assert [names[k].lower() for k in own.labels] == [small_categories.names[k] for k in theirs.labels]
        assert (own.segments == theirs.segments).all() and (own.is_crowd() == theirs.is_crowd()).all()


def test_shards_that_cannot_be_joined(two: tuple[str, str], tmp_path: Path, small_categories: Categories) -> None:
    write_shards(tmp_path / "c" / "train", small_categories, 2)
    roots = [two[0], str(tmp_path / "c")]
    with pytest.raises(ValueError, match="these are shards of split 'val', not of 'train'"):
        Roots.of(roots).open("train")
    file = tmp_path / "c/train/manifest.json"
    manifest = {**json.loads(file.read_text()), "split": "train"}
    file.write_text(json.dumps({**manifest, "source": {"copies": {}}}))
    with pytest.raises(ValueError, match="holds augmented copies"):
        Roots.of(roots).open("train")
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"--data\.things: .*holds prepared shards, which no reader reads"):
        Roots.of(roots[1], options=ReaderOptions(things=("dog",))).open("train")
    shard = tmp_path / "c/train" / manifest["shards"][0]["path"]
    source = Roots.of(roots[1]).open("train")
    shard.write_bytes(shard.read_bytes()[:600] + b"?" + shard.read_bytes()[601:])
    with pytest.raises(ValueError, match="is not what was written; prepare these shards again"):
        labels(source)


def test_options_of_every_format_hold_for_all_roots(two: tuple[str, str]) -> None:
    source = Roots.of(two, options=ReaderOptions(merge_crowds="yes")).open("train")
    plain = Roots.of(two).open("train")
    assert source.fingerprint != plain.fingerprint and source.rows == plain.rows


def test_each_root_has_its_split_in_training(
    two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "a", "train2017", 1)
    content = json.loads((tmp_path / "b/annotations/panoptic_train.json").read_text())
    write_folder(tmp_path / "b", "val", 1)
    write_json(
        tmp_path / "b", "val", {**content, "images": content["images"][:1], "annotations": content["annotations"][:1]}
    )
    opened: list[tuple[str, Source]] = []

    def prepare(source: Source, out: str, **_: object) -> object:
        opened.append((out, source))
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "prepare", prepare)
    shards = str(tmp_path / "cache")
    words = ["demo", "--data.root", *two, "--data.train", "train2017", "train", "--data.shards", shards]
    _, experiment = parse(words, PRESETS)
    assert experiment.data.train == ("train2017", "train") and experiment.data.val == "val"
    with pytest.raises(KeyboardInterrupt):
        driver.prepare_data(experiment)
    ((out, source),) = opened
    assert out.endswith("/train2017+train") and source.split == "train2017+train"
    assert source.rows["name"].to_pylist() == ["a/000.jpg", "b/000.jpg", "b/001.jpg"]
    with pytest.raises(ValueError, match=r"2 splits \(a, b\) for one data set"):
        preparing.ensure_shards(two[0], ("a", "b"), str(tmp_path))
