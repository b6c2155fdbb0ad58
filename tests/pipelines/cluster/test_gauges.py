"""Our gauges: set by a log line, a checkpoint and a scheduled evaluation, and scraped from a machine's endpoint."""

from __future__ import annotations

import math
import os
import time
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.cluster import gauges


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float, dict[str, str]]]]:
    """What gauges are set to; no Ray."""
    import ray
    import ray.util.metrics

    entries: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            entries.append((self.name, value, tags))

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    gauges._gauge.cache_clear()
    yield entries
    gauges._gauge.cache_clear()


def test_numbers_alone_are_published(told: list[Any]) -> None:
    gauges.publish({"panoptic_step": 3, "panoptic_loss": math.nan}, run="one")
    assert told == [("panoptic_step", 3.0, {"run": "one"})]
    with pytest.raises(KeyError):
        gauges.publish({"panoptic_stepp": 3}, run="one")


def test_without_ray_nothing_is_published(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    gauges.publish({"panoptic_step": 3}, run="one")
    assert not told


def test_a_training_sets_every_gauge_of_its_own() -> None:
    from pipelines.training import worker, writer

    values = {"loss/total": 2.0, "images_per_second": 8.0, "step_seconds": 0.5, "data_wait": 0.1}
    progress = worker.progress_gauges(7, 40, {**values, "memory_mib": 2.0, "skipped_steps": 0})
    assert {**progress, **writer.checkpoint_gauges(8), "panoptic_pq": 50.0}.keys() == gauges.TRAINING.keys()
    assert progress["panoptic_step"] == 7 and progress["panoptic_memory_bytes"] == 2 * 2**20
    first = worker.progress_gauges(1, 40, {"memory_mib": 2.0, "skipped_steps": 1, "lr": 0.1})
    assert "panoptic_loss" not in first and "panoptic_images_per_second" not in first


def test_a_scheduled_evaluation_is_told_on_a_cluster_alone(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.evaluation import scheduled

    stayed: list[bool] = []
    monkeypatch.setattr(scheduled.session, "connect", lambda: None)
    monkeypatch.setattr(gauges, "linger", lambda: stayed.append(True))
    record: Any = SimpleNamespace(pq=42.0)
    scheduled._publish("models:/m@challenger", record)
    assert not told and not stayed
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    scheduled._publish("models:/m@challenger", record)
    assert {name for name, _, _ in told} == gauges.EVALUATION.keys() and stayed
    assert all(tags == {"model": "models:/m@challenger"} for _, _, tags in told)


@pytest.mark.slow
def test_prometheus_finds_them_on_the_machine(ray_cluster: None) -> None:
    """Through a worker of Ray and its agent, as Prometheus would ask."""
    import ray

    run = f"scraped-{os.getpid()}"

    @ray.remote(num_cpus=0)
    def publish() -> None:
        from pipelines.cluster import gauges

        gauges.publish({name: 7.0 for name in gauges.TRAINING}, run=run)
        time.sleep(15)  # Ray hands them on every 10 s

    pending = publish.remote()
    (node,) = [node for node in ray.nodes() if node["Alive"]][:1]
    url, text = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", ""
    end = time.monotonic() + 60
    while time.monotonic() < end and run not in text:
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    found = {line.split("{")[0] for line in text.splitlines() if f'run="{run}"' in line}
    assert found == {f"{gauges.PREFIX}{name}" for name in gauges.TRAINING}
    ray.get(pending)
