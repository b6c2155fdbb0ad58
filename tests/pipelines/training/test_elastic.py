"""A range of workers: how many train, what is waited for, and when more are asked for. Without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.config import Train, Workers
from pipelines.data.sampler import micro_batches
from pipelines.presets import PRESETS
from pipelines.tracking.runs import Run
from pipelines.training import elastic, notice
from pipelines.training.sharing import accumulation
from pipelines.training.state import Job


def job(workers: int, batch: int = 8) -> Job:
    demo = PRESETS["demo"]()
    experiment = replace(demo, name="x", train=replace(demo.train, workers=workers, batch=batch))
    data: Any = None  # nobody looks at it
    return Job(experiment, data, data, Run("", "", ""), "", gpu=False, key="k")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """`rooms(0, 2)`: the room for workers at each look, the last of them for ever; returns the looks that are left."""
    monkeypatch.setattr(elastic, "worker_cpus", lambda experiment: 0.5)
    monkeypatch.setattr(elastic, "SETTLING", 0.2)
    monkeypatch.setattr(elastic, "PAUSE", 0.05)

    def give(*values: int) -> list[int]:
        left = list(values)
        monkeypatch.setattr(elastic, "free_room", lambda job: left.pop(0) if len(left) > 1 else left[0])
        return left

    yield give


def chosen(attempt: Job) -> int:
    return attempt.experiment.train.workers


def test_all_of_a_range_begin_where_there_is_room(rooms: Callable[..., list[int]], capsys) -> None:
    rooms(4)
    attempt = elastic.sized(job(Workers(4, 1)))
    assert chosen(attempt) == 4 and attempt.experiment.train.cpus_per_worker == 0.5
    assert capsys.readouterr().out == "x: training with 4 workers, of 1..4\n"
    fixed = job(2)
    assert elastic.sized(fixed) is fixed


@pytest.mark.parametrize(("room", "batch", "count"), [(3, 8, 2), (3, 6, 3), (1, 8, 1)])
def test_fewer_begin_after_a_moment(room: int, batch: int, count: int, rooms: Callable[..., list[int]]) -> None:
    """The processes of an attempt before may still hold what they had. The batch is shared equally."""
    rooms(room)
    begin = time.monotonic()
    assert chosen(elastic.sized(job(Workers(4, 1), batch))) == count
    assert time.monotonic() - begin > 0.2


def test_the_fewest_are_waited_for(rooms: Callable[..., list[int]]) -> None:
    left = rooms(*(0 for _ in range(12)), 2)
    assert chosen(elastic.sized(job(Workers(4, 2)))) == 2 and left == [2]


def test_more_room_is_a_notice_to_those_that_train(
    rooms: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before these hold what they take: it is free until then, and they would be asked to stop for themselves."""
    asked: list[str] = []
    begun = iter([False, False, False])
    monkeypatch.setattr(notice, "has_begun", lambda key: next(begun, True))
    monkeypatch.setattr(notice, "ask", lambda key, reason: asked.append(reason))
    monkeypatch.setattr(notice, "withdraw", lambda key: asked.append("withdrawn"))
    monkeypatch.setenv(elastic.INTERVAL, "0.02")
    whole = job(Workers(4, 1))
    attempt = job(1)
    left = rooms(0, 0, 2)  # beside the one that trains: three, of which two share the batch
    with elastic.asking_for_more(whole, attempt):
        until = time.monotonic() + 5
        while not asked and time.monotonic() < until:
            time.sleep(0.01)
    assert asked == ["room for 2 workers", "withdrawn"] and left == [2]
    assert next(begun, None) is None
    asked.clear()
    with elastic.asking_for_more(whole, job(4)):  # as many as may be
        time.sleep(0.1)
    assert asked == []


def test_every_sample_comes_once_while_the_number_of_workers_changes() -> None:
    """Two, one and two workers again: the positions of each step, and so the samples and their augmentation, are those
    of a training whose number never changed."""
    options = Train(batch=8, micro_batch=2)

    def positions(step: int, workers: int) -> list[int]:
        parts = accumulation(options, workers)
        ranks = [micro_batches(step, 8, workers, rank, parts, 0) for rank in range(workers)]
        return sorted(np.concatenate([np.concatenate([np.asarray(part) for part in rank]) for rank in ranks]).tolist())

    seen = [positions(step, workers) for step, workers in enumerate([2, 2, 1, 1, 2, 2])]
    assert seen == [list(range(8 * step, 8 * step + 8)) for step in range(6)]
