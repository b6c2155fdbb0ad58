"""Refusals before anything starts: options, draws, and weights that do not fit a backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from panoptic.backbones import Backbone
from panoptic.backbones.build import OPTIONS
from pipelines.cluster import storage
from pipelines.presets import PRESETS
from pipelines.presets.panoptic_deeplab import demo
from pipelines.studies import run
from pipelines.studies.plan import Options
from pipelines.tuning import search_space
from pipelines.tuning.checks import TrialCheck, WeightsCheck
from pipelines.tuning.config import check_options
from pipelines.tuning.plan import SweepOptions, Trials

UNPUBLISHED = {"resnet14", "resnet14_double3x3", "res2net14_26w_4s"}
"""Our own backbones of which nobody has published weights."""


def start_from(backbone: Backbone) -> Any:
    """An experiment with this backbone."""
    return replace(demo(), model=replace(demo().model, backbone=backbone))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        assert not pretrained, "a download"
        return made(name, **options)

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)


@pytest.mark.parametrize("name", [*sorted(OPTIONS.keys() - UNPUBLISHED), "resnet10t"])
def test_what_timm_publishes_fits_each_backbone_as_it_is(name: str):
    WeightsCheck().check(start_from(Backbone(name=name, weights="timm", freeze=2)))


@pytest.mark.parametrize("name", sorted(UNPUBLISHED))
def test_what_nobody_publishes_is_refused(name: str):
    with pytest.raises(ValueError, match=f"timm has no weights for {name}; give a FILE"):
        WeightsCheck().check(start_from(Backbone(name=name, weights="imagenet", freeze=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "deeplab"}, r"conv1.weight \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"),
        ({"norm": "group"}, "unknown: .*running_mean"),
        ({"stride_in_1x1": True}, "bottlenecks stride in the 3x3"),
        ({"name": "resnet10"}, "timm has no weights for resnet10"),
    ],
)
def test_what_does_not_fit_timms_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        WeightsCheck().check(start_from(Backbone(**{"name": "resnet50", "weights": "timm", **options})))


def test_a_file_is_read_once_and_held_against_each_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file, reads, read = str(tmp_path / "r18.pth"), [], storage.read_bytes
    torch.save(Backbone(name="resnet18").build().state_dict(), file)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: reads.append(uri) or read(uri))
    fitting = WeightsCheck()
    for freeze in (0, 2, 4):
        fitting.check(start_from(Backbone(name="resnet18", weights=file, freeze=freeze)))
    with pytest.raises(ValueError, match=r"missing: .*layer1\.2"):
        fitting.check(start_from(Backbone(name="resnet34", weights=file)))
    assert reads == [file]
    with pytest.raises(ValueError, match=r"model.backbone.weights: .*absent.pth: no such file"):
        fitting.check(start_from(Backbone(weights=str(tmp_path / "absent.pth"))))


def test_the_main_study_starts_from_timms_weights(monkeypatch: pytest.MonkeyPatch):
    """Up to the cluster; with the stem that its preset has, its first row says that these weights do not fit."""

    def started(*given: Any) -> int:
        raise InterruptedError("everything was checked")

    asked: list[str] = []
    monkeypatch.setattr(run, "check_weights", lambda one: asked.append(one.model.backbone.timm_name))
    monkeypatch.setattr(run, "join_cluster", started)
    arguments = ["--data.root", "coco", "--model.backbone.weights", "timm"]
    with pytest.raises(InterruptedError):
        run.run(Options(study=("freezing-r50", "freezing-r101")), arguments, PRESETS)
    assert asked == ["resnet50.tv_in1k", "resnet101.tv_in1k"]  # each once, before anything starts
    with pytest.raises(ValueError, match=r"freezing-r50 none frozen, seed 0: .*conv1.weight \(64, 3, 7, 7\)"):
        run.run(Options(study=("freezing-r50",)), [*arguments, "--model.backbone.stem", "deeplab"], PRESETS)


@pytest.mark.parametrize(
    ("options", "space", "message"),
    [
        (SweepOptions(searcher="grid"), "optim.lr=uniform(0,1)", "--searcher grid enumerates"),
        (SweepOptions(searcher="optuna"), "optim.lr=grid(1,2)", r"--searcher optuna draws values: write choice\(…\)"),
        (SweepOptions(scheduler="pbt", samples=4), "optim.lr=grid(1,2)", "--scheduler pbt draws values"),
        (SweepOptions(scheduler="pbt", samples=1), "optim.lr=uniform(0,1)", "--samples 4"),
        (
            SweepOptions(scheduler="pbt", samples=4, searcher="optuna"),
            "optim.lr=uniform(0,1)",
            "takes no --searcher optuna",
        ),
        (SweepOptions(scheduler="pbt", samples=4), "preset=choice(a,b)", "leave preset out"),
        (SweepOptions(samples=0), "optim.lr=uniform(0,1)", "1 or more"),
    ],
)
def test_combinations_that_are_refused(options: SweepOptions, space: str, message: str):
    with pytest.raises(ValueError, match=message):
        check_options(options, search_space.parse([space]))


def test_models_are_built_once_each_and_presets_apply():
    trials = Trials({"demo": demo(), "other": demo()}, "demo")
    checker = TrialCheck(trials)
    space = search_space.parse(
        ["optim.lr=grid(1e-3,1e-2)", "model.aspp_channels=grid(16,32)", "preset=grid(demo,other)"]
    )
    assert search_space.dry_run(space, checker) == 8 == len(checker.experiments)
    assert len(checker._built) == 2 and {e.optim.lr for e in checker.experiments} == {1e-3, 1e-2}
    frozen = {"model.backbone.freeze": 2}
    with pytest.raises(ValueError, match="frozen noise"):
        checker.check("demo", frozen)
    assert TrialCheck(trials, allow_lacking=True).check("demo", frozen).model.backbone.freeze == 2


def test_a_population_has_weights_of_one_shape():
    trials = Trials(
        {"demo": demo()}, "demo", search_space.parse(["optim.lr=uniform(0,1)", "model.aspp_channels=choice(16,32)"])
    )
    with pytest.raises(ValueError, match=r"pbt: model\.aspp_channels changes the shapes"):
        TrialCheck(trials).check_exchange()
    space = search_space.parse(["optim.lr=uniform(0,1)", "model.backbone.freeze=choice(0,2,5)"])
    TrialCheck(replace(trials, space=space), allow_lacking=True).check_exchange()
