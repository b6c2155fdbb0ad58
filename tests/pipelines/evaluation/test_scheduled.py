"""Scheduled evaluation: once for each key, one of two at once, the reference, promotion."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from panoptic.evaluation.tally import Measures, Tally, summarise
from panoptic.metrics.image import ImageRecords, count_image
from panoptic.segmentation import Categories, Segmentation
from pipelines.cluster import lease, storage
from pipelines.cluster.actor_pool import Pool
from pipelines.cluster.lease import Busy, acquire
from pipelines.data.manifest import Manifest
from pipelines.evaluation import record, scheduled
from pipelines.evaluation.evaluate import EvaluatedTask, Task
from pipelines.evaluation.record import Places, Worse, key_of
from pipelines.evaluation.scheduled import Reference
from pipelines.presets import PRESETS
from pipelines.tracking import registry
from tests.support.s3_proxy import S3Proxy, one_in
from tests.support.s3_server import ENVIRONMENT, s3_server


@pytest.fixture
def places(mlflow_store: str, tmp_path: Path) -> Places:
    """A store in which models 1 to 3 of "street" are registered, the first of them its champion."""
    from pipelines.tracking.client import connect

    client = connect(mlflow_store)
    client.create_registered_model("street")
    for _ in range(3):
        client.create_model_version("street", source="nowhere")
    client.set_registered_model_alias("street", "champion", "1")
    return Places(mlflow_store, folder=str(tmp_path / "evaluations"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Identities of evaluated models. Versions 1, 2, 3 find 30, 60, 90 % of the segments of 40 images, unloaded."""
    done: list[str] = []

    def evaluate(task: Task, pool: Pool) -> EvaluatedTask:
        done.append(task.identity)
        rng, share = np.random.default_rng(0), 0.3 * int(task.identity[-1])
        tally = Tally()
        for row in range(40):
            truth = Segmentation(np.array([[1, 1, 2, 2]], np.int32), np.array([0, 1]))
            found = Segmentation(np.where(rng.random(4)[[0, 0, 1, 1]] < share, truth.segments, 0).astype(np.int32),
                                 truth.labels)  # fmt: skip
            image = count_image(truth, found, 5, name=f"{row}.jpg")
            tally.add(Tally(ImageRecords({row: image}), np.eye(5, 6, dtype=np.int64)))
        return EvaluatedTask(task, summarise([tally], task.manifest.categories), tally)

    monkeypatch.setattr(record, "evaluate", evaluate)
    monkeypatch.setattr(record, "resolved", lambda asked: asked)
    monkeypatch.setattr(record, "pictures", lambda *_: [])
    return done


@pytest.fixture
def ask(places: Places, small_categories: Categories):
    manifest = Manifest(
        2, "val", 40, "hash", small_categories, (), "", 1, 4, (0,) * 5, 0, 0, 0, (), 0, {}, uri="/shards/val"
    )

    def task(uri: str) -> Task:
        fixed = registry.pin(uri, places.tracking_uri)
        return Task(fixed, places.tracking_uri, fixed, manifest, PRESETS["demo"](), Measures())

    return task


def champion(places: Places) -> str:
    return registry.pin("models:/street@champion", places.tracking_uri)


