"""Predictions as files: what the official evaluation takes, Cityscapes ids, photographs of every kind."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PIL

from panoptic.png import decode_ids, from_coco
from panoptic.segmentation import Categories, Segmentation
from pipelines.evaluation.inputs import Image
from pipelines.evaluation.predict import Output, cityscapes_ids, cityscapes_labels, write


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return cv2.blur(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8), (9, 9))


def encoded(image: PIL.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    image = PIL.fromarray(picture((50, 70)))
    turned = PIL.Exif()
    turned[0x0112] = 6
    whole = encoded(image, "JPEG")
    files = {
        "a.jpg": whole,
        "a.png": encoded(image.convert("L"), "PNG"),
        "below/odd.png": encoded(image.crop((0, 0, 33, 41)), "PNG"),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "cut.jpg": whole[:-30],
        "half.png": encoded(image, "PNG")[:60],
        "none.png": b"no image",
        "notes.txt": b"ignored",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def check_submission(folder: Path, categories: Categories) -> dict[int | str, dict]:
    """Look in the files for everything that the official evaluation raises an error over; annotations by image.

    A segment of the PNG that the JSON does not list, the reverse, an unknown category, a segment called 0 (void), a
    missing file or image.
    """
    content = json.loads((folder / "panoptic.json").read_text())
    names = {path.relative_to(folder / "panoptic").as_posix() for path in (folder / "panoptic").rglob("*.png")}
    assert names == {entry["file_name"] for entry in content["annotations"]}
    assert len(names) == len(content["annotations"]) == len(content["images"])
    for entry, image in zip(content["annotations"], content["images"], strict=True):
        picture = PIL.open(folder / "panoptic" / entry["file_name"])
        assert picture.mode == "RGB" and picture.size == (image["width"], image["height"])
        found, areas = np.unique(np.asarray(picture).astype(np.int64) @ [1, 256, 65536], return_counts=True)
        listed = {info["id"]: info["area"] for info in entry["segments_info"]}
        assert 0 not in listed and len(listed) == len(entry["segments_info"])
        assert {i: n for i, n in zip(found.tolist(), areas.tolist(), strict=True) if i} == listed
        assert {info["category_id"] for info in entry["segments_info"]} <= set(categories.ids)
        assert entry["image_id"] == image["id"]
    return {entry["image_id"]: entry for entry in content["annotations"]}


def check_instances(out: Path) -> None:
    """The objects of instances.json are the segments of the maps, as pycocotools reads them."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "instances.json"))
    maps = {entry["image_id"]: entry for entry in json.loads((out / "panoptic.json").read_text())["annotations"]}
    seen = 0
    for image, entry in maps.items():
        ids = np.asarray(PIL.open(out / "panoptic" / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
        objects = coco.loadAnns(coco.getAnnIds([image]))
        assert len(objects) == len(entry["segments_info"])
        for one, info in zip(objects, entry["segments_info"], strict=True):
            np.testing.assert_array_equal(coco.annToMask(one), ids == info["id"])
            assert all(one[key] == info[key] for key in ("category_id", "area", "bbox"))
            seen += 1
    assert seen and {entry["supercategory"] for entry in coco.cats.values()} == {"thing", "stuff"}


def test_supervision_reads_the_masks(tmp_path: Path, small_categories: Categories) -> None:
    supervision = pytest.importorskip("supervision")
    from jobs import predict
    from tests.support.stored import write_model

    photographs, out = tmp_path / "photographs", tmp_path / "out"
    photographs.mkdir()
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8), (70, 50))
    cv2.imwrite(str(photographs / "a.png"), pixels)
    model = write_model(tmp_path / "model", small_categories)
    options = ["--formats", "coco", "rle", "--actors", "0", "--tracking.uri", "unused"]
    predict.main([model, str(photographs), "--out", str(out), *options])
    read = supervision.DetectionDataset.from_coco(str(photographs), str(out / "instances.json"), force_masks=True)
    ((_, image, found),) = list(read)
    (entry,) = json.loads((out / "panoptic.json").read_text())["annotations"]
    ids = np.asarray(PIL.open(out / "panoptic" / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
    assert image.shape == (50, 70, 3) and len(found) == len(entry["segments_info"]) > 0
    for mask, label, info in zip(found.mask, found.class_id, entry["segments_info"], strict=True):
        np.testing.assert_array_equal(mask, ids == info["id"])
        assert read.classes[label] == small_categories.names[small_categories.ids.index(info["category_id"])]


def test_photographs_of_every_kind(
    folder: Path, tmp_path: Path, small_categories: Categories, capfd: pytest.CaptureFixture[str]
) -> None:
    from jobs import predict
    from tests.support.stored import write_model

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)  # as it is at first
    model, out = write_model(tmp_path / "model", small_categories), tmp_path / "out"
    arguments = [model, str(folder), "--out", str(out), "--formats", "coco", "rle", "overlay", "--actors", "0"]
    results = predict.main([*arguments, "--tracking.uri", "unused"])
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert "WARN" not in printed.err and "ERROR" not in printed.err
    assert len(results) == 7 and lines[-1].startswith("4 of 7 images predicted")
    assert len(lines) == 4 and lines[0].startswith("cut.jpg: left out: the JPEG ends before its image does")
    assert lines[1].startswith("half.png: left out: cannot be decoded")
    assert lines[2].startswith("none.png: left out: cannot be decoded")
    check_submission(out, small_categories)
    content = json.loads((out / "panoptic.json").read_text())
    sizes = {entry["file_name"]: (entry["height"], entry["width"]) for entry in content["images"]}
    assert sizes == {"a.jpg": (50, 70), "a.png": (50, 70), "below/odd.png": (41, 33), "turned.jpg": (70, 50)}
    assert content["categories"] == small_categories.to_coco()
    for entry, image in zip(content["annotations"], content["images"], strict=True):
        png = (out / "panoptic" / entry["file_name"]).read_bytes()
        from_coco(png, entry, small_categories, entry["file_name"], sizes[image["file_name"]])
    check_instances(out)
    assert {p.name for p in (out / "overlays").iterdir()} == {"a_jpg.jpg", "a_png.jpg", "turned.jpg", "below"}
    with pytest.raises(ValueError, match="no image could be predicted"):
        predict.main([model, str(folder / "none.png"), *arguments[2:], "--tracking.uri", "unused"])


def test_photographs_under_the_ids_of_a_json(
    folder: Path, tmp_path: Path, small_categories: Categories, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import predict
    from tests.support.stored import write_model

    entries = [{"id": 17, "file_name": "turned.jpg"}, {"id": 4, "file_name": "a.png"}]
    (tmp_path / "info.json").write_text(json.dumps({"images": entries}))
    model, out = write_model(tmp_path / "model", small_categories), tmp_path / "out"
    options = ["--formats", "coco", "--actors", "0", "--images-json", str(tmp_path / "info.json")]
    predict.main([model, str(folder), "--out", str(out), *options])
    assert {i: entry["file_name"] for i, entry in check_submission(out, small_categories).items()} == {
        4: "a.png",
        17: "turned.png",
    }
    assert "2 of 2 images predicted" in capsys.readouterr().out


def test_an_image_that_a_format_cannot_hold_is_left_out(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs import predict
    from pipelines.evaluation import predict as pipeline
    from tests.support.stored import write_model

    def crowded(task, model, sample) -> tuple[np.ndarray, Segmentation]:
        """1001 persons in one image; another one cannot be predicted at all."""
        if sample.name == "turned.jpg":
            raise RuntimeError("turned.jpg: the network\nfails")
        count = 1001 if sample.name == "a.png" else 1000
        segments = np.arange(count, dtype=np.int32)[None] + 1
        return np.zeros((1, count, 3), np.uint8), Segmentation(segments, np.zeros(count, np.int64))

    monkeypatch.setattr(pipeline, "_one", crowded)
    model, out = write_model(tmp_path / "model", STREET), tmp_path / "out"
    formats = ["--formats", "coco", "cityscapes", "--actors", "0"]
    results = predict.main([model, str(folder), "--out", str(out), *formats])
    lines = capsys.readouterr().out.splitlines()
    assert "a.png: left out: 1001 instances of person; Cityscapes' ids hold 1000 of a class" in lines
    assert "turned.jpg: left out: the network fails" in lines and lines[-1].startswith("2 of 7 images predicted")
    assert {one.image.file_name for one in results if not one.problem} == {"a.jpg", "below/odd.png"}
    assert {entry["file_name"] for entry in check_submission(out, STREET).values()} == {
        "a_jpg.png",
        "below/odd.png",
    }
    assert not list((out / "cityscapes").glob("a_png*"))


@pytest.fixture(scope="module")
def submission(ray_cluster: None, scenes16: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Categories]:
    """Predictions of the drawn validation scenes, from shards."""
    from jobs import predict
    from pipelines.data.prepare import ensure_shards
    from tests.support.stored import write_model

    root = tmp_path_factory.mktemp("submission")
    val = ensure_shards(scenes16, "val", root / "shards")
    model = write_model(root / "model", val.categories)
    arguments = [model, val.uri, "--out", str(root / "out"), "--formats", "coco", "--actors", "0"]
    assert len(predict.main(arguments)) == 8
    with pytest.raises(ValueError, match="--images-json is for photographs"):
        predict.main([*arguments, "--images-json", "x.json"])
    return root / "out", val.categories


def test_shards_keep_the_ids_of_their_dataset(submission: tuple[Path, Categories], scenes16: Path) -> None:
    from panoptic.metrics.panoptic_quality import count_coco

    out, categories = submission
    truth = json.loads((scenes16 / "annotations" / "panoptic_val.json").read_text())
    written = check_submission(out, categories)
    assert written.keys() == {image["id"] for image in truth["images"]}
    for entry in truth["annotations"]:
        pair = [
            ((scenes16 / "annotations" / "panoptic_val" / entry["file_name"]).read_bytes(), entry),
            ((out / "panoptic" / written[entry["image_id"]]["file_name"]).read_bytes(), written[entry["image_id"]]),
        ]
        counts = count_coco(*pair, categories, entry["file_name"])
        assert counts.fn.sum() + counts.tp.sum() > 0


def test_the_official_evaluation_takes_it(submission: tuple[Path, Categories], scenes16: Path) -> None:
    official = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    out, categories = submission
    truth = json.loads((scenes16 / "annotations" / "panoptic_val.json").read_text())
    written = check_submission(out, categories)
    pairs = [(entry, written[entry["image_id"]]) for entry in truth["annotations"]]
    folders = str(scenes16 / "annotations" / "panoptic_val"), str(out / "panoptic")
    counts = official.pq_compute_single_core(0, pairs, *folders, {entry["id"]: entry for entry in categories.to_coco()})
    assert sum(counts[i].tp + counts[i].fn for i in categories.ids) > 0


@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_submission_never_holds_what_the_official_evaluation_refuses(
    count: int, tmp_path: Path, small_categories: Categories
) -> None:
    """Whatever a model hands over: segments without a pixel, void alone, more segments than a byte numbers."""
    segments = np.arange(600, dtype=np.int32).reshape(20, 30) % (count + 1)
    labels = np.arange(count + 5) % 5  # the last five have no pixel
    hidden = Segmentation(np.where(segments == 2, 0, segments), labels, scores=np.ones(len(labels), np.float32))
    image, output = Image("", "below/x", 7, "below/x.jpg"), Output(str(tmp_path), ("coco",))
    annotation = write(np.zeros((20, 30, 3), np.uint8), hidden, small_categories, image, output)
    content = {
        "annotations": [annotation],
        "images": [{"id": 7, "file_name": "below/x.jpg", "height": 20, "width": 30}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    written = check_submission(tmp_path, small_categories)
    assert len(written[7]["segments_info"]) == count - (count > 1)


STREET = Categories(
    names=("person", "sky", "car", "road", "Traffic_Sign"),
    is_thing=(True, False, True, False, False),
    ids=(101, 102, 103, 104, 105),  # of a data set of its own
    colours=((220, 20, 60), (70, 130, 180), (0, 0, 142), (128, 64, 128), (220, 220, 0)),
)
"""Classes of Cityscapes under other ids and another spelling."""


def test_cityscapes_ids_are_those_of_the_names(tmp_path: Path) -> None:
    segments = np.array([[0, 1, 1, 2], [3, 3, 4, 5]], np.int32)
    found = Segmentation(segments, np.array([0, 1, 0, 2, 4]))
    labels, instances = cityscapes_ids(found, STREET)
    assert labels.tolist() == [[0, 24, 24, 23], [24, 24, 26, 20]]
    assert instances.tolist() == [[0, 24000, 24000, 23], [24001, 24001, 26000, 20]]
    write(np.zeros((2, 4, 3), np.uint8), found, STREET, Image("", "x", 1, "x.jpg"),
          Output(str(tmp_path), ("coco", "cityscapes")))  # fmt: skip
    wide = cv2.imread(str(tmp_path / "cityscapes/x_instanceIds.png"), cv2.IMREAD_UNCHANGED)
    assert wide.dtype == np.uint16 and wide.tolist() == instances.tolist()
    assert cv2.imread(str(tmp_path / "cityscapes/x_labelIds.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint8
    assert (decode_ids((tmp_path / "panoptic/x.png").read_bytes()) > 0).tolist() == (segments > 0).tolist()


def test_other_classes_than_those_of_cityscapes_are_refused_before_any_work(small_categories: Categories) -> None:
    assert cityscapes_labels(STREET) == [24, 23, 26, 7, 20]
    with pytest.raises(ValueError, match=r"^format cityscapes: dog is no class of .*--map-prediction FILE"):
        cityscapes_labels(small_categories)
    with pytest.raises(ValueError, match="format cityscapes: car: things there and stuff here"):
        cityscapes_labels(Categories(("car",), (False,), (26,), ((1, 2, 3),)))


def test_photographs_of_phones_and_the_web_are_read_or_named(
    tmp_path: Path, small_categories: Categories, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import predict
    from tests.support.stored import write_model

    photographs = tmp_path / "photographs"
    photographs.mkdir()
    image = PIL.fromarray(picture((50, 70)))
    (photographs / "a.avif").write_bytes(encoded(image, "AVIF"))
    (photographs / "b.gif").write_bytes(encoded(image, "GIF"))
    (photographs / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99)
    (photographs / "d.jpg").write_bytes(encoded(image, "JPEG"))
    model, out = write_model(tmp_path / "model", small_categories), tmp_path / "out"
    predict.main([model, str(photographs), "--out", str(out), "--actors", "0", "--formats", "coco"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "c.HEIC: left out: HEIC, which cannot be decoded here; save it as JPEG, AVIF or PNG"
    assert lines[-1].startswith("3 of 4 images predicted")
    sizes = [(entry["height"], entry["width"]) for entry in json.loads((out / "panoptic.json").read_text())["images"]]
    assert sizes == [(50, 70)] * 3


def test_a_row_of_shards_that_cannot_be_read_is_left_out(
    tmp_path: Path, small_categories: Categories, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import predict
    from tests.support.stored import write_model, write_shards

    shards = write_shards(tmp_path / "val", small_categories, 4)
    file = tmp_path / "val" / shards.shards[0].path
    data = bytearray(file.read_bytes())
    jpegs = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    data[jpegs[2] + 200] ^= 0xFF
    file.write_bytes(bytes(data))
    model, out = write_model(tmp_path / "model", small_categories), tmp_path / "out"
    results = predict.main([model, str(tmp_path / "val"), "--out", str(out), "--actors", "0", "--formats", "coco"])
    assert sum(bool(one.problem) for one in results) == 1
    assert "3 of 4 images predicted" in capsys.readouterr().out
    assert len(check_submission(out, small_categories)) == 3
