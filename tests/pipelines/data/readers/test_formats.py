"""The formats on trees that are drawn here: their rules, values that they do not have, and files that are missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from panoptic.classes import classes, table
from panoptic.png import encode_ids
from panoptic.segmentation import Categories, Segmentation
from pipelines.data.readers import READERS, read_source
from pipelines.data.readers.ade20k import from_maps
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.bdd100k import from_bitmask
from pipelines.data.readers.cityscapes import from_instance_ids
from pipelines.data.readers.cityscapes_vps import _by_training_ids, from_training_ids
from pipelines.data.readers.coconut import UNLISTED_IMAGES
from pipelines.data.readers.kitti_step import categories as kitti_categories
from pipelines.data.readers.kitti_step import from_panoptic_map
from pipelines.data.readers.mapillary import from_instance_map
from pipelines.data.shard_writer import write_shard
from tests.support.trees import CITY_FILES, photograph, png, put, zipped

CITY, ADE, BDD = classes("cityscapes"), classes("ade20k"), classes("bdd100k")


def named(truth: Segmentation, categories: Categories) -> dict[str, list[tuple[int, bool]]]:
    """Pixels and crowd of the segments of each class."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for label, area, crowd in zip(
        truth.labels.tolist(), truth.areas().tolist(), truth.is_crowd().tolist(), strict=True
    ):
        found.setdefault(categories.names[label], []).append((area, crowd))
    return found


def row_of_pixels(*values: int) -> np.ndarray:
    return np.array([values], np.int32)


def test_cityscapes_values() -> None:
    values = row_of_pixels(7, 7, 11, 26, 26001, 26001, 26002, 29003, 15, 0, 255, 65535, 7)
    truth = from_instance_ids(values, CITY)
    assert named(truth, CITY) == {
        "road": [(3, False)],
        "building": [(1, False)],
        "car": [(1, True), (2, False), (1, False)],
    }
    assert (truth.segments == 0).sum() == 5  # caravans and bridges are not evaluated, licence plates have no class
    for wrong, words in ((34, r"no label id of Cityscapes .*: 34 \(1 pixel\)"), (11001, "are these training ids")):
        with pytest.raises(ValueError, match=words):
            from_instance_ids(row_of_pixels(7, wrong), CITY)


def test_mapillary_values() -> None:
    categories = Categories(("Bird", "Sky"), (True, False), (1, 3), ((0, 0, 0), (1, 1, 1)))
    values = row_of_pixels(0, 1, 1, 256, 512, 513, 513)  # label 1 is not evaluated
    truth = from_instance_map(values, categories, 3)
    assert named(truth, categories) == {"Bird": [(1, False), (2, False)], "Sky": [(3, False)]}
    with pytest.raises(ValueError, match=r"768 \(1 pixel\); is the config of the same version"):
        from_instance_map(row_of_pixels(768), categories, 3)


def test_bdd100k_values() -> None:
    rows = [(0, 0, 0, 0), (1, 0, 0, 1), (1, 2, 0, 1), (35, 0, 1, 4), (35, 4, 1, 4), (35, 2, 0, 31), (35, 1, 0, 32)]
    truth = from_bitmask(np.array([rows], np.uint8), BDD)
    car = BDD.names[BDD.ids.index(35)]
    assert named(truth, BDD)[BDD.names[0]] == [(2, False)]  # stuff is one segment, whatever its flags
    # instance 260 twice, as it is occluded in one part; then a crowd and an ignored one
    assert sorted(named(truth, BDD)[car]) == [(1, False), (1, False), (1, True), (1, True)]
    with pytest.raises(ValueError, match=r"classes that BDD100K does not have .*: 41"):
        from_bitmask(np.array([[(41, 0, 0, 1)]], np.uint8), BDD)


