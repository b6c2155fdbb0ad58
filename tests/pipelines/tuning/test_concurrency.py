"""Number of the trials that a cluster holds at once, and the limiter at which they wait for their turn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.presets.panoptic_deeplab import demo
from pipelines.tuning import concurrency
from pipelines.tuning.concurrency import ConcurrencyLimiter


@pytest.mark.parametrize(
    ("resources", "workers", "cpus", "gpu", "limit", "expected"),
    [
        ({"CPU": 4}, 1, 1.2, False, 0, 3),
        ({"CPU": 3}, 1, 1.2, False, 0, 2),
        ({"CPU": 2.42}, 1, 1.2, False, 0, 2),  # with the trials' own 0.01 exactly full
        ({"CPU": 2.41}, 1, 1.2, False, 0, 1),
        ({"CPU": 64, "GPU": 8}, 2, 1.2, True, 0, 4),
        ({"CPU": 5, "GPU": 8}, 2, 1.2, True, 0, 2),
        ({"CPU": 64, "GPU": 8}, 2, 1.2, True, 3, 3),
        ({"CPU": 64}, 2, 1.2, False, 99, 26),
        ({"CPU": 64, "memory": 8 << 30}, 2, 1.2, False, 0, 10),
    ],
)
def test_trials_at_once(resources, workers, cpus, gpu, limit, expected):
    assert concurrency.max_concurrent_trials(resources, workers, cpus, gpu, limit) == expected


def test_a_cluster_too_small_for_one_trial():
    with pytest.raises(ValueError, match=r"one trial needs 2\.41 CPUs .* the cluster has 2 CPUs and 0 GPUs; lower"):
        concurrency.max_concurrent_trials({"CPU": 2}, 2, 1.2, False)
    with pytest.raises(ValueError, match=r"process takes 768 MiB, and Ray counts 512 MiB"):
        concurrency.max_concurrent_trials({"CPU": 64, "memory": 512 << 20}, 2, 1.2, False)
    with pytest.raises(ValueError, match=r"and 4 GPUs"):
        concurrency.max_concurrent_trials({"CPU": 64, "GPU": 2}, 4, 1.2, True)


def test_the_largest_trial_sets_how_many_run_at_once(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 10.0})
    monkeypatch.setattr(concurrency.session, "connect", lambda *given: None)
    base = replace(demo(), feed=replace(demo().feed, decode="map"))

    def needing(**options: Any) -> Any:
        return replace(base, train=replace(base.train, cpus_per_worker=1.0, **options))

    data = base.feed.reserved_cpus
    assert data == base.feed.tasks * base.feed.cpus and demo().feed.reserved_cpus == 0
    one, four = needing(workers=1), needing(workers=4)
    assert concurrency.join_cluster(0, [one]) == int(10 // (1 + data + 0.01))
    assert concurrency.join_cluster(0, [one, four]) == int(10 // (4 * (1 + data) + 0.01))
    greedy = replace(one, feed=replace(one.feed, tasks=8, cpus=1.0))
    assert concurrency.join_cluster(0, [one, greedy]) == 1


def test_the_limiter_lets_as_many_through_as_fit():
    limiter = ConcurrencyLimiter(2)
    assert limiter.update(["a", "b", "c", "d"]) == ["a", "b"] and not limiter.admitted("c")
    assert limiter.update(["c", "b", "d"]) == ["b", "c"]  # b still runs, a has ended
    assert limiter.update(["d"]) == ["d"] and limiter.admitted("d") and not limiter.admitted("a")


def test_a_trial_waits_for_its_turn(monkeypatch):
    import ray

    answers = [False, False, True]
    asked: list[str] = []

    def admitted(trial_id: str) -> bool:
        asked.append(trial_id)
        return answers.pop(0)

    monkeypatch.setattr(concurrency, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray, "get", lambda value: value)
    handle = SimpleNamespace(admitted=SimpleNamespace(remote=admitted))
    monkeypatch.setattr(ray, "get_actor", lambda name: {"concurrency-limiter-parent": handle}[name])
    concurrency.wait_for_turn("parent", "7")
    assert asked == ["7"] * 3

    def absent(name: str) -> None:
        raise ValueError(f"no actor {name}")

    monkeypatch.setattr(ray, "get_actor", absent)
    concurrency.wait_for_turn("parent", "7")
    assert asked == ["7"] * 3
