"""The machines of a training: what it asks of them at its start, how busy they are, and where a step's time goes.

Both stand under the names of MLflow's own system metrics, which its pages show on a tab of their own.

A reading takes what the operating system has counted since the last one, so that no thread is needed.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from panoptic.distributed import world_size
from panoptic.training.summary import summarise_model, summary_text
from panoptic.transforms import Augment
from pipelines.training.checkpoints import optimiser_slots
from pipelines.training.state import State

logger = logging.getLogger(__name__)

STEP = "step_"
"""Beginning of the names of a step's phases."""

FALLBACK = (640, 640)
"""Height and width of the summary's image where no option of the training view fixes them."""


def usage(device: torch.device, split: Mapping[str, float]) -> dict[str, float]:
    """Use of CPUs, memory and GPUs of each machine of the training since the last call; every worker calls it.

    Args:
        device: of this worker.
        split: seconds of the phases of its steps (`Meter.split`).

    Returns:
        `system/<metric>`, or `system/<host>/<metric>` where there are several machines: percent of the CPUs, memory in
        megabytes and percent; of a GPU its number, memory and, where pynvml is installed, percent of the time in use;
        seconds of each phase of a step, `step_<phase>_seconds`, of the machine's worker that took longest.
    """
    own = {**machine(), **gpu(device), **{f"{STEP}{name}": value for name, value in split.items()}}
    readings: list[Any] = [(socket.gethostname(), own)]
    if world_size() > 1:
        readings = [None] * world_size()
        torch.distributed.all_gather_object(readings, (socket.gethostname(), own))
    by_host: dict[str, dict[str, float]] = {}
    for host, values in readings:
        known = by_host.get(host, {})  # of the first worker of a machine; GPUs of all
        slowest = {n: max(v, known[n]) for n, v in values.items() if n.startswith(STEP) and n in known}
        by_host[host] = {**values, **known, **slowest}
    several = len(by_host) > 1
    return {
        f"system/{host + '/' if several else ''}{name}": value
        for host, values in by_host.items()
        for name, value in values.items()
    }


def machine() -> dict[str, float]:
    """CPU since the last call and memory of this machine."""
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }


def gpu(device: torch.device) -> dict[str, float]:
    """Memory and use of this worker's GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    name = f"gpu_{device.index or 0}"
    values = {
        f"{name}_memory_usage_megabytes": (total - free) / 1e6,
        f"{name}_memory_usage_percentage": 100 * (1 - free / total),
    }
    try:
        values[f"{name}_utilization_percentage"] = torch.cuda.utilization(device)
    except (ModuleNotFoundError, RuntimeError) as error:
        logger.debug("no use of the GPU is known (%s)", error)
    return values


def image_size(augment: Augment) -> tuple[int, int]:
    """Height and width of a training image as far as the view fixes them."""
    for size in (augment.crop, augment.size, augment.fit):
        if all(size):
            return size
    return augment.target if augment.scale in ("jitter", "ratio") else FALLBACK


def describe(state: State) -> str:
    """The table of the model that a training begins with; "" and a warning where it cannot be made."""
    optim = state.experiment.optim
    try:
        size = image_size(state.experiment.augment)
        return summary_text(summarise_model(state.model, size, optimiser_slots(optim), optim.ema > 0))
    except Exception as error:  # an operation that torch cannot count: the training is worth more
        logger.warning("there is no summary of the model (%s)", " ".join(str(error).split())[:200])
        return ""
