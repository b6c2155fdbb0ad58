"""What a worker does before its first step, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from panoptic.layers import FrozenBatchNorm
from panoptic.segmentation import Categories
from pipelines.config import Data
from pipelines.manifest import Manifest
from pipelines.presets import PRESETS
from pipelines.tracking import Run
from pipelines.worker import Job, Worker


@pytest.fixture
def job(small_categories: Categories) -> Iterator[Job]:
    """Of the demo's model, on 20 rows that no test reads."""
    threads = torch.get_num_threads()
    manifest = Manifest(
        schema_version=1,
        split="train",
        rows=20,
        hash="",
        categories=small_categories,
        shards=(),
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


def test_frozen_parts_stay_out_of_the_optimiser_and_in_evaluation_mode(job: Job) -> None:
    worker = Worker(with_options(job, freeze=("backbone.*", "semantic_aspp.*")), rank=1, world=2)
    model = worker.model
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"semantic_aspp"} | {
        "backbone"
    }
    trained = {id(p) for group in worker.optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(isinstance(m, FrozenBatchNorm) for m in model.get_submodule("backbone").modules())
    worker._training_mode(model)
    assert model.training and not model.get_submodule("semantic_aspp.dropout").training
    kept = Worker(with_options(job, freeze=("semantic_aspp.*",), frozen_dropout=True), rank=1, world=2)
    kept._training_mode(kept.model)
    assert kept.model.get_submodule("semantic_aspp.dropout").training
    with pytest.raises(ValueError, match=r"train\.freeze: 'backbon\.\*' matches no parameter; near: backbone\.\*"):
        Worker(with_options(job, freeze=("backbon.*",)), rank=1, world=2)


def test_the_stream_is_cut_and_doubled_as_the_options_say(job: Job) -> None:
    experiment = job.experiment
    augment = replace(experiment.augment, colour="colour004", doubled=True)
    job = replace(job, experiment=replace(experiment, data=Data(limit=6, limit_seed=4), augment=augment))
    stream = Worker(job, rank=1, world=2)._stream(10)
    assert (stream.rows, stream.limit, stream.limit_seed, stream.copies, stream.samples) == (20, 6, 4, 2, 12)
