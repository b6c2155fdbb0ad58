"""Nothing grows with the length of a training or with the size of the data set (nightly: thousands of steps)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from panoptic.segmentation import Categories
from panoptic.transforms import Augment
from pipelines.data.loader import Feed, FeedConfig
from pipelines.data.sampler import Stream
from tests.support.feeding import enlarge
from tests.support.processes import usage
from tests.support.stored import write_shards

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def start_feed(folder: Path, batches: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.feeding", str(folder), str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def figures(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_a_feed_does_not_grow_with_micro_batches_or_rows(tmp_path: Path, small_categories: Categories) -> None:
    """1,000 and 20,000 micro-batches; sets of 2,000 and of 50,000 rows, also as an evaluation reads them."""
    drawn = write_shards(tmp_path, small_categories, 64)
    small, large = (tmp_path / name for name in ("small", "large"))
    enlarge(drawn, small, 2_000)
    enlarge(drawn, large, 50_000)
    longest = start_feed(large, 20_000)
    # few rows beside many rows, so that whatever else the cores do takes CPU time from both alike
    pairs = [[figures(one) for one in [start_feed(small, 4_000), start_feed(large, 4_000)]] for _ in range(2)]
    long = figures(longest)
    assert long["late"] < 1.01 * long["early"] + 1, long
    for figure in ("late", "evaluation"):
        assert all(many[figure] < 1.1 * few[figure] for few, many in pairs), pairs
    few, many = (min(one["cpu"] for one in side) for side in zip(*pairs, strict=True))
    assert many < 1.5 * few, pairs


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


def test_a_worker_does_not_grow_with_steps_and_validations(tmp_path: Path, small_categories: Categories) -> None:
    """In a process of its own, as the allocator of one that ran other trainings returns memory when it likes."""
    for name, rows in (("train", 64), ("val", 16)):
        write_shards(tmp_path / name, small_categories, rows)
    command = [sys.executable, "-m", "tests.support.long_training", str(tmp_path / "train"), str(tmp_path / "val")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {int(step): size for step, size in json.loads(done.stdout.splitlines()[-1]).items()}
    assert list(found) == list(range(100, 2_001, 100))
    # the allocator's noise is some 8 MiB either way; 25 MiB in 800 steps would be 30 here
    early, late = (statistics.median(found[step] for step in range(first, first + 500, 100)) for first in (600, 1_600))
    assert late < early + 15, found
