"""Predictions under a class map: the figures are those of mapped maps, and what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from panoptic.segmentation import Categories
from pipelines.data.class_map import ClassMap, parse
from pipelines.evaluation.mapped_model import MappedModel, mapping_of
from tests.support.stored import write_model, write_shards

MAP = {
    "version": 1,
    "classes": [{"name": "living", "from": ["person", "dog"]}, {"name": "ground", "from": ["road", "sky"]}],
    "rest": "void",
}
COARSE = Categories(("Ground", "living"), (False, True), (1, 2), ((1, 1, 1), (2, 2, 2)))


def class_map(content: dict) -> ClassMap:
    return parse(json.dumps(content).encode(), "coarse.json")


def test_the_map_takes_the_order_and_the_names_of_the_data(small_categories: Categories) -> None:
    mapping = mapping_of(class_map(MAP), small_categories, COARSE)
    assert mapping.categories == COARSE and mapping.targets == (1, 0, -1, 0, 1)
    assert mapping.describe(small_categories) == "Ground = sky + road, living = person + dog"
    assert mapping.removed(small_categories) == "car"
    assert mapping_of(class_map(MAP), small_categories, None).categories.names == ("living", "ground")


def test_other_classes_than_the_data_has_are_named(small_categories: Categories) -> None:
    wider = Categories(("ground", "living", "tree"), (False, False, False), (1, 2, 3), ((1, 1, 1),) * 3)
    with pytest.raises(
        ValueError, match=r"only the map has living \(thing\).*only the data has living \(stuff\), tree"
    ):
        mapping_of(class_map(MAP), small_categories, wider)


def test_figures_are_those_of_mapped_predictions(tmp_path: Path, small_categories: Categories) -> None:
    from panoptic.evaluation.tally import Measures
    from panoptic.metrics.image import count_image
    from pipelines.cluster.actor_pool import Pool
    from pipelines.data.loader import evaluation_batches
    from pipelines.evaluation.evaluate import ask, classes_of, evaluate, placed, resolved
    from pipelines.evaluation.record import facts, key_of
    from pipelines.presets import PRESETS

    (tmp_path / "shards").mkdir()
    val = write_shards(tmp_path / "shards", COARSE, 6)
    uri = write_model(tmp_path / "model", small_categories)
    measures = Measures(boundary=True, instances=True, losses=False)
    plain = ask(uri, val, PRESETS["demo"](), measures=measures)
    with pytest.raises(ValueError, match="--map-prediction FILE"):
        resolved(plain)
    asked = ask(uri, val, PRESETS["demo"](), measures=measures, class_map=class_map(MAP))
    task = resolved(asked)
    assert key_of(asked) != key_of(plain) and classes_of(task) == COARSE
    model = placed(task)
    assert isinstance(model, MappedModel) and not model.training and task.mapping is not None
    evaluated = evaluate(task, Pool(0))
    evaluation = evaluated.evaluation
    assert evaluation.quality.categories == COARSE and evaluation.precision is not None
    expected, segments = np.zeros((2, 4)), 0
    for images, targets, samples in evaluation_batches(val, task.experiment.resize, 2, divisor=model.divisor):
        outputs = model.network(images, targets.frame)
        maps = model.model.postprocess(outputs, targets.frame, ("maps",)).maps
        assert maps is not None
        for own, sample in zip(maps, samples, strict=True):
            assert sample.original is not None
            places, counts = count_image(sample.original, task.mapping.segmentation(own), 2).quality
            expected[places] += counts
            segments += len(own.labels)
    counted = np.zeros((2, 4))
    for image in evaluated.tally.images.values():
        places, counts = image.quality
        counted[places] += counts
    np.testing.assert_array_equal(counted, expected)
    assert segments > 0
    said = facts(evaluated)
    assert said["removed before anything is counted"] == "car" and said["map_prediction"] == class_map(MAP).digest


def test_a_model_brings_the_class_map_that_it_was_trained_under(tmp_path: Path, small_categories: Categories) -> None:
    from panoptic.evaluation.tally import Measures
    from pipelines.data.class_map import ClassesOf, resolve
    from pipelines.evaluation.evaluate import ask, resolved
    from pipelines.presets import PRESETS

    (tmp_path / "shards").mkdir()
    val = write_shards(tmp_path / "shards", small_categories, 4)
    made = resolve(class_map(MAP), [ClassesOf("set", small_categories)])
    uri = write_model(tmp_path / "model", made.mappings[0].categories, class_map=made.record)
    base, measures = PRESETS["demo"](), Measures(losses=False)
    with pytest.raises(ValueError, match="--map-prediction FILE"):  # where nobody allows a copy
        resolved(ask(uri, val, base, measures=measures))
    asked = ask(uri, val, base, measures=measures, cache=str(tmp_path / "cache"))
    task = resolved(asked)
    assert task.manifest.categories.names == ("living", "ground") and task.manifest.rows == val.rows
    assert task.manifest.source["class_map"]["sha256"] == made.record["sha256"]
    assert resolved(asked).manifest.uri == task.manifest.uri != val.uri
    own = resolved(ask(uri, task.manifest, base, measures=measures, cache=str(tmp_path / "cache")))
    assert own.manifest == task.manifest  # has the model's classes already


def test_files_of_a_mapped_prediction(tmp_path: Path, small_categories: Categories) -> None:
    import cv2

    from jobs import predict

    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "photos" / "a.png"), pixels)
    (tmp_path / "coarse.json").write_text(json.dumps(MAP))
    model = write_model(tmp_path / "model", small_categories)
    arguments = [model, str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--actors", "0"]
    predict.main([*arguments, "--map-prediction", str(tmp_path / "coarse.json"), "--tracking.uri", "unused"])
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [entry["name"] for entry in content["categories"]] == ["living", "ground"]
    infos = content["annotations"][0]["segments_info"]
    assert infos and {info["category_id"] for info in infos} <= {0, 1}
    assert sum(info["category_id"] == 1 for info in infos) <= 1


def test_both_sides_come_to_one_list(
    tmp_path: Path, small_categories: Categories, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import evaluate

    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", small_categories, 4)
    (tmp_path / "coarse.json").write_text(json.dumps(MAP))
    model, file = write_model(tmp_path / "model", small_categories), str(tmp_path / "coarse.json")
    arguments = [model, "--data.root", str(tmp_path / "shards"), "--data.shards", str(tmp_path / "cache"), "--quick"]
    arguments += ["--actors", "0", "--no-log", "--out", str(tmp_path / "out"), "--tracking.uri", f"file:{tmp_path}/ml"]
    evaluation = evaluate.main([*arguments, "--data.class-map", file, "--map-prediction", file])
    assert evaluation is not None and evaluation.images == 4
    assert evaluation.quality.categories.names == ("living", "ground")
    (page,) = (tmp_path / "out").glob("*.html")
    assert "ground = sky + road" in page.read_text() and "living" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--map-prediction FILE.*--data\.class-map FILE"):
        evaluate.main([*arguments, "--data.class-map", file])
