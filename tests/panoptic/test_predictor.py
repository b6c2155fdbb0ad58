"""Trained models on photographs: sources, forms of a photograph, results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import panoptic
from panoptic import predictor
from panoptic.png import decode_image, encode_image, from_coco
from panoptic.predictor import Predictor, SegmentedPhotograph
from panoptic.segmentation import Categories
from panoptic.training import checkpoint
from panoptic.transforms import Resize
from tests.support.small import SMALL_DEEPLAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_categories: Categories) -> Path:
    """A checkpoint's folder, as a run writes it."""
    path = tmp_path_factory.mktemp("run") / "step_000004"
    path.mkdir()
    torch.manual_seed(0)
    model = SMALL_DEEPLAB.build(small_categories)
    options = {"resize.short": 64, "resize.longest": 96, "engine.precision": "float32", "optim.lr": 1e-3}
    checkpoint.save(str(path / "checkpoint.pt"), config=SMALL_DEEPLAB, model=model, experiment=options)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Predictor:
    return panoptic.load(folder, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8), (140, 90))


def same(a: SegmentedPhotograph, b: SegmentedPhotograph) -> bool:
    return np.array_equal(a.segments, b.segments) and np.array_equal(a.labels, b.labels)


def test_a_folder_and_its_file_are_the_same_model(folder: Path, model: Predictor, pixels: np.ndarray) -> None:
    assert model.resize == Resize(short=64, longest=96)
    again = panoptic.load(str(folder / "checkpoint.pt"), device="cpu")
    assert same(again(pixels), model(pixels))


def test_the_folder_of_a_run_is_its_best_checkpoint(
    folder: Path, model: Predictor, pixels: np.ndarray, small_categories: Categories, tmp_path: Path
) -> None:
    """The second best here, by name and by time, is another model."""
    torch.manual_seed(1)
    (tmp_path / "step_000006").mkdir()
    other = SMALL_DEEPLAB.build(small_categories)
    checkpoint.save(str(tmp_path / "step_000006" / "checkpoint.pt"), config=SMALL_DEEPLAB, model=other)
    shutil.copytree(folder, tmp_path / "step_000004")
    scores = {"step_000004": {"score": 30.0, "step": 4}, "step_000006": {"score": 20.0, "step": 6}}
    listed = [{"checkpoint_dir_name": name, "metrics": metrics} for name, metrics in scores.items()]
    listing = tmp_path / checkpoint.LISTING
    listing.write_text(json.dumps({"checkpoint_results": listed}))
    assert same(panoptic.load(tmp_path, device="cpu")(pixels), model(pixels))
    for nothing in ('{"checkpoint_results": []}', '{"checkpoint_re', "[]"):
        listing.write_text(nothing)
        with pytest.raises(ValueError, match="no checkpoint there, or none yet; name a run's folder"):
            panoptic.load(tmp_path, device="cpu")


def test_every_form_of_a_photograph(model: Predictor, pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encode_image(pixels))
    expected = model(pixels)
    assert expected.size == (90, 140)
    forms = [file, str(file), file.read_bytes(), Image.open(file), Image.fromarray(pixels)]
    results = [model(form) for form in forms]
    assert all(same(result, expected) for result in results)
    assert [result.name for result in results[:2]] == ["photo.png"] * 2 and results[3].name == "photo.png"
    grey = model(pixels[..., 0])
    assert same(grey, model(np.repeat(pixels[..., :1], 3, 2)))


def test_an_upright_photograph_is_seen_upright(model: Predictor, pixels: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(file, exif=exif, quality=95)
    assert model(file).size == model(Image.open(file)).size == (140, 90)
    np.testing.assert_array_equal(model(file).image, decode_image(file.read_bytes()))


def test_a_list_of_mixed_sizes_is_each_alone(model: Predictor, pixels: np.ndarray) -> None:
    wide, high = pixels, np.ascontiguousarray(pixels.transpose(1, 0, 2))
    photographs = [wide, high, wide[:, ::-1], high[::-1], wide]
    together = model(photographs, batch=2)
    assert [result.size for result in together] == [(90, 140), (140, 90), (90, 140), (140, 90), (90, 140)]
    assert all(same(a, model(p)) for a, p in zip(together, photographs, strict=True))
    assert model([]) == []


def test_no_array_of_another_kind(model: Predictor, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"photograph 1: an array of float32 \[90, 140, 3\]; .* uint8 \[H, W, 3\]"):
        model([pixels, pixels.astype(np.float32)])
    with pytest.raises(ValueError, match="photograph 0"):
        model(b"no image")


def test_a_result_has_names_and_a_picture(model: Predictor, pixels: np.ndarray) -> None:
    result = model(pixels)
    assert result.names == tuple(model.categories.names[k] for k in result.labels)
    assert result.draw().shape == pixels.shape and result.draw().dtype == np.uint8
    np.testing.assert_array_equal(decode_image(result._repr_png_()), result.draw())
    assert repr(result).startswith("<photograph 0, 90 x 140: ") and result.names[0] in repr(result)


def test_what_is_saved_comes_back(model: Predictor, pixels: np.ndarray, tmp_path: Path) -> None:
    result = model(pixels)
    result.save(tmp_path / "drawn.png")
    np.testing.assert_array_equal(decode_image((tmp_path / "drawn.png").read_bytes()), result.draw())
    result.save(tmp_path / "drawn.jpg")
    assert decode_image((tmp_path / "drawn.jpg").read_bytes()).shape == pixels.shape
    result.save(tmp_path / "map.json")
    content = json.loads((tmp_path / "map.json").read_text())
    (annotation,) = content["annotations"]
    categories = Categories.from_coco(content["categories"])
    again = from_coco((tmp_path / annotation["file_name"]).read_bytes(), annotation, categories, "map")
    np.testing.assert_array_equal(again.segments, result.segments)
    np.testing.assert_array_equal(again.labels, result.labels)
    assert [entry["category"] for entry in annotation["segments_info"]] == list(result.names)
    with pytest.raises(ValueError, match=r"map\.gif: save writes"):
        result.save(tmp_path / "map.gif")


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("-")
    with pytest.raises(ValueError, match=r"no checkpoint there, .*a folder step_\*.*the folder holds notes.txt"):
        panoptic.load(tmp_path)
    with pytest.raises(ValueError, match="nothing opens gopher:/"):
        panoptic.load("gopher://street")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.pt: not a checkpoint"):
        panoptic.load(tmp_path / "junk.pt")


def test_a_scheme_is_opened_by_its_entry_point(folder: Path, model: Predictor, pixels: np.ndarray, monkeypatch) -> None:
    """As the pipeline opens `models:/`, of which panoptic knows nothing."""
    opened = []

    class Point:
        name = "models"

        def load(self):  # type: ignore[no-untyped-def]
            return lambda uri: opened.append(uri) or (model.model, model.resize, {"engine.precision": "bfloat16"})

    monkeypatch.setattr(predictor, "entry_points", lambda group: [Point()] if group == "panoptic.sources" else [])
    loaded = panoptic.load("models:/street@champion", device="cpu")
    assert opened == ["models:/street@champion"] and loaded.engine.precision == "bfloat16"
    assert panoptic.load("models:/street@champion", device="cpu", precision="float32").engine.precision == "float32"


def test_the_package_imports_nothing_heavy() -> None:
    """Torch and the models are imported when `load` is first touched."""
    code = "import sys, panoptic; assert 'torch' not in sys.modules; panoptic.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        panoptic.lode  # noqa: B018