def test_kitti_step_values() -> None:
    classes_of = kitti_categories()
    rows = [(0, 0, 0), (0, 1, 2), (255, 0, 0), (13, 0, 0), (13, 1, 2), (13, 0, 1), (18, 0, 3), (18, 0, 4)]
    truth = from_panoptic_map(np.array([rows], np.uint8), classes_of)
    assert named(truth, classes_of) == {
        "road": [(2, False)],
        "car": [(1, True), (1, False), (1, False)],
        "bicycle": [(2, False)],
    }
    with pytest.raises(ValueError, match=r"does not have .*: 19 \(1 pixel\)"):
        from_panoptic_map(np.array([[(19, 0, 0)]], np.uint8), classes_of)


def coconut_json() -> dict:
    infos = [{"id": 1, "category_id": 3, "isthing": 1}, {"id": 2, "category_id": 187, "isthing": 0}]
    annotations = [
        {"image_id": 7, "file_name": "000000000007.png", "segments_info": infos},
        {"image_id": 900, "file_name": "objects365_v2_00000900.png", "segments_info": infos},
    ]
    images = [
        {"id": 7, "file_name": "000000000007.jpg", "height": 4, "width": 6},
        {"id": 900, "file_name": "objects365_v2_00000900.jpg", "height": 4, "width": 6},
    ]
    categories = [{k: v for k, v in entry.items() if k != "color"} for entry in table("coco")["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize(
    ("split", "masks", "lacking"),
    [
        ("coconut_s", "coconut_s/panoptic", ()),
        ("coconut_val", "coconut_val/coconut_val", ()),
        ("coconut_large", "panoptic_object365", ()),
        ("coconut_xlarge", "coconuts_xlarge/panseg", ("images", "categories")),
    ],
)
def test_coconut_as_json_and_pngs(split: str, masks: str, lacking: tuple[str, ...], tmp_path: Path) -> None:
    content = {key: value for key, value in coconut_json().items() if key not in lacking}
    ids = np.array([[1] * 6, [2] * 6, [1] * 6, [0] * 6], np.int32)
    names = ("000000000007", "objects365_v2_00000900")
    files = {f"{masks}/{name}.png": encode_ids(ids) for name in names}
    files |= {f"train2017/{names[0]}.jpg": photograph(), f"objects365/{names[1]}.jpg": photograph()}
    put(tmp_path, {**files, f"annotations/annotations/{split}_panoptic.json": json.dumps(content).encode()})
    source = read_source("auto", tmp_path, split, {})
    assert source.reader == "coconut" and not source.problems and source.rows["image_id"].to_pylist() == [7, 900]
    assert source.repairs.get(UNLISTED_IMAGES, 0) == (2 if lacking else 0)
    for row in source.rows.to_pylist():
        truth = source.decode(row, read_file, source.categories).segmentation
        assert named(truth, source.categories) == {"car": [(12, False)], "sky-other-merged": [(6, False)]}


def test_coconut_rows_without_images_and_flags(tmp_path: Path) -> None:
    infos = [{"id": 1, "category_id": 3, "iscrowd": None}, {"id": 2, "category_id": 187, "iscrowd": 0}]
    record = {"file_name": "000000000007.png", "image_id": 7, "segments_info": infos}
    mask = {"bytes": encode_ids(np.array([[1, 2]], np.int32)), "path": "x"}
    put(tmp_path, {"unlabeled2017/000000000007.jpg": photograph(1, 2)})
    (tmp_path / "data").mkdir()
    rows = pa.table({"mask": [mask], "segments_info": [record], "image_info": [None]})
    pq.write_table(rows, tmp_path / "data/train-00000-of-00003.parquet")
    source = read_source("auto", tmp_path, "train", {})
    (row,) = source.rows.to_pylist()
    truth = source.decode(row, read_file, source.categories).segmentation
    assert source.reader == "coconut" and row["image_id"] == 7
    assert named(truth, source.categories) == {"car": [(1, False)], "sky-other-merged": [(1, False)]}
    with pytest.raises(ValueError, match="no JSON or Parquet file of COCONut; looked for"):
        READERS["coconut"](put(tmp_path / "other", {"a.txt": b""}), "coconut_s")


MOTS_MAP = np.zeros((4, 6, 3), np.uint8)
MOTS_MAP[0], MOTS_MAP[1], MOTS_MAP[2, :3] = (4, 0, 0), (4, 1, 2), (4, 0, 7)
MOTS_MAP[3] = (255, 0, 0)


@pytest.mark.parametrize("tree", ["images/train/0002/000001.jpg", "MOTS/train/MOTS20-02/img1/000001.jpg"])
def test_motchallenge_step(tree: str, tmp_path: Path) -> None:
    maps = {f"motchallenge-step/panoptic_maps/train/{name}/000001.png": png(MOTS_MAP) for name in ("0002", "0009")}
    others = {tree.replace("0002", "0009").replace("-02", "-09"): photograph()}
    root = put(tmp_path, {**maps, tree: photograph(), **others})
    source = read_source("auto", root, "train", {})
    assert source.reader == "motchallenge-step" and len(source.categories) == 7
    assert source.rows["name"].to_pylist() == ["0002/000001.jpg", "0009/000001.jpg"]
    truth = source.decode(source.rows.to_pylist()[0], read_file, source.categories).segmentation
    found = named(truth, source.categories)
    assert found == {"sidewalk": [(3, False)], "person": [(6, True), (3, False), (6, False)]}
    if tree.startswith("images"):  # whose maps would mean other classes under the other reader
        with pytest.raises(ValueError, match=r"0002, 0009 over JPEGs.* use --data.reader motchallenge-step"):
            read_source("kitti-step", root, "train", {})


def test_values_of_cityscapes_dvps() -> None:
    classes_of = _by_training_ids()
    truth = from_training_ids(row_of_pixels(0, 1, 32000, 13000, 13001, 13002, 13002), classes_of)
    assert named(truth, classes_of) == {"road": [(2, False)], "car": [(1, True), (1, False), (2, False)]}
    with pytest.raises(ValueError, match=r"values of no class .*: 19000"):
        from_training_ids(row_of_pixels(19000), classes_of)


def test_ade20k_values() -> None:
    bed = 8  # the first of the 100 instance classes
    semantic = row_of_pixels(1, 1, 1, 0, bed, bed, 150, 2)
    numbered = np.zeros((1, 8, 3), np.uint8)
    numbered[0, 1], numbered[0, 4], numbered[0, 7] = (1, 5, 0), (1, 2, 9), (2, 3, 0)
    truth = from_maps(semantic, numbered, ADE)
    found = named(truth, ADE)
    assert found["wall"] == [(2, False)] and found[ADE.names[bed - 1]] == [(1, False), (1, False)]
    assert ADE.names[1] not in found  # an instance covers the one pixel of the building
    assert (truth.segments == 0).sum() == 2 + (ADE.is_thing[149])  # void, and a thing pixel under no instance
    numbered[0, 0] = (3, 5, 0)
    with pytest.raises(ValueError, match="instance 5 has two classes, 1 and 3"):
        from_maps(semantic, numbered, ADE)
    with pytest.raises(ValueError, match="instance 7 has the class 101"):
        from_maps(row_of_pixels(1), np.array([[(101, 7, 0)]], np.uint8), ADE)
    with pytest.raises(ValueError, match=r"values without a class .*: 151 \(1 pixel\)"):
        from_maps(row_of_pixels(151), np.zeros((1, 1, 3), np.uint8), ADE)


@pytest.mark.parametrize("form", ["folder", "zips", "a folder for each zip"])
def test_cityscapes_in_every_form(form: str, tmp_path: Path) -> None:
    if form == "zips":
        root = zipped(tmp_path / "zips", CITY_FILES)
    else:
        wrap = "{0}_trainvaltest/{1}" if "each" in form else "{1}"
        root = put(tmp_path / "root", {wrap.format(path.split("/")[0], path): d for path, d in CITY_FILES.items()})
    source = read_source("auto", root, "train")
    assert source.reader == "cityscapes" and source.orientation == "stored" and not source.problems
    assert source.rows["image_id"].to_pylist() == ["aachen_000000_000019", "bochum_000000_000313"]
    truths = [source.decode(row, read_file, source.categories).segmentation for row in source.rows.to_pylist()]
    assert [named(truth, source.categories) for truth in truths] == [{"car": [(24, False)]}, {"road": [(24, False)]}]
    with pytest.raises(ValueError, match=r"split test has no public labels.*jobs/predict\.py MODEL .*leftImg8bit/test"):
        read_source("auto", root, "test")


def test_zips_and_folders_give_the_same_shards(tmp_path: Path) -> None:
    digests = []
    for root in (put(tmp_path / "root", CITY_FILES), zipped(tmp_path / "zips", CITY_FILES)):
        source = read_source("auto", root, "train")
        rows = source.rows.append_column("shard", pa.array([0] * source.rows.num_rows))
        how = {"decode": source.decode, "orientation": source.orientation}
        table = write_shard(rows, str(tmp_path / f"out-{root.name}"), source.categories, **how)
        report = json.loads(table["report"][0].as_py())
        assert report["rows"] == 2 and not report["problems"]
        digests.append((report["sha256"], report["digests"]))
    assert digests[0] == digests[1]


def test_cityscapes_with_files_missing_or_of_another_kind(tmp_path: Path) -> None:
    root = put(tmp_path, CITY_FILES)
    (root / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png").unlink()
    source = READERS["cityscapes"](root, "train")
    assert source.rows.num_rows == 1 and "its image is missing" in source.problems[0].reason
    label = root / "gtFine/train/bochum/bochum_000000_000313_gtFine_instanceIds.png"
    label.write_bytes(png(np.full((4, 6), 7, np.uint8)))
    with pytest.raises(ValueError, match=r"bochum_.*its bits are not 16"):
        source.decode(source.rows.to_pylist()[0], read_file, source.categories)
    values = np.full((4, 6), 255, np.uint16)
    values[0] = 11
    for file in root.glob("gtFine/train/*/*.png"):
        file.write_bytes(png(values))
    with pytest.raises(ValueError, match="the maps hold training ids"):
        READERS["cityscapes"](root, "train")
    with pytest.raises(ValueError, match=r"--data\.version: the reader cityscapes has no such option; it has"):
        read_source("auto", root, "train", {"version": "2.0"})
    there = r"; there are train \(--data\.train, --data\.val and --data\.split name them\); looked for"
    with pytest.raises(ValueError, match=f"no annotations of split validation in a known format{there}"):
        read_source("auto", root, "validation")
    with pytest.raises(ValueError, match=r"Test splits have no public labels; jobs/predict\.py"):
        read_source("auto", root, "test2017")


def mapillary_config(count: int) -> bytes:
    label = {"readable": "", "name": "x--y", "instances": True, "evaluate": True, "color": [1, 2, 3]}
    return json.dumps({"labels": [{**label, "readable": f"class {k}"} for k in range(count)], "version": "x"}).encode()


MAPILLARY = {
    "training/images/-key0000000000000000001.jpg": photograph(),
    "training/v1.2/instances/-key0000000000000000001.png": png(np.full((4, 6), 513, np.uint16)),
    "training/v2.0/instances/-key0000000000000000001.png": png(np.full((4, 6), 770, np.uint16)),
    "config_v1.2.json": mapillary_config(66),
    "config_v2.0.json": mapillary_config(124),
    "testing/images/_key0000000000000000002.jpg": photograph(),
}


def test_the_version_of_mapillary_is_named_and_checked(tmp_path: Path) -> None:
    root = put(tmp_path / "both", MAPILLARY)
    with pytest.raises(ValueError, match=r"versions 1\.2 and 2\.0; name one: --data\.version"):
        read_source("auto", root, "train")
    for version, name, count in (("1.2", "class 2", 66), ("2.0", "class 3", 124)):
        source = read_source("auto", root, "train", {"version": version})
        assert source.split == "train" and len(source.categories) == count
        assert source.rows["image_id"].to_pylist() == ["-key0000000000000000001"]
        truth = source.decode(source.rows.to_pylist()[0], read_file, source.categories).segmentation
        assert named(truth, source.categories) == {name: [(24, False)]}
    one = put(tmp_path / "one", {path: data for path, data in MAPILLARY.items() if "v2.0" not in path})
    with pytest.raises(ValueError, match=r"--data\.version 2\.0: .* holds version 1\.2"):
        read_source("mapillary", one, "training", {"version": "2.0"})
    with pytest.raises(ValueError, match="split testing has no labels"):
        read_source("mapillary", one, "testing")
    (one / "config_v1.2.json").write_bytes(mapillary_config(124))
    with pytest.raises(ValueError, match=r"has 124 labels, and version 1\.2 has 66"):
        read_source("mapillary", one, "training")


@pytest.mark.parametrize(("count", "words"), [(116, ""), (118, "are read as they are"), (65, "those of version 1.2")])
def test_the_categories_of_mapillary_are_those_of_its_json(
    count: int, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [{"id": k, "name": f"class {k}", "isthing": 1} for k in range(1, count + 1)]
    infos = [{"id": 5, "category_id": count, "iscrowd": 1}]  # a group, perhaps: the JSON says what it is
    content = {
        "images": [{"id": "k", "file_name": "k.jpg", "height": 6, "width": 4}],
        "annotations": [{"image_id": "k", "file_name": "k.png", "segments_info": infos}],
        "categories": entries,
    }
    files = {
        "training/images/k.jpg": photograph(),
        "training/v2.0/panoptic/k.png": encode_ids(np.full((4, 6), 5, np.int32)),
        "training/v2.0/panoptic/panoptic_2020.json": json.dumps(content).encode(),
    }
    root = put(tmp_path, files)
    if count == 65:
        with pytest.raises(ValueError, match=words):
            read_source("auto", root, "train")
        return
    source = read_source("auto", root, "train")
    truth = source.decode(source.rows.to_pylist()[0], read_file, source.categories).segmentation
    assert named(truth, source.categories) == {f"class {count}": [(24, True)]}
    assert (words in caplog.text) if words else not caplog.records


def test_bitmasks_without_alpha_are_refused(tmp_path: Path) -> None:
    files = {
        "bdd100k/images/10k/train/a.jpg": photograph(),
        "bdd100k/labels/pan_seg/bitmasks/train/a.png": png(np.full((4, 6, 3), 1, np.uint8)),
    }
    with pytest.raises(ValueError, match=r"a\.png: needs the RGBA file"):
        read_source("auto", put(tmp_path, files), "train")


def test_label_files_keep_their_values(tmp_path: Path) -> None:
    from panoptic.png import decode_channels, decode_labels

    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    palette = Image.fromarray(values, "P")
    palette.putpalette([7, 7, 7] * 256)  # all colours are one: only the index tells
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=3)
    np.testing.assert_array_equal(decode_labels(buffer.getvalue()), values)
    deep = values.astype(np.uint16) * 1000
    np.testing.assert_array_equal(decode_labels(png(deep)), deep)
    rgba = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    rgba[..., 3] = values  # also where alpha is 0
    np.testing.assert_array_equal(decode_channels(png(rgba), 4), rgba)
    for write, read in ((rgba, decode_labels), (values, lambda data: decode_channels(data, 3))):
        with pytest.raises(ValueError, match="PNG"):
            read(png(write))


@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_folder_without_the_format_is_told_with_what_was_looked_for(reader: str, tmp_path: Path) -> None:
    put(tmp_path, {"holiday.jpg": photograph()})
    with pytest.raises(ValueError, match=r"looked for|no Parquet files|no folder"):
        READERS[reader](tmp_path, "train")
