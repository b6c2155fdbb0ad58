"""Refused before anything starts: what no worker can train, a cluster that is too small, a run under other options."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from panoptic.segmentation import Categories
from pipelines.cluster import session
from pipelines.config import Experiment, override
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.checkpoints import checkpoint_bytes
from pipelines.training.preflight import (
    STAND_IN,
    check_cluster,
    check_continuation,
    check_disk,
    check_freezing,
    check_machine,
    check_memory,
    check_model,
    check_options,
    check_score,
    lacking,
    meta_model,
    parse_schedule,
)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, ""),
        ({"model.backbone.freeze": 2}, "backbone"),
        ({"model.backbone.freeze": 2, "model.backbone.weights": "R-18.pkl"}, ""),
        ({"model.backbone.freeze": 2, "train.weights": "runs/a/step_000010"}, ""),
        ({"train.freeze": ("backbone.*",)}, "backbone"),
        ({"train.freeze": ("*conv1*",), "model.backbone.weights": "timm"}, ""),
        ({"train.freeze": ("semantic_*",), "model.backbone.weights": "timm"}, "model"),
        ({"train.freeze": ("*",)}, "model"),
        (
            {"model.backbone.name": "test_vit", "train.freeze": ("backbone.*",), "model.backbone.weights": "a.pth"},
            "model",
        ),
        (
            {
                "model.backbone.name": "test_vit",
                "train.freeze": ("backbone.body.*",),
                "model.backbone.weights": "a.pth",
            },
            "",
        ),
    ],
)
def test_what_is_frozen_without_weights(changes: dict[str, Any], missing: str):
    experiment = override(demo(), {"model.backbone.name": "resnet18", **changes})
    assert lacking(experiment) == missing
    if not missing:
        check_freezing(experiment)
        return
    with pytest.raises(ValueError, match="frozen noise measures nothing") as refused:
        check_freezing(experiment)
    assert "--train.weights CHECKPOINT" in str(refused.value)
    assert ("--model.backbone.weights imagenet (or FILE)" in str(refused.value)) == (missing == "backbone")


def test_a_run_with_a_frozen_fresh_backbone_is_refused_before_anything_starts(tmp_path: Path):
    from pipelines.training.driver import train

    frozen = replace(override(demo(), {"model.backbone.freeze": 2}), storage=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.backbone\.freeze 2: no weights were loaded"):
        train(frozen, "demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("runs/a", "{folder}/runs/a"),
        ("/runs/a", "/runs/a"),
        ("s3://bucket/runs/a", "s3://bucket/runs/a"),
        ("hub:detr-r50-coco", "hub:detr-r50-coco"),
        ("", ""),
    ],
)
def test_workers_have_another_working_directory_than_the_driver(given, sent, tmp_path, monkeypatch):
    from pipelines.training.driver import with_absolute_weights

    monkeypatch.chdir(tmp_path)
    experiment = with_absolute_weights(override(demo(), {"train.weights": given}))
    assert experiment.train.weights == sent.format(folder=tmp_path)
    assert experiment.model.backbone.weights == "none"
    experiment = with_absolute_weights(override(demo(), {"model.backbone.weights": "R-18.pkl"}))
    assert experiment.model.backbone.weights == f"{tmp_path}/R-18.pkl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": ".", "data.reader": "voc"}, r"^data\.reader voc: unknown; there are .*coco"),
        ({"model.backbone.name": "resnet19"}, r"backbone\.name: timm cannot build 'resnet19'.*near names: .*resnet1"),
        ({"model.backbone.weights": "nowhere.pkl"}, r"^model\.backbone\.weights nowhere\.pkl: no such file; give none"),
        (
            {"train.weights": "runs/none/step_000010"},
            r"^train\.weights runs/none/step_000010/checkpoint\.pt: no checkpoint",
        ),
        ({"train.weights": "nowhere.pt"}, r"^train\.weights nowhere\.pt: no checkpoint there"),
        ({"train.freeze": ("backbon.*",)}, r"train\.freeze: 'backbon\.\*' matches no parameter; near: backbone\.\*"),
        (
            {"train.score": "val/nonsense"},
            r"^train\.score val/nonsense: no validation gives this metric; there are val/",
        ),
        ({"train.score": "val/loss/mask"}, r"^train\.score val/loss/mask: no validation gives .*val/loss/semantic"),
    ],
)
def test_what_the_driver_can_know_is_told_before_ray_starts_or_the_name_is_taken(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pipelines.cluster import session
    from pipelines.training.driver import train

    monkeypatch.setattr(session, "connect", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.chdir(tmp_path)
    experiment = override(demo(), {"model.backbone.name": "resnet18", "storage": str(tmp_path / "runs"), **changes})
    with pytest.raises(ValueError, match=message):
        train(replace(experiment, name="taken"), "demo")
    assert list(tmp_path.iterdir()) == []


def test_classes_that_an_architecture_is_not_made_for_are_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes16: Path
):
    """Read from the annotations of a data set that is not prepared."""
    from pipelines.cluster import session
    from pipelines.presets import PRESETS
    from pipelines.training.driver import train

    monkeypatch.setattr(session, "connect", lambda *_: pytest.fail("Ray was started"))
    (tmp_path / "data").mkdir()
    for name in ("annotations", "images"):
        shutil.copytree(scenes16 / name, tmp_path / "data" / name)
    file = tmp_path / "data" / "annotations" / "panoptic_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["isthing"] = 0
    file.write_text(json.dumps(content))
    base = PRESETS["panoptic-fpn-scenes"]()
    data = replace(base.data, root=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"no thing class.*\(the data set has 0 thing and \d+ stuff classes\)"):
        train(replace(base, name="taken", storage=str(tmp_path / "runs"), data=data), "panoptic-fpn-scenes")
    assert not (tmp_path / "runs").exists()


def test_rates_that_leave_the_backbone_as_it_is_are_refused():
    late = {"optim.warmup_steps": 500, "optim.backbone_warmup_steps": 1000, "train.steps": 500}
    with pytest.raises(ValueError, match=r"learn after optim\.warmup_steps 500.*--train\.stop-after 500"):
        check_options(override(demo(), late))
    check_options(override(demo(), {**late, "train.steps": 501}))
    check_options(override(demo(), {**late, "optim.backbone_lr": 0.0}))
    with pytest.raises(ValueError, match=r"optim\.layer_decay 0\.8: the backbone is no plain ViT"):
        check_options(override(demo(), {"optim.layer_decay": 0.8}))


def test_a_compiled_network_does_not_recompute_its_activations():
    options = {"engine.activation_checkpointing": True, "train.compile": True}
    with pytest.raises(ValueError, match=r"engine\.activation_checkpointing: cannot be combined with train\.compile"):
        check_options(override(demo(), options))


def test_what_training_can_use_passes(small_categories: Categories, tmp_path: Path):
    (tmp_path / "weights.pkl").touch()
    (tmp_path / "checkpoint.pt").touch()
    good = {
        "model.backbone.name": "resnet18",
        "model.backbone.weights": str(tmp_path / "weights.pkl"),
        "train.weights": str(tmp_path),
        "train.freeze": ("backbone.*",),
    }
    check_options(override(demo(), good))
    for score in (
        "val/pq_things",
        "val/miou",
        "val/loss/total",
        "val/loss/offset",
        "val/pq_small",
        "val/time/network_ms",
    ):
        check_score(override(demo(), {"model.backbone.name": "resnet18", "train.score": score}))
    check_model(demo(), small_categories)


def test_a_disk_without_room_for_the_checkpoints_is_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Room for three: the best one, the last and the next."""
    from pipelines.cluster import disk, session
    from pipelines.training.driver import train

    monkeypatch.setattr(session, "connect", lambda *_: pytest.fail("Ray was started"))
    experiment = override(
        demo(), {"model.backbone.name": "resnet18", "train.keep": "1", "storage": str(tmp_path / "runs")}
    )
    experiment = replace(experiment, name="taken")
    one = checkpoint_bytes(meta_model(experiment), experiment.optim)
    monkeypatch.setattr(disk, "free_bytes", lambda uri: 3 * one - 1)
    with pytest.raises(
        disk.DiskFull, match=rf"^{tmp_path}/runs/taken: 3 checkpoints of \d+ MiB \(.* need \d+ MiB, "
    ) as told:
        train(experiment, "demo")
    assert "the same command goes on" in str(told.value) and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "free_bytes", lambda uri: 3 * one)
    check_disk(experiment, STAND_IN)
    thrice = {"train.keep": 1000, "train.steps": 750, "train.checkpoint_minutes": 0}  # which validates three times
    check_disk(override(experiment, thrice), STAND_IN)
    with pytest.raises(disk.DiskFull, match=r"1002 checkpoints"):
        check_disk(override(experiment, thrice | {"train.checkpoint_every": 1}), STAND_IN)
    monkeypatch.setattr(disk, "free_bytes", lambda uri: 2 * one)
    step = tmp_path / "runs" / "taken" / "step_000010"
    step.mkdir(parents=True)
    with (step / "checkpoint.pt").open("wb") as file:
        file.truncate(one)  # of a run that goes on, so that two more suffice
    check_disk(experiment, STAND_IN)


