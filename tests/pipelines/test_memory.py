"""Nothing grows with the length of a training or with the size of the data set (slow: thousands of steps)."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from panoptic.segmentation import Categories
from panoptic.transforms import Augment
from pipelines.data.loader import Feed, FeedConfig
from pipelines.data.sampler import Stream
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.state import Job
from tests.support.feeding import enlarge, memory
from tests.support.processes import usage
from tests.support.stored import write_shards
from tests.support.tiny import TinyBackbone, TinyConfig


@dataclass(frozen=True)
class Backbone(TinyBackbone):
    """With what a worker asks of every backbone."""

    weights: str = "none"


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def fed(folder: Path, batches: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.support.feeding", str(folder), str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_feed_does_not_grow_with_micro_batches_or_rows(tmp_path: Path, small_categories: Categories) -> None:
    """1,000 and 20,000 micro-batches; sets of 2,000 and of 50,000 rows, also as an evaluation reads them."""
    drawn = write_shards(tmp_path, small_categories, 64)
    small, large = (tmp_path / name for name in ("small", "large"))
    enlarge(drawn, small, 2_000)
    enlarge(drawn, large, 50_000)
    long = fed(large, 20_000)
    assert long["late"] < 1.01 * long["early"] + 1, long
    runs = [(fed(small, 4_000), fed(large, 4_000)) for _ in range(2)]
    for figure in ("late", "evaluation"):
        assert all(many[figure] < 1.1 * few[figure] for few, many in runs), runs
    # CPU rather than the clock, and the lesser of two, as other tests have the cores too
    few, many = (min(figures["cpu"] for figures in side) for side in zip(*runs, strict=True))
    assert many < 1.5 * few, runs


def test_no_process_of_a_session_grows_while_ray_data_decodes(
    tmp_path: Path, small_categories: Categories, ray_cluster: None
) -> None:
    manifest = write_shards(tmp_path, small_categories, 64)
    config = FeedConfig(decode="map", ahead=16)
    early: dict[int, Any] = {}
    with Feed(manifest, Stream(0, manifest.rows, 4, 4_000), Augment(), config) as feed:
        for number, _ in enumerate(feed, 1):
            if number == 500:
                early = usage()
        late = usage()
    grown = {late[pid].name: (late[pid].memory - use.memory) / 2**20 for pid, use in early.items() if pid in late}
    assert len(grown) > 5 and max(grown.values()) < 25, grown


def test_a_worker_does_not_grow_with_steps_and_validations(
    tmp_path: Path, small_categories: Categories, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, val = (write_shards(tmp_path / str(count), small_categories, count) for count in (64, 16))
    demo = PRESETS["demo"]()
    train = replace(demo.train, steps=2_000, batch=2, validate_every=100, log_every=100, threads=1)
    experiment = replace(demo, model=TinyConfig(Backbone()), train=train, augment=Augment(), feed=FeedConfig(threads=1))
    found: dict[int, float] = {}

    def log(state: Any, *_: object) -> None:
        gc.collect()
        found[state.step] = memory()

    monkeypatch.setattr(worker, "log", log)
    monkeypatch.setattr(worker.Writer, "save", lambda *_: None)  # Ray Train's part
    threads = torch.get_num_threads()
    try:
        state = worker.build_state(Job(experiment, manifest, val, Run("", "", ""), "", False), rank=1, world=2)
        state.rank, state.world = 0, 1  # the first rank would record in MLflow
        state.accumulation = 1
        worker.train(state)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 20 and state.step == 2_000
    # the allocator's noise is some 8 MiB either way; 25 MiB in 800 steps would be 30 here
    early, late = (statistics.median(found[step] for step in range(first, first + 500, 100)) for first in (600, 1_600))
    assert late < early + 15, found
