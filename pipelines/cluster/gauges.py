"""Our figures among Ray's metrics, which Prometheus scrapes from every machine of a cluster.

Ray puts `ray_` before the names and adds its own labels (node, worker, job). A gauge is that of a process and goes with
it, so moments are Unix times: an age is `time() - gauge`, and `max_over_time` finds it after the process has ended.
`infra/grafana` and `infra/prometheus` hold a dashboard and alerts for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

PREFIX = "ray_"
"""Prefix that Ray puts before every name."""

TRAINING = {
    "panoptic_step": "Steps that the run has done",
    "panoptic_steps": "Step at which the run ends",
    "panoptic_images_per_second": "Images a second of all workers, mean since the last log line",
    "panoptic_step_seconds": "Seconds of a step, mean since the last log line",
    "panoptic_data_wait_ratio": "Share of the time spent waiting for data, 0 to 1",
    "panoptic_loss": "Total loss, mean since the last log line",
    "panoptic_skipped_steps": "Steps without an update since the workers began",
    "panoptic_memory_bytes": "Peak memory of the first worker: of its GPU, else of the process",
    "panoptic_progress_timestamp_seconds": "Unix time of the last log line",
    "panoptic_pq": "Panoptic quality of the last validation, percent",
    "panoptic_checkpoint_step": "Step of the last checkpoint",
    "panoptic_checkpoint_timestamp_seconds": "Unix time at which the last checkpoint was written",
}
"""Gauges of a training with their descriptions; their label is `run`, its name."""

EVALUATION = {
    "panoptic_evaluation_pq": "Panoptic quality of the model of a scheduled evaluation, percent",
    "panoptic_evaluation_timestamp_seconds": "Unix time at which a scheduled evaluation was done, or found done",
}
"""Gauges of a scheduled evaluation; their label is `model`, as it was asked for."""

LINGER = 45.0
"""Seconds that a short process stays after its last figures: Ray takes them every 10 s, Prometheus asks every 15 s."""


@cache
def _gauge(name: str, label: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description={**TRAINING, **EVALUATION}[name], tag_keys=(label,))


def publish(values: Mapping[str, float], **label: str) -> None:
    """Set gauges of this process; does nothing outside of a Ray session. What is no number is left out.

    Args:
        values: by names of `TRAINING` or of `EVALUATION`.
        label: the one label, `run` or `model`.
    """
    import ray

    if not ray.is_initialized():
        return
    ((key, text),) = label.items()
    for name, value in values.items():
        if math.isfinite(value):
            _gauge(name, key).set(float(value), {key: text})


def linger() -> None:
    """Stay until the last figures have been scraped."""
    time.sleep(LINGER)