def test_schedules_of_freezing():
    assert parse_schedule(4) == parse_schedule("4") == [(0, 4)]
    assert parse_schedule("5 2@500 0@800") == [(0, 5), (500, 2), (800, 0)]
    for bad in ("5 2", "2@500", "5 2@500 0@400", "5 2@0", "x 2@5", "5 2@-5", "5; 2@4"):
        with pytest.raises(ValueError, match=r"schedule|number of stages"):
            parse_schedule(bad)


def changed(**train: Any) -> Experiment:
    return replace(demo(), train=replace(demo().train, **train))


def test_a_cluster_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    eight = changed(workers=8, gpu="no")
    with pytest.raises(
        ValueError, match=r"^8 workers need 5\.6 CPUs \(each 0\.5 for itself and 0\.2 for Ray Data\), .* has 4; .*Lower"
    ):
        check_cluster(replace(eight, feed=replace(eight.feed, decode="map")))
    assert check_cluster(eight) is False  # only decoding in Ray Data takes CPUs of its own
    with pytest.raises(ValueError, match=r"^3 workers need 6 CPUs \(each 2 for itself and 0 for Ray Data\)"):
        check_cluster(changed(workers=3, cpus_per_worker=2, gpu="no"))
    with pytest.raises(ValueError, match=r"train\.gpu yes: 64 workers need 64 GPUs, the cluster has"):
        check_cluster(changed(workers=64, gpu="yes"))
    assert check_cluster(changed(workers=2, gpu="no")) is False


