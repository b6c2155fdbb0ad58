"""Refused before anything starts: frozen noise, a cluster that is too small, a run under other options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.config import Experiment, override
from pipelines.presets.panoptic_deeplab import demo
from pipelines.training.preflight import check_cluster, check_continuation, check_freezing, lacking, parse_schedule


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
    assert ("--model.backbone.weights FILE" in str(refused.value)) == (missing == "backbone")


def test_a_run_with_a_frozen_fresh_backbone_is_refused_before_anything_starts(tmp_path):
    from pipelines.training.driver import train

    frozen = replace(override(demo(), {"model.backbone.freeze": 2}), storage=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.backbone\.freeze 2: no weights were loaded"):
        train(frozen, "demo")
    assert list(tmp_path.iterdir()) == []


def test_schedules_of_freezing():
    assert parse_schedule(4) == parse_schedule("4") == [(0, 4)]
    assert parse_schedule("5 2@500 0@800") == [(0, 5), (500, 2), (800, 0)]
    for bad in ("5 2", "2@500", "5 2@500 0@400", "5 2@0", "x 2@5", "5 2@-5", "5; 2@4"):
        with pytest.raises(ValueError, match=r"schedule|number of stages"):
            parse_schedule(bad)


def changed(**train: Any) -> Experiment:
    return replace(demo(), train=replace(demo().train, **train))


def test_a_cluster_that_is_too_small_is_refused(ray_cluster):
    with pytest.raises(
        ValueError, match=r"^8 workers need 5\.6 CPUs \(each 0\.5 for itself and 0\.2 .* has 4; .*Lower"
    ):
        check_cluster(changed(workers=8, gpu="no"))
    with pytest.raises(ValueError, match=r"^3 workers need 6\.6 CPUs \(each 2 for itself"):
        check_cluster(changed(workers=3, cpus_per_worker=2, gpu="no"))
    with pytest.raises(ValueError, match=r"train\.gpu yes: 64 workers need 64 GPUs, the cluster has"):
        check_cluster(changed(workers=64, gpu="yes"))
    assert check_cluster(changed(workers=2, gpu="no")) is False


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
    with pytest.raises(ValueError, match=r"data\.limit was 10, is 20"):
        check_continuation(before | {"options": limited}, limited | {"data.limit": 20}, hashes, "one")
