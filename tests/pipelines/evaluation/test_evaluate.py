"""Evaluation of a stored model: the same figures from one process and from actors of which one dies; the report."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panoptic.segmentation import Categories
from pipelines.data.manifest import Manifest


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory, small_categories: Categories) -> Manifest:
    from tests.support.stored import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"), small_categories, 8)


@pytest.fixture(scope="module")
def assigned(val: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`assigned(seed)` is the task of evaluating a random model."""
    from pipelines.evaluation.evaluate import assign
    from pipelines.presets import PRESETS
    from tests.support.stored import write_model

    folder = tmp_path_factory.mktemp("models")
    return lambda seed=0: assign(write_model(folder / f"random-{seed}", val.categories, seed), val, PRESETS["demo"]())


def figures(evaluation) -> dict[str, float]:
    from panoptic.metrics.report import metrics

    return {name: value for name, value in metrics(evaluation).items() if "time/" not in name}


def test_a_killed_actor_costs_time_only(ray_cluster: None, assigned: Callable, tmp_path: Path) -> None:
    from panoptic.evaluation.tally import summarise
    from pipelines.cluster.actor_pool import Pool, each
    from pipelines.evaluation.evaluate import Chunk, evaluate
    from tests.support.stored import mortal

    task = assigned()
    alone = evaluate(task, Pool(0)).evaluation
    assert alone.images == 8 and alone.timings["images_per_second"] > 0
    chunks = [Chunk(0, range(first, first + 2)) for first in range(0, 8, 2)]
    parts = list(each(mortal, ((task,), str(tmp_path / "died")), chunks, Pool(2, threads=1)))
    assert (tmp_path / "died").exists() and len(parts) == 4
    again = summarise([part.tally for part in parts], task.manifest.categories)
    np.testing.assert_equal(figures(again), figures(alone))


def test_batches_are_like_single_images(assigned: Callable, val: Manifest) -> None:
    from panoptic.evaluation.step import evaluation_step
    from pipelines.evaluation.evaluate import placed
    from pipelines.training.validation import share_batches

    task = assigned()
    model = placed(task)
    one = replace(task, experiment=replace(task.experiment, train=replace(task.experiment.train, validation_batch=1)))
    found = []
    for each_task in (task, one):
        maps = {}
        for batch in share_batches(val, each_task.experiment, model.divisor, rows=range(6)):
            step = evaluation_step(model, batch.images, batch.targets, task.experiment.engine, losses=False)
            assert step.losses == {}
            maps |= dict(zip(batch.rows, step.prediction.maps, strict=True))
        found.append(maps)
    for row in range(6):
        assert (found[0][row].segments == found[1][row].segments).mean() > 0.999  # kernels may differ in the last bit