def test_gpus_that_an_autoscaler_brings_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    import ray

    there, asked = {"CPU": 4.0}, []

    def grow(count: int, each: dict[str, float]) -> None:
        asked.append((count, each))
        there.update({"CPU": 30.0, "GPU": 2.0} if "GPU" in each else {})

    monkeypatch.setattr(session, "grow", grow)
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(there))
    assert check_cluster(changed(workers=2, gpu="auto")) is False
    assert check_cluster(changed(workers=2, gpu="yes", cpus_per_worker=12)) is True
    assert asked == [(2, {"CPU": 1.0}), (2, {"CPU": 12.0, "GPU": 1.0})]


def test_a_continued_run_keeps_its_options():
    hashes = {"train_hash": "a", "val_hash": "b"}
    before = {"options": {"optim.lr": 0.1, "train.seed": 0, "train.workers": 1, "feed.threads": 2}, **hashes}
    free = before["options"] | {"train.workers": 2, "feed.threads": 4}
    check_continuation(before, free, hashes, "one")
    with pytest.raises(ValueError) as refused:
        check_continuation(before, free | {"optim.lr": 0.2, "train.seed": 3}, hashes | {"val_hash": "c"}, "one")
    message = str(refused.value)
    assert "run 'one' began with other options: optim.lr was 0.1, is 0.2; train.seed was 0, is 3; " in message
    assert "the data changed (val_hash)" in message and "--name" in message and "workers" not in message
    limited = before["options"] | {"data.limit": 10, "data.on_invalid": "stop"}
    check_continuation(before | {"options": limited}, limited | {"data.on_invalid": "skip"}, hashes, "one")
    check_continuation(before, free | {"data.window": 0}, hashes, "one")  # which earlier versions did not know
    with pytest.raises(ValueError, match=r"data\.window was 0, is 8"):
        check_continuation(before, free | {"data.window": 8}, hashes, "one")
    with pytest.raises(ValueError, match=r"data\.limit was 10, is 20"):
        check_continuation(before | {"options": limited}, limited | {"data.limit": 20}, hashes, "one")


def test_more_workers_than_cores_are_refused_unless_their_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_connected", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    crowded = override(demo(), {"train.workers": 64, "train.batch": 64})
    with pytest.raises(ValueError, match=r"^--train\.workers 64: this machine has 4 cores") as refused:
        check_machine(crowded)
    assert "Give --train.workers 4 " in str(refused.value) and "--train.cpus-per-worker 0.062" in str(refused.value)
    check_machine(override(demo(), {"train.workers": 4}))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    check_machine(demo())  # two workers
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_machine(crowded)


def test_workers_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--train\.workers 2: each needs 7\d\d MiB .* 1\.0 GiB are here.*workers 1$"):
        check_memory(demo(), 2**30, "here")
    check_memory(demo(), 2**31, "here")
    with pytest.raises(ValueError, match="End what else runs"):
        check_memory(demo(), 2**20, "here")


def test_told_shares_still_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_connected", lambda: False)
    shared = override(demo(), {"train.workers": 4096, "train.batch": 4096, "train.cpus_per_worker": 0.001})
    with pytest.raises(ValueError, match="free on this machine"):
        check_machine(shared)
