"""Scheduled evaluation: once for each key, one of two at once, the reference, promotion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panoptic.evaluation import Measures, Tally, summarise
from panoptic.metrics.image import count_image
from panoptic.segmentation import Categories, Segmentation
from pipelines import judging, registry, scheduled
from pipelines.actors import Pool
from pipelines.evaluate import Judgement, Task
from pipelines.judging import Places, Worse, key_of
from pipelines.lease import acquire
from pipelines.manifest import Manifest
from pipelines.presets import PRESETS
from pipelines.scheduled import Reference


@pytest.fixture
def places(mlflow_store: str, tmp_path: Path) -> Places:
    """A store in which models 1 to 3 of "street" are registered, the first of them its champion."""
    from pipelines.tracking import connect

    client = connect(mlflow_store)
    client.create_registered_model("street")
    for _ in range(3):
        client.create_model_version("street", source="nowhere")
    client.set_registered_model_alias("street", "champion", "1")
    return Places(mlflow_store, folder=str(tmp_path / "evaluations"))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was judged; version v finds 30, 60, 90 % of the segments of 40 images, without a model."""
    done: list[str] = []

    def evaluate(task: Task, pool: Pool) -> Judgement:
        done.append(task.identity)
        rng, share = np.random.default_rng(0), 0.3 * int(task.identity[-1])
        tally = Tally()
        for row in range(40):
            truth = Segmentation(np.array([[1, 1, 2, 2]], np.int32), np.array([0, 1]))
            found = Segmentation(np.where(rng.random(4)[[0, 0, 1, 1]] < share, truth.segments, 0).astype(np.int32),
                                 truth.labels)  # fmt: skip
            tally.add(Tally({row: count_image(truth, found, 5, name=f"{row}.jpg")}, np.eye(5, 6, dtype=np.int64)))
        return Judgement(task, summarise([tally], task.manifest.categories), tally)

    monkeypatch.setattr(judging, "evaluate", evaluate)
    monkeypatch.setattr(judging, "pictures", lambda *_: [])
    return done


@pytest.fixture
def assign(places: Places, small_categories: Categories):
    manifest = Manifest(1, "val", 40, "hash", small_categories, (), 1, 4, (0,) * 5, 0, 0, 0, (), 0, {}, "/shards/val")

    def task(uri: str) -> Task:
        fixed = registry.pin(uri, places.tracking_uri)
        return Task(fixed, places.tracking_uri, fixed, manifest, PRESETS["demo"](), Measures())

    return task


def champion(places: Places) -> str:
    return registry.pin("models:/street@champion", places.tracking_uri)


def test_once_is_once(places: Places, judged: list[str], assign, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (scheduled.scheduled(assign, "models:/street/1", Pool(0), places, Reference()) for _ in range(2))
    assert first is not None and again is not None and judged == ["models:/street/1"]
    assert again.run == first.run and again.pq == pytest.approx(first.pq)
    assert again.counts.names == first.counts.names and (again.counts.values == first.counts.values).all()
    assert "as evaluated before" in capsys.readouterr().out.splitlines()[-1]
    assert b"<h2>Classes</h2>" in registry.read_artifact(first.run, "report.html")
    assert list(Path(places.folder).glob("*.html"))


def test_two_at_once_do_it_once(places: Places, judged: list[str], assign, capsys: pytest.CaptureFixture[str]) -> None:
    task = assign("models:/street/1")
    other = acquire(f"{places.folder}/leases/{key_of(task)}")
    assert other is not None
    assert scheduled.scheduled(assign, "models:/street/1", Pool(0), places, Reference()) is None
    assert judged == [] and f"being evaluated by {other.owner}" in capsys.readouterr().out
    other.renew(0)  # it died
    assert scheduled.scheduled(assign, "models:/street/1", Pool(0), places, Reference()) is not None
    assert len(judged) == 1


def test_the_key_is_model_data_and_computation(assign) -> None:
    task = assign("models:/street/1")
    engine = replace(task.experiment.engine, channels_last=not task.experiment.engine.channels_last)
    others = [
        assign("models:/street/2"),
        replace(task, manifest=replace(task.manifest, hash="other")),
        replace(task, measures=Measures(boundary=True)),
        replace(task, experiment=replace(task.experiment, engine=engine)),
    ]
    assert len({key_of(other) for other in [task, *others]}) == 5
    same = replace(task, experiment=replace(task.experiment, name="x"), tracking_uri="elsewhere")
    assert key_of(same) == key_of(task)


def test_the_reference(places: Places, judged: list[str], assign) -> None:
    reference = Reference("models:/street@champion", margin=1.0, promote=True)
    scheduled.scheduled(assign, "models:/street/3", Pool(0), places, reference)
    assert champion(places) == "models:/street/3" and judged == ["models:/street/3", "models:/street/1"]
    with pytest.raises(Worse, match=r"below the reference's .*more than the margin of 1"):
        scheduled.scheduled(assign, "models:/street/2", Pool(0), places, reference)
    # what is there raises nothing a second time
    assert scheduled.scheduled(assign, "models:/street/2", Pool(0), places, reference) is not None
    assert champion(places) == "models:/street/3"
    assert scheduled.scheduled(assign, "models:/street@champion", Pool(0), places, reference) is not None
    with pytest.raises(ValueError, match="give an alias of a registered model"):
        scheduled.scheduled(assign, "models:/street/2", Pool(0), places, Reference("street"))


def test_a_first_champion_and_no_checkpoint_as_one(places: Places, judged: list[str], assign) -> None:
    reference = Reference("models:/street@best", promote=True)
    scheduled.scheduled(assign, "models:/street/2", Pool(0), places, reference)
    assert registry.pin("models:/street@best", places.tracking_uri) == "models:/street/2"
    with pytest.raises(ValueError, match="both must be versions of one registered model"):
        registry.move_alias("models:/street@best", "/runs/step_1/checkpoint.pt", places.tracking_uri)
    with pytest.raises(ValueError, match="not found"):
        registry.pin("models:/street@nobody", places.tracking_uri)
    assert judged == ["models:/street/2"]
