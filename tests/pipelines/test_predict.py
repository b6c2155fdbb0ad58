"""Predictions as files: what the official evaluation takes, Cityscapes ids, photographs of every kind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PIL

from panoptic.png import decode_ids, from_coco
from panoptic.segmentation import Categories, Segmentation
from pipelines.predict import Image, Output, check_cityscapes, cityscapes_ids, photographs, write


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
        "none.png": b"no image",
        "notes.txt": b"ignored",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def test_photographs_of_every_kind(
    folder: Path, tmp_path: Path, small_categories: Categories, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import predict
    from tests.pipelines.stored import write_model

    model, out = write_model(tmp_path / "model", small_categories), tmp_path / "out"
    arguments = [model, str(folder), "--out", str(out), "--formats", "coco", "overlay", "--actors", "0"]
    results = predict.main([*arguments, "--tracking-uri", "unused"])
    lines = capsys.readouterr().out.splitlines()
    assert len(results) == 6 and lines[-1].startswith("4 of 6 images predicted")
    assert len(lines) == 3 and lines[0].startswith("cut.jpg: left out: the JPEG ends before its image does")
    assert lines[1].startswith("none.png: left out: cannot be decoded")
    content = json.loads((out / "panoptic.json").read_text())
    sizes = {entry["file_name"]: (entry["height"], entry["width"]) for entry in content["images"]}
    assert sizes == {"a.jpg": (50, 70), "a.png": (50, 70), "below/odd.png": (41, 33), "turned.jpg": (70, 50)}
    assert content["categories"] == small_categories.to_coco()
    for entry, image in zip(content["annotations"], content["images"], strict=True):
        assert entry["image_id"] == image["id"]
        png = (out / "panoptic" / entry["file_name"]).read_bytes()
        found = from_coco(png, entry, small_categories, entry["file_name"], sizes[image["file_name"]])
        assert found.areas().tolist() == [info["area"] for info in entry["segments_info"]]
    assert {p.name for p in (out / "overlays").iterdir()} == {"a_jpg.jpg", "a_png.jpg", "turned.jpg", "below"}
    with pytest.raises(ValueError, match="no image could be read"):
        predict.main([model, str(folder / "none.png"), *arguments[2:], "--tracking-uri", "unused"])


def test_shards_keep_the_ids_of_their_dataset(ray_cluster: None, scenes16: Path, tmp_path: Path) -> None:
    from jobs import predict
    from panoptic.metrics.quality import count_coco
    from pipelines.shards import ensure_shards
    from tests.pipelines.stored import write_model

    val = ensure_shards(scenes16, "val", tmp_path / "shards")
    out = tmp_path / "out"
    model = write_model(tmp_path / "model", val.categories)
    results = predict.main([model, val.uri, "--out", str(out), "--formats", "coco", "--actors", "0"])
    truth = json.loads((scenes16 / "annotations" / "panoptic_val.json").read_text())
    written = {a["image_id"]: a for a in json.loads((out / "panoptic.json").read_text())["annotations"]}
    assert len(results) == 8 and written.keys() == {image["id"] for image in truth["images"]}
    for entry in truth["annotations"]:
        pair = [
            ((scenes16 / "annotations" / "panoptic_val" / entry["file_name"]).read_bytes(), entry),
            ((out / "panoptic" / written[entry["image_id"]]["file_name"]).read_bytes(), written[entry["image_id"]]),
        ]
        counts = count_coco(*pair, val.categories, entry["file_name"])  # refuses what the official evaluation would
        assert counts.fn.sum() + counts.tp.sum() > 0


def test_cityscapes_ids(tmp_path: Path, small_categories: Categories) -> None:
    segments = np.array([[0, 1, 1, 2], [3, 3, 4, 4]], np.int32)
    found = Segmentation(segments, np.array([0, 1, 0, 2]))  # person 24, sky 7, person 24, car 3
    labels, instances = cityscapes_ids(found, small_categories)
    assert labels.tolist() == [[0, 24, 24, 7], [24, 24, 3, 3]]
    assert instances.tolist() == [[0, 24000, 24000, 7], [24001, 24001, 3000, 3000]]
    write(np.zeros((2, 4, 3), np.uint8), found, small_categories, Image("", "x", 1, "x.jpg"),
          Output(str(tmp_path), ("coco", "cityscapes")))  # fmt: skip
    wide = cv2.imread(str(tmp_path / "cityscapes/x_instanceIds.png"), cv2.IMREAD_UNCHANGED)
    assert wide.dtype == np.uint16 and wide.tolist() == instances.tolist()
    assert cv2.imread(str(tmp_path / "cityscapes/x_labelIds.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint8
    assert (decode_ids((tmp_path / "panoptic/x.png").read_bytes()) > 0).tolist() == (segments > 0).tolist()
    high = Categories(("dog",), (True,), (66,), ((1, 2, 3),))
    with pytest.raises(ValueError, match=r"up to 65 .* but dog"):
        check_cityscapes(high)


def test_places_without_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        photographs(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"no photograph there; looked for \.jpg"):
        photographs(str(tmp_path))
