"""Drawn scenes: their truth is exact, they are the same for any number of workers, and colour alone fails on them.

Shapes: H x W pixels, C classes, K colour clusters.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from panoptic.metrics.panoptic_quality import QualityCounts, count, quality
from panoptic.png import decode_ids, decode_image, from_coco
from panoptic.segmentation import Categories, Segmentation
from pipelines.data.scenes import render, write_scenes
from pipelines.data.scenes.drawing import STUFF
from pipelines.data.scenes.files import MIN_PIXELS, record
from pipelines.data.scenes.things import THINGS

TRAIN, VAL = 90, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough scenes to hold every class, crowds and void."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=TRAIN, val=VAL, seed=3)


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, list[tuple[np.ndarray, Segmentation, dict]]]:
    """Image, truth and record of each scene of the folder, read as any COCO-panoptic folder is."""
    return {split: read_split(folder, split) for split in ("train", "val")}


@pytest.fixture(scope="module")
def categories(folder: Path) -> Categories:
    return Categories.from_coco(read_json(folder, "train")["categories"])


def read_json(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"panoptic_{split}.json").read_text())


def read_split(folder: Path, split: str) -> list[tuple[np.ndarray, Segmentation, dict]]:
    content = read_json(folder, split)
    categories, rows = Categories.from_coco(content["categories"]), []
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image["id"] == annotation["image_id"]
        pixels = decode_image((folder / "images" / split / image["file_name"]).read_bytes())
        png = (folder / "annotations" / f"panoptic_{split}" / annotation["file_name"]).read_bytes()
        truth = from_coco(png, annotation, categories, annotation["file_name"], (image["height"], image["width"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        rows.append((pixels, truth, annotation))
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- files


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one = write_scenes(tmp_path / "one", train=5, val=3, seed=11, workers=1)
    two = write_scenes(tmp_path / "two", train=5, val=3, seed=11, workers=2)
    found = contents(one)
    assert len(found) == 2 * 8 + 2
    assert found == contents(two)


def test_a_scene_depends_on_seed_split_and_index_alone(folder: Path, tmp_path: Path) -> None:
    few = contents(write_scenes(tmp_path, train=2, val=1, seed=3))
    many = contents(folder)
    assert all(many[name] == data for name, data in few.items() if not name.endswith(".json"))
    drawn = {render(*key).image.tobytes() for key in ((3, "train", 0), (3, "train", 1), (3, "val", 0), (4, "train", 0))}
    assert len(drawn) == 4


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    root = write_scenes(tmp_path, train=2, val=1, seed=1)
    kept = root / "images" / "train" / "000000.jpg"
    kept.write_bytes(b"kept")
    write_scenes(tmp_path, train=2, val=1, seed=1)
    assert kept.read_bytes() == b"kept"


@pytest.mark.parametrize("change", ["interrupted", "seed", "count"])
def test_an_interrupted_or_different_folder_is_written(tmp_path: Path, change: str) -> None:
    root = write_scenes(tmp_path / "a", train=2, val=1, seed=2 if change == "seed" else 1)
    if change == "interrupted":
        (root / "annotations" / "panoptic_train.json").unlink()
        (root / "images" / "train" / "000001.jpg").write_bytes(b"half")
    wanted = 3 if change == "count" else 2
    write_scenes(root, train=wanted, val=1, seed=1)
    assert contents(root) == contents(write_scenes(tmp_path / "b", train=wanted, val=1, seed=1))


def test_annotations_of_others_are_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "annotations" / "panoptic_train.json"
    target.parent.mkdir()
    target.write_text('{"info": {"description": "photographs"}}')
    with pytest.raises(ValueError, match=r"panoptic_train\.json: not written by write_scenes"):
        write_scenes(tmp_path, train=1, val=1)
    assert "photographs" in target.read_text()


def test_negative_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val is -1"):
        write_scenes(tmp_path, train=1, val=-1)


def test_a_failed_process_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    write_scenes(root, train=0, val=0)
    (root / "annotations" / "panoptic_train.json").unlink()
    shutil.rmtree(root / "images" / "train")
    (root / "images" / "train").mkdir()
    (root / "images" / "train" / "000000.jpg").mkdir()  # a folder where a file has to go
    with pytest.raises(RuntimeError, match="ended with status 1"):
        write_scenes(root, train=4, val=0, workers=2)
    assert not (root / "annotations" / "panoptic_train.json").exists()


# ---------------------------------------------------------------- truth


def test_png_and_json_agree(folder: Path, splits: dict) -> None:
    for split, rows in splits.items():
        for _, _, annotation in rows:
            png = (folder / "annotations" / f"panoptic_{split}" / annotation["file_name"]).read_bytes()
            ids, infos = decode_ids(png), annotation["segments_info"]
            assert set(np.unique(ids)) - {0} == {info["id"] for info in infos}
            assert len({info["id"] for info in infos}) == len(infos)
            for info in infos:
                mask = ids == info["id"]
                rows_, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                assert info["area"] == mask.sum() >= MIN_PIXELS
                x, y, width, height = info["bbox"]
                assert (x, y) == (columns[0], rows_[0])
                assert (x + width, y + height) == (columns[-1] + 1, rows_[-1] + 1)


def test_ids_use_all_channels(splits: dict) -> None:
    ids = [info["id"] for _, _, annotation in splits["train"] for info in annotation["segments_info"]]
    assert max(ids) > 65535
    assert any(i % 256 for i in ids)


def test_stuff_is_one_segment_per_class(splits: dict, categories: Categories) -> None:
    for _, truth, _ in splits["train"]:
        occurrences = Counter(truth.labels.tolist())
        assert all(occurrences[c] <= 1 for c in categories.stuff)


def test_the_image_shows_what_the_truth_says() -> None:
    """The outline in the truth is where the image changes: a ball without shadow, haze or noise."""
    from pipelines.data.scenes.drawing import Light, Part, Scene, draw
    from pipelines.data.scenes.things import ellipse

    scene = Scene(np.full((40, 50, 3), 200, np.uint8), np.ones((40, 50), np.int32), 10, 30, Light(0, 0, 0), np.zeros(3))
    part = Part(ellipse(0, 1, 1, 1, 60), np.zeros(3))
    drawn = draw(scene, [part], (25.0, 30.0), 10.0, np.random.default_rng(0))
    assert drawn is not None
    window, mask = drawn
    own = np.zeros((40, 50), bool)
    own[window] = mask
    np.testing.assert_array_equal(own, scene.image[..., 0] < 100)
    assert np.pi * 10**2 <= own.sum() <= np.pi * 10.75**2  # OpenCV's antialiased edge lies half a pixel outside


def test_shadows_change_the_image_only() -> None:
    from pipelines.data.scenes.drawing import Light, Scene, cast_shadow

    scene = Scene(
        np.full((60, 80, 3), 200, np.uint8), np.ones((60, 80), np.int32), 20, 30, Light(0.8, 0.3, 1), np.zeros(3)
    )
    cast_shadow(scene, THINGS["person"](np.random.default_rng(0)), (40.0, 40.0), 12.0)
    assert (scene.segments == 1).all()
    assert 50 < (scene.image[20:, :, 0] < 150).sum() < 1000
    assert (scene.image[:20] == 200).all()


def test_slivers_become_void() -> None:
    scene = render(0, "train", 0)
    scene.segments[scene.segments == len(scene.names)] = 0
    scene.segments[0, : MIN_PIXELS - 1] = len(scene.names)
    ids, _, annotation = record(scene, 0)
    assert (ids[0, : MIN_PIXELS - 1] == 0).all()
    assert sum(info["area"] for info in annotation["segments_info"]) == (ids > 0).sum()


# ---------------------------------------------------------------- variety


def test_every_class_occurs_and_none_rarely(splits: dict, categories: Categories) -> None:
    assert len(THINGS) >= 6 and len(STUFF) >= 5
    assert categories.names == (*THINGS, *STUFF)
    for split, rows in splits.items():
        images = Counter(label for _, truth, _ in rows for label in set(truth.labels.tolist()))
        rarest = min(images[c] for c in range(len(categories)))
        assert rarest >= 0.2 * len(rows), (split, images)


def test_crowds_void_and_tiny_things_occur(splits: dict, categories: Categories) -> None:
    truths = [truth for _, truth, _ in splits["train"]]
    crowds = [truth.labels[truth.is_crowd()] for truth in truths]
    assert 0.1 < np.mean([len(c) > 0 for c in crowds]) < 0.5
    assert {categories.names[c] for c in np.concatenate(crowds)} == {"person", "bird"}
    assert 0.1 < np.mean([(truth.segments == 0).mean() > 0.005 for truth in truths]) < 0.5
    areas = np.concatenate([truth.areas()[np.isin(truth.labels, categories.things)] for truth in truths])
    assert (areas < 64).mean() > 0.02
    assert np.median(areas) > 200


def test_neighbours_of_one_class_touch(splits: dict, categories: Categories) -> None:
    touching: Counter[str] = Counter()
    for _, truth, _ in splits["train"]:
        a, b = truth.segments[:, :-1], truth.segments[:, 1:]
        pairs = np.unique(np.stack([a, b])[:, (a != b) & (a > 0) & (b > 0)], axis=1) - 1
        same = truth.labels[pairs[0]] == truth.labels[pairs[1]]
        touching.update(categories.names[c] for c in truth.labels[pairs[0][same]])
    assert all(touching[name] >= 3 for name in ("person", "car", "house", "tree", "ball"))


def test_sizes_vary(splits: dict) -> None:
    sizes = {truth.size for _, truth, _ in splits["train"]}
    assert len(sizes) > 0.9 * TRAIN
    assert any(height > width for height, width in sizes)
    assert {height % 2 for height, _ in sizes} == {0, 1}
    assert min(min(size) for size in sizes) >= 144
    assert max(max(size) for size in sizes) <= 352


# ---------------------------------------------------------------- difficulty


def colour_clusters(image: np.ndarray, centres: np.ndarray | None = None) -> np.ndarray:
    """Lab colours float32 [H * W, 3] after a median filter, or the nearest of `centres` [K, 3] as int [H, W]."""
    lab = cv2.cvtColor(cv2.medianBlur(image, 5), cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.float32)
    if centres is None:
        return lab
    return ((centres**2).sum(1) - 2 * lab @ centres.T).argmin(1).reshape(image.shape[:2])


def fit_clusters(rows: list, clusters: int) -> np.ndarray:
    """Centres [K, 3] of the training images' colours."""
    rng = np.random.default_rng(0)
    pixels = np.concatenate([rng.choice(colour_clusters(image), 400) for image, _, _ in rows])
    cv2.setRNGSeed(0)
    return cv2.kmeans(pixels, clusters, np.empty(0), (3, 20, 1.0), 1, cv2.KMEANS_PP_CENTERS)[2]


