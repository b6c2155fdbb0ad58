"""Weights for what a study freezes: trained once for all studies that can share them, and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panoptic.training import checkpoint
from pipelines.config import Experiment, flatten, override
from pipelines.presets import PRESETS
from pipelines.studies import pretrain
from pipelines.studies.plan import Options, plan, with_weights
from pipelines.studies.pretrain import pretrained, pretraining
from pipelines.training.preflight import STAND_IN, check_continuation
from pipelines.tuning.trial_config import apply

DEEPLAB, RATE = "panoptic-deeplab-pedestrians", ("--optim.lr", "0.5")


class Trainings:
    """Instead of training: run folders as `train` keeps them, and a checkpoint where it is not interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun, self.ended = folder, {}, []
        self.interrupt = False

    def __call__(self, run: Experiment, preset: str) -> Any:
        options = flatten(run)
        check_continuation({"options": self.begun.setdefault(run.name, options)}, options, {}, run.name)
        if self.interrupt:
            raise KeyboardInterrupt
        self.ended.append(run)
        file = self.folder / f"{run.name}-made.pt"
        backbone = replace(run.model.backbone, weights="none")  # they may not be at hand
        model = replace(run.model, backbone=backbone).build(STAND_IN)  # type: ignore[type-var]
        checkpoint.save(str(file), config=run.model, model=model, step=run.train.steps, experiment=options)
        return SimpleNamespace(checkpoint=str(file))


def start(studies: tuple[str, ...], folder: Path, *typed: str, preset: str = "detr-pedestrians") -> list[Any]:
    """Rows of studies with the weights that they start from, on a preset without ImageNet weights."""
    arguments = [preset, "--storage", str(folder), *typed]
    planned = plan(Options(study=studies, small=True, steps=40), arguments, PRESETS)
    lr = {"optim.lr": typed[1]} if typed else {}
    bases = {e.preset: override(PRESETS[e.preset](), {"storage": str(folder), **lr}) for e in planned}
    return with_weights(planned, bases, 30)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainings:
    stand_in = Trainings(tmp_path)
    monkeypatch.setattr(pretrain, "train", stand_in)
    return stand_in


def test_a_backbone_is_trained_once_for_all_studies_of_a_preset(trainings: Trainings, tmp_path: Path):
    """Whatever heads their rows have, also when one study was interrupted while it pretrained."""
    trainings.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        start(("dilation",), tmp_path, preset=DEEPLAB)
    trainings.interrupt = False
    files = {entry.changes["model.backbone.weights"] for entry in start(("aspp",), tmp_path, preset=DEEPLAB)}
    files |= {
        entry.changes["model.backbone.weights"]
        for entry in start(("dilation", "freezing-r101"), tmp_path, preset=DEEPLAB)
    }
    files |= {entry.changes["model.backbone.weights"] for entry in start(("aspp",), tmp_path, *RATE, preset=DEEPLAB)}
    assert len(files) == 1 == len(trainings.ended) == len(trainings.begun)
    state = torch.load(files.pop(), weights_only=True)
    experiment = apply(PRESETS["panoptic-deeplab-pedestrians"](), {"model.backbone.name": "resnet34"})[0]
    assert set(state) == set(experiment.model.backbone.build().state_dict())


def test_another_rate_is_another_model(trainings: Trainings, tmp_path: Path):
    """Where the whole model is kept, it depends on the optimiser; interrupted runs of both go on."""
    first = {entry.changes["train.weights"] for entry in start(("detr-freezing",), tmp_path)}
    assert first == {entry.changes["train.weights"] for entry in start(("detr-freezing",), tmp_path)}
    other = {entry.changes["train.weights"] for entry in start(("detr-freezing",), tmp_path, "--optim.lr", "0.5")}
    assert len(first) == len(other) == 1 and first != other and len(trainings.ended) == 2
    assert [run.optim.lr for run in trainings.ended][1] == 0.5


def test_a_pretraining_is_named_by_what_changes_it(tmp_path: Path):
    base = override(PRESETS["panoptic-deeplab-pedestrians"](), {"storage": str(tmp_path)})
    run = pretraining(base, base, "backbone", 30)
    assert run.name.startswith("pretrained-backbone-resnet18-30-") and run.model.backbone.freeze == 0
    assert run.train.steps == 30 and run.data.root == "scenes" and run.storage == str(tmp_path)
    assert (run.model.centre_weight, run.model.offset_weight) == (0.0, 0.0) and run.model.semantic_weight > 0
    whole = pretraining(base, base, "model", 30)
    assert whole.model.centre_weight > 0 and whole.optim.warmup_steps == 3 and whole.optim.lr == base.optim.lr
    for changes in ({"train.threads": 3}, {"train.workers": 1}, {"tracking.experiment": "x"}, {"train.steps": 7}):
        changed = override(base, changes)
        assert pretraining(changed, changed, "model", 30).name == whole.name
    for changes in ({"optim.weight_decay": 0.5}, {"model.kernel": 5}, {"model.backbone.output_stride": 16}):
        changed = override(base, changes)
        assert pretraining(changed, changed, "model", 30).name != whole.name
    assert len({run.name, whole.name, pretraining(base, base, "backbone", 31).name}) == 3
    published = PRESETS["panoptic-deeplab-r52-coco"]()
    assert pretraining(published, published, "backbone", 30).model.image_pool is None  # of 640 pixels: the scenes' less


def test_weights_that_exist_are_not_trained_again(
    monkeypatch: pytest.MonkeyPatch, trainings: Trainings, tmp_path: Path
):
    base = override(PRESETS["panoptic-deeplab-pedestrians"](), {"storage": str(tmp_path)})
    given = pretrained(base, base, "backbone", 30)
    monkeypatch.setattr(pretrain, "train", lambda *given: pytest.fail("trained again"))
    assert pretrained(base, base, "backbone", 30) == given


def test_a_whole_model_is_trained_from_the_imagenet_weights_of_its_preset(trainings: Trainings, tmp_path: Path):
    """The parts that ImageNet knows nothing of learn on scenes; the backbone alone never does where it has weights."""
    found = start(("detr-freezing",), tmp_path, preset="detr-pedestrians-imagenet")
    assert {entry.preset for entry in found} == {"detr-pedestrians-imagenet"}
    assert len({entry.changes["train.weights"] for entry in found}) == 1
    (run,) = trainings.ended
    assert run.model.backbone.weights == "imagenet" and run.model.backbone.freeze == 0
    start(("aspp", "freezing-r50"), tmp_path, preset=f"{DEEPLAB}-imagenet")
    assert len(trainings.ended) == 1