def test_once_is_once(places: Places, evaluated: list[str], ask, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (scheduled.scheduled(ask, "models:/street/1", Pool(0), places, Reference()) for _ in range(2))
    assert first is not None and again is not None and evaluated == ["models:/street/1"]
    assert again.run == first.run and again.pq == pytest.approx(first.pq)
    assert again.counts.names == first.counts.names and (again.counts.values == first.counts.values).all()
    assert "as evaluated before" in capsys.readouterr().out.splitlines()[-1]
    assert b"<h2>Classes</h2>" in registry.read_artifact(first.run, "report.html")
    assert list(Path(places.folder).glob("*.html"))


def test_two_at_once_do_it_once(places: Places, evaluated: list[str], ask, capsys: pytest.CaptureFixture[str]) -> None:
    task = ask("models:/street/1")
    other = acquire(f"{places.folder}/leases/{key_of(task)}")
    assert other is not None
    assert scheduled.scheduled(ask, "models:/street/1", Pool(0), places, Reference()) is None
    assert evaluated == [] and f"being evaluated by {other.owner}" in capsys.readouterr().out
    other.renew(0)  # it died
    assert scheduled.scheduled(ask, "models:/street/1", Pool(0), places, Reference()) is not None
    assert len(evaluated) == 1


def test_leases_on_a_store_that_fails_one_request_in_ten(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done, as on any other; a store that is gone or silent ends it in bounded time."""
    import boto3

    with s3_server() as endpoint:
        proxy = S3Proxy(endpoint)
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": proxy.uri, storage.PATIENCE: "2"}.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="evaluations")
        there = replace(places, folder="s3://evaluations/all")
        kinds = [one_in(30, "busy"), one_in(30, "drop"), one_in(30, "lose")]
        for number, choose in enumerate(kinds):  # not all at the same request
            for _ in range(10 * number):
                choose("", "")
        proxy.fault = lambda method, path: next(filter(None, [choose(method, path) for choose in kinds]), "")
        begin = time.monotonic()
        assert scheduled.scheduled(ask, "models:/street/3", Pool(0), there, replace(CHAMPION, promote=True)) is not None
        assert time.monotonic() - begin < 30 and proxy.times("busy", "drop", "lose") >= 4
        assert champion(places) == "models:/street/3" and evaluated == ["models:/street/3", "models:/street/1"]
        monkeypatch.setenv(storage.PATIENCE, "0.2")
        for gone in (False, True):
            proxy.fault = lambda method, path: "silent"
            if gone:
                proxy.stop()
            begin = time.monotonic()
            with pytest.raises(storage.Unavailable, match=r"^s3://evaluations/all/leases/\S+: could not be"):
                scheduled.scheduled(ask, "models:/street/2", Pool(0), there, Reference())
            assert time.monotonic() - begin < 20
        proxy.stop()
    assert evaluated == ["models:/street/3", "models:/street/1"]


def test_the_key_is_model_data_and_computation(ask) -> None:
    task = ask("models:/street/1")
    engine = replace(task.experiment.engine, channels_last=not task.experiment.engine.channels_last)
    others = [
        ask("models:/street/2"),
        replace(task, manifest=replace(task.manifest, hash="other")),
        replace(task, measures=Measures(boundary=True)),
        replace(task, experiment=replace(task.experiment, engine=engine)),
    ]
    assert len({key_of(other) for other in [task, *others]}) == 5
    same = replace(task, experiment=replace(task.experiment, name="x"), tracking_uri="elsewhere")
    assert key_of(same) == key_of(task)


CHAMPION = Reference("models:/street@champion", margin=1.0)


def test_the_reference(places: Places, evaluated: list[str], ask) -> None:
    reference = replace(CHAMPION, promote=True)
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, reference)
    assert champion(places) == "models:/street/3" and evaluated == ["models:/street/3", "models:/street/1"]
    with pytest.raises(Worse, match=r"below the reference's .*more than the margin of 1"):
        scheduled.scheduled(ask, "models:/street/2", Pool(0), places, reference)
    # a verdict that was given is not given a second time
    assert scheduled.scheduled(ask, "models:/street/2", Pool(0), places, reference) is not None
    assert champion(places) == "models:/street/3"
    assert scheduled.scheduled(ask, "models:/street@champion", Pool(0), places, reference) is not None
    with pytest.raises(ValueError, match="give an alias of a registered model"):
        scheduled.scheduled(ask, "models:/street/2", Pool(0), places, Reference("street"))
    with pytest.raises(ValueError, match=r"street@nobody: not found in .*--promote"):
        scheduled.scheduled(ask, "models:/street/2", Pool(0), places, Reference("models:/street@nobody"))


def test_a_verdict_comes_once_for_each_reference_and_margin(places: Places, evaluated: list[str], ask) -> None:
    """Also where the evaluation was there before anybody compared it."""
    registry.move_alias(CHAMPION.uri, "models:/street/3", places.tracking_uri)
    scheduled.scheduled(ask, "models:/street/1", Pool(0), places, Reference())
    for reference in (CHAMPION, replace(CHAMPION, margin=2.0)):
        with pytest.raises(Worse):
            scheduled.scheduled(ask, "models:/street/1", Pool(0), places, reference)
        assert scheduled.scheduled(ask, "models:/street/1", Pool(0), places, reference) is not None
    registry.move_alias(CHAMPION.uri, "models:/street/2", places.tracking_uri)
    with pytest.raises(Worse):
        scheduled.scheduled(ask, "models:/street/1", Pool(0), places, CHAMPION)
    assert len(evaluated) == 3


def test_a_process_that_dies_before_the_verdict_leaves_it_to_the_next(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.move_alias(CHAMPION.uri, "models:/street/3", places.tracking_uri)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scheduled, "_compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        scheduled.scheduled(ask, "models:/street/1", Pool(0), places, CHAMPION)
    with pytest.raises(Worse):
        scheduled.scheduled(ask, "models:/street/1", Pool(0), places, CHAMPION)
    assert len(evaluated) == 2


def test_a_reference_that_another_process_evaluates_is_no_success(places: Places, evaluated: list[str], ask) -> None:
    other = acquire(f"{places.folder}/leases/{key_of(ask('models:/street/1'))}")
    assert other is not None
    with pytest.raises(Busy, match=r"street 1.* is being evaluated: nothing was compared, try again"):
        scheduled.scheduled(ask, "models:/street/3", Pool(0), places, CHAMPION)
    other.renew(0)
    assert scheduled.scheduled(ask, "models:/street/3", Pool(0), places, CHAMPION) is not None
    assert evaluated == ["models:/street/3", "models:/street/1"]


def test_a_promotion_that_was_not_asked_for_is_made_up_for(places: Places, evaluated: list[str], ask) -> None:
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, CHAMPION)
    assert champion(places) == "models:/street/1"
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, replace(CHAMPION, promote=True))
    assert champion(places) == "models:/street/3" and len(evaluated) == 2


def test_no_promotion_is_lost(places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 was compared with 1 when 3 took the alias: it must not take it from 3."""
    reference, evaluate = replace(CHAMPION, promote=True), record.evaluate

    def slow(task: Task, pool: Pool) -> EvaluatedTask:
        if task.uri.endswith("/1"):  # the reference of version 2: meanwhile 3 is promoted
            registry.move_alias(CHAMPION.uri, "models:/street/3", places.tracking_uri)
        return evaluate(task, pool)

    monkeypatch.setattr(record, "evaluate", slow)
    with pytest.raises(Worse):
        scheduled.scheduled(ask, "models:/street/2", Pool(0), places, reference)
    assert champion(places) == "models:/street/3"
    assert evaluated == ["models:/street/2", "models:/street/1", "models:/street/3"]


def test_one_at_a_time_moves_an_alias(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 0.1)
    seen, check = [], scheduled.check

    def checked(*arguments):
        folder = next(name for name in storage.list_files(f"{places.folder}/leases") if "alias" in name)
        seen.append(acquire(f"{places.folder}/leases/{folder.split('/')[0]}"))
        return check(*arguments)

    monkeypatch.setattr(scheduled, "check", checked)
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, replace(CHAMPION, promote=True))
    assert seen == [None] and champion(places) == "models:/street/3"


def test_few_images_promote_nobody(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("panoptic.metrics.bootstrap.LEAST", 41)
    monkeypatch.setattr(record, "LEAST", 41)
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, replace(CHAMPION, promote=True))
    assert champion(places) == "models:/street/1"
    assert "40 images are too few to tell from chance, which takes 41" in capsys.readouterr().out


def test_what_cannot_be_promoted_is_refused_before_any_evaluation(places: Places, evaluated: list[str], ask) -> None:
    for model in ("models:/m-0123456789abcdef", "models:/other/1"):
        with pytest.raises(ValueError, match="both must be versions of one registered model"):
            scheduled.scheduled(ask, model, Pool(0), places, replace(CHAMPION, promote=True))
    assert evaluated == []


def test_what_is_done_is_found_without_a_model(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduled.scheduled(ask, "models:/street/3", Pool(0), places, CHAMPION)

    def loaded(task: Task) -> Task:
        raise AssertionError(f"{task.uri} was loaded")

    monkeypatch.setattr(record, "resolved", loaded)
    assert scheduled.scheduled(ask, "models:/street/3", Pool(0), places, CHAMPION) is not None


def test_who_was_followed_records_nothing(
    places: Places, evaluated: list[str], ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A holder whose lease expired while it worked, and the one that took over."""
    task, evaluate = ask("models:/street/1"), record.evaluate
    dead = acquire(f"{places.folder}/leases/{key_of(task)}", 0.01)
    assert dead is not None
    time.sleep(0.05)

    def overtaken(task: Task, pool: Pool) -> EvaluatedTask:
        mine = storage.list_files(f"{places.folder}/leases/{key_of(task)}")
        assert mine == ["000001.json", "000002.json"]  # the dead one was followed
        storage.create(f"{places.folder}/leases/{key_of(task)}/000003.json", b'{"owner": "late", "expires": 0}')
        return evaluate(task, pool)

    with monkeypatch.context() as patch:
        patch.setattr(record, "evaluate", overtaken)
        assert record.once(task, Pool(0), places) == (None, False)
    assert "taken over by late; nothing was recorded" in capsys.readouterr().out
    found, made = record.once(task, Pool(0), places)
    assert found is not None and made and len(evaluated) == 2


def test_a_first_champion_and_no_checkpoint_as_one(places: Places, evaluated: list[str], ask) -> None:
    reference = Reference("models:/street@best", promote=True)
    scheduled.scheduled(ask, "models:/street/2", Pool(0), places, reference)
    assert registry.pin("models:/street@best", places.tracking_uri) == "models:/street/2"
    with pytest.raises(ValueError, match="both must be versions of one registered model"):
        registry.move_alias("models:/street@best", "/runs/step_1/checkpoint.pt", places.tracking_uri)
    with pytest.raises(ValueError, match="not found"):
        registry.pin("models:/street@nobody", places.tracking_uri)
    assert evaluated == ["models:/street/2"]