def test_rows_that_get_lost_are_noticed(assigned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.cluster.actor_pool import Pool
    from pipelines.evaluation import evaluate

    monkeypatch.setattr(evaluate, "each", lambda *_: iter(()))
    with pytest.raises(RuntimeError, match="8 images were not evaluated"):
        evaluate.evaluate(assigned(), Pool(0))


def test_images_that_kill_every_actor_are_named(assigned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.cluster.actor_pool import Killed, Pool
    from pipelines.evaluation import evaluate

    def dying(*_: object):
        raise Killed(evaluate.Chunk(0, range(2, 4)), 4)
        yield

    task = assigned()
    names = [image.name for _, image in sorted(evaluate.evaluate(task, Pool(0)).tally.images.items())]
    monkeypatch.setattr(evaluate, "each", dying)
    with pytest.raises(ValueError, match=f"^one of 2 images, {names[2]}, {names[3]}: rows 2 to 3: the actor died 4"):
        evaluate.evaluate(task, Pool(0))


def test_the_device_is_that_of_the_actors(assigned: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the driver, which may have another, or none."""
    import torch

    from pipelines.cluster.actor_pool import Pool
    from pipelines.evaluation import evaluate
    from pipelines.evaluation.record import facts

    task, counter, names = assigned(), evaluate.counter, iter(["H100", "A10", "H100", "H100"])

    def elsewhere(tasks):
        count = counter(tasks)
        return lambda chunk: replace(count(chunk), device=next(names))

    assert facts(evaluate.evaluate(task, Pool(0, threads=1)))["device"] == "CPU, 1 thread a process"
    monkeypatch.setattr(evaluate, "counter", elsewhere)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert facts(evaluate.evaluate(task, Pool(0)))["device"] == "A10; H100"


def test_the_identity_is_that_of_the_content(tmp_path: Path, small_categories) -> None:
    from pipelines.evaluation.evaluate import identify
    from tests.support.stored import write_model

    uri, first = identify(write_model(tmp_path / "a", small_categories))
    assert uri.endswith("a/checkpoint.pt") and identify(uri) == (uri, first)
    assert identify(write_model(tmp_path / "a", small_categories, seed=1))[1] != first
    with pytest.raises(ValueError, match="no checkpoint there"):
        identify(str(tmp_path / "b"))


def test_the_report_is_one_file_with_everything(assigned: Callable) -> None:
    from pipelines.cluster.actor_pool import Pool
    from pipelines.evaluation.evaluate import evaluate
    from pipelines.evaluation.record import html

    first, second = (evaluate(assigned(seed), Pool(0)) for seed in (0, 1))
    text = html(first, [second], examples=2)
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|<script|https?://", text)
    for title in (
        "Classes",
        "Size of segments",
        "Who is taken for what",
        "Speed",
        "Worst images",
        "What was evaluated",
    ):
        assert f"<h2>{title}</h2>" in text
    assert re.search(r"<h2>Against models\d*/random-1</h2>", text) and text.count("<h2>Against ") == 1
    assert text.count('src="data:image/jpeg;base64,') == 4 * 4  # panels of two worst and two typical images
    assert text.count("<circle") == 2  # speed against PQ
    assert first.task.manifest.hash in text and first.task.identity in text
    assert all(name in text for name in first.task.manifest.categories.names[:3])
    assert not re.search(r">\s*[+-]?nan|:nan", text)


def test_a_part_of_a_split_is_evaluated_alone(assigned: Callable, val: Manifest) -> None:
    """Its counts are those in the whole; its hash is its own, so that no figures are taken for others'."""
    from pipelines.cluster.actor_pool import Pool
    from pipelines.evaluation import evaluate

    task, part = assigned(), val.part((1, 4, 6))
    whole, some = (evaluate.evaluate(replace(task, manifest=one), Pool(0)).tally.images for one in (val, part))
    assert {row: counts.name for row, counts in some.items()} == {0: "1.jpg", 1: "4.jpg", 2: "6.jpg"}
    for place, row in enumerate((1, 4, 6)):
        one, other = (counts.pq(len(val.categories)) for counts in (whole[row], some[place]))
        assert whole[row].name == some[place].name and one == pytest.approx(other, nan_ok=True)
    assert part.hash != val.hash and part.hash != val.part((1, 4, 7)).hash and part.whole == val
    assert val.part(()) is val and part.to_json() == replace(val, rows=3, hash=part.hash).to_json()


def test_images_of_a_part_that_kill_every_actor_are_named(
    assigned: Callable, val: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cluster.actor_pool import Killed, Pool
    from pipelines.evaluation import evaluate

    def dying(*_: object):
        raise Killed(evaluate.Chunk(0, range(1, 2)), 4)
        yield

    monkeypatch.setattr(evaluate, "each", dying)
    with pytest.raises(ValueError, match=r"^one of 1 images, 4\.jpg"):
        evaluate.evaluate(replace(assigned(), manifest=val.part((1, 4, 6))), Pool(0))


def test_the_driver_keeps_few_bytes_an_image(val: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds at most, from parts of 16 images as actors return them to the intervals of the report."""
    from panoptic.evaluation.tally import Measures, Tally
    from panoptic.metrics.average_precision import InstanceMatches
    from panoptic.metrics.bootstrap import intervals
    from panoptic.metrics.image import ImageCounts, ImageRecords
    from pipelines.cluster.actor_pool import Pool
    from pipelines.evaluation import evaluate
    from pipelines.evaluation.record import counts_of
    from pipelines.presets import PRESETS

    names = tuple(map(str, range(133)))
    coco = Categories(names, (True,) * 80 + (False,) * 53, tuple(range(133)), ((0, 0, 0),) * 133)
    rng = np.random.default_rng(0)

    def some(classes: int) -> tuple[np.ndarray, np.ndarray]:
        return np.sort(rng.choice(133, classes, replace=False)), rng.integers(1, 4, (classes, 4)) * [0.3, 1, 1, 1]

    def matches() -> InstanceMatches:
        """20 instances of an image, of which AP is counted, too."""
        taken, crowd = rng.integers(0, 1024, (2, 20)).astype(np.uint16)
        return InstanceMatches(np.sort(rng.integers(0, 80, 20)), rng.random(20), taken, crowd, np.arange(7))

    def actors(build: object, arguments: object, chunks: list[evaluate.Chunk], pool: Pool) -> Iterator[evaluate._Part]:
        for chunk in chunks:
            images = {
                row: ImageCounts(
                    some(8),
                    (some(2), some(3), some(4)),
                    rng.integers(0, 134, (10, 3)),
                    some(8),
                    matches(),
                    name=f"{row:016d}.jpg",
                )
                for row in chunk.rows
            }
            part = evaluate._Part(0, Tally(ImageRecords(images), np.ones((133, 134), np.int64)), "CPU", 0, 1)
            yield pickle.loads(pickle.dumps(part))

    def figures_of(rows: int) -> None:
        options = PRESETS["demo"]()
        one = replace(options, train=replace(options.train, validation_batch=1))
        task = evaluate.Task("", "", "", replace(val, rows=rows, categories=coco), one, Measures(boundary=True))
        intervals(counts_of(evaluate.evaluate(task, Pool(0)).tally), coco, rounds=200)

    def most(rows: int) -> int:
        """Bytes at the peak."""
        tracemalloc.start()
        try:
            figures_of(rows)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(evaluate, "each", actors)
    figures_of(16)  # imports what it takes
    few, many = most(160), most(800)
    assert (many - few) / 640 < 2500
