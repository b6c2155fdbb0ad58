"""A worker before its first step, without Ray, and the lines that it prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from panoptic.backbones import Backbone
from panoptic.layers.norm import FrozenBatchNorm
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import save
from pipelines.config import UNRANKED, Data, Train
from pipelines.data.manifest import Manifest
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.preflight import STAND_IN
from pipelines.training.state import Job
from pipelines.training.worker import build_state, console_line, set_training_mode, stream_of


@pytest.fixture
def job(small_categories: Categories) -> Iterator[Job]:
    """A training of the demo's model, on 20 rows that no test reads."""
    threads = torch.get_num_threads()
    manifest = Manifest(
        schema_version=2,
        split="train",
        rows=20,
        hash="",
        categories=small_categories,
        shards=(),
        index="",
        maximum_height=60,
        maximum_width=60,
        segments=(0,) * 5,
        crowds=0,
        empty=0,
        unannotated=0,
        skipped=(),
        area_mismatches=0,
        source={},
        uri="",
    )
    yield Job(PRESETS["demo"](), manifest, manifest, Run("", "", ""), "", False)
    torch.set_num_threads(threads)


def with_options(job: Job, **options: object) -> Job:
    experiment = job.experiment
    return replace(job, experiment=replace(experiment, train=replace(experiment.train, **options)))


def test_shared_statistics_keep_the_activations_of_timms_norms(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_device", lambda gpu: torch.device("cpu"))
    job = replace(with_options(job, sync_bn=True), gpu=True)
    model = replace(job.experiment.model, backbone=Backbone("regnetx_002"))
    backbone = build_state(
        replace(job, experiment=replace(job.experiment, model=model)), rank=1, world=2
    ).model.backbone
    norms = [part for part in backbone.modules() if isinstance(part, nn.SyncBatchNorm)]
    assert norms and any(isinstance(getattr(norm, "act", None), nn.ReLU) for norm in norms)


def test_frozen_parts_stay_out_of_the_optimiser_and_in_evaluation_mode(job: Job) -> None:
    state = build_state(with_options(job, freeze=("backbone.*", "semantic_aspp.*")), rank=1, world=2)
    model = state.model
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"semantic_aspp"} | {
        "backbone"
    }
    trained = {id(p) for group in state.optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(isinstance(m, FrozenBatchNorm) for m in model.get_submodule("backbone").modules())
    set_training_mode(model, state.experiment.train)
    assert model.training and not model.get_submodule("semantic_aspp.dropout").training
    kept = build_state(with_options(job, freeze=("semantic_aspp.*",), frozen_dropout=True), rank=1, world=2)
    set_training_mode(kept.model, kept.experiment.train)
    assert kept.model.get_submodule("semantic_aspp.dropout").training
    options = replace(job.experiment.model, backbone=replace(job.experiment.model.backbone, freeze=5))
    own = build_state(replace(job, experiment=replace(job.experiment, model=options)), rank=1, world=2)
    set_training_mode(own.model, own.experiment.train)
    assert own.model.training and not own.model.get_submodule("backbone").training
    with pytest.raises(ValueError, match=r"train\.freeze: 'backbon\.\*' matches no parameter; near: backbone\.\*"):
        build_state(with_options(job, freeze=("backbon.*",)), rank=1, world=2)


def test_the_stream_is_cut_and_doubled_as_the_options_say(job: Job) -> None:
    experiment = job.experiment
    augment = replace(experiment.augment, colour="colour004", doubled=True)
    job = replace(job, experiment=replace(experiment, data=Data(limit=6, limit_seed=4), augment=augment))
    stream = stream_of(build_state(with_options(job, steps=10), rank=1, world=2))
    assert (stream.rows, stream.limit, stream.limit_seed, stream.copies, stream.samples) == (20, 6, 4, 2, 12)


def test_what_got_no_weights_may_not_be_frozen(job: Job, tmp_path: Path) -> None:
    """A checkpoint of other classes leaves the class layer fresh, which a pattern may freeze with the rest."""
    model = job.experiment.model.build(STAND_IN)
    file = str(tmp_path / "other.pt")
    save(file, config=job.experiment.model, model=model, step=1)
    with pytest.raises(ValueError, match=r"semantic_\S+: frozen, but the weights have nothing for them") as refused:
        build_state(with_options(job, weights=file, freeze=("semantic_*",)), rank=1, world=2)
    assert "--train.freeze" in str(refused.value)
    build_state(with_options(job, weights=file, freeze=("backbone.*",)), rank=1, world=2)


def test_checkpoints_are_ranked_by_any_metric() -> None:
    values = {"val/pq": 40.0, "val/loss/total": 2.5, "val/miou": math.nan}
    assert Train().rank(values) == 40.0
    assert Train(score="val/loss/total", score_mode="min").rank(values) == -2.5
    assert Train(score="val/miou").rank(values) == Train(score="val/none").rank(values) == UNRANKED < -1e6


def test_console_lines():
    values = {"loss/total": 1.5, "loss/centre": 0.25, "lr": 1e-3, "memory_mib": 812.4, "skipped_steps": 0}
    speed = {"images_per_second": 12.34, "step_seconds": 60.0, "data_wait": 0.031}
    assert console_line(20, 100, values | speed) == (
        "step 20/100 | total 1.500 centre 0.250 | lr 1.00e-03 | 12.3 images/s | data wait 3 % | 812 MiB | 1:20:00 left"
    )
    assert console_line(1, 100, values) == "step 1/100 | total 1.500 centre 0.250 | lr 1.00e-03"
    skipped = {"lr": 1e-3, "skipped_steps": 2, "compiled_graphs": 1}
    assert console_line(2, 9, skipped) == (
        "step 2/9 | every step skipped | lr 1.00e-03 | 1 graphs compiled | 2 steps skipped"
    )