def components(classes: np.ndarray, categories: Categories, smallest: int) -> Segmentation:
    """Stuff merged by class, things as connected components of at least `smallest` pixels."""
    segments, labels = np.zeros(classes.shape, np.int32), []
    for c in np.unique(classes):
        if not categories.is_thing[c]:
            labels.append(c)
            segments[classes == c] = len(labels)
            continue
        number, pieces, stats, _ = cv2.connectedComponentsWithStats((classes == c).astype(np.uint8), connectivity=4)
        for k in range(1, number):
            if stats[k, cv2.CC_STAT_AREA] >= smallest:
                labels.append(c)
                segments[pieces == k] = len(labels)
    return Segmentation(segments, np.array(labels, np.int64))


def colour_pq(splits: dict, categories: Categories, clusters: int, bands: int) -> float:
    """Val PQ of colour clustering + components + the class that is most frequent in training at that colour.

    `bands` > 1 makes the rule stronger: it may know in which of so many bands of the image a pixel lies.
    """

    def cells(image: np.ndarray) -> np.ndarray:
        band = np.arange(image.shape[0]) * bands // image.shape[0]
        return colour_clusters(image, centres) * bands + band[:, None]

    centres = fit_clusters(splits["train"], clusters)
    classes, size = len(categories), clusters * bands
    table = np.zeros((size, classes))
    for image, truth, _ in splits["train"]:
        semantic = truth.semantic()
        pairs = (cells(image) * classes + semantic)[semantic >= 0]
        table += np.bincount(pairs, minlength=size * classes).reshape(size, classes)
    total = QualityCounts.zeros(len(categories))
    for image, truth, _ in splits["val"]:
        prediction = components(table.argmax(1)[cells(image)], categories, 60)
        total = total + count(truth, prediction, categories)
    return quality(total, categories).all.pq


@pytest.mark.parametrize(("clusters", "bands"), [(16, 1), (64, 1), (64, 6)])
def test_colour_alone_does_not_solve_the_scenes(
    splits: dict, categories: Categories, clusters: int, bands: int
) -> None:
    pq = colour_pq(splits, categories, clusters, bands)
    print(f"{clusters} colours, {bands} bands: PQ {pq:.1f}")
    assert 2 < pq < 25
