"""The most memory that a worker has taken, in MiB: of its GPU, or of the process where it trains on a CPU."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
"""Linux's figures of this process; `VmHWM` is the most memory that it held at once."""

CLEAR = Path("/proc/self/clear_refs")
"""The file into which a 5 is written to make Linux count the most memory anew."""


def peak_mib(device: torch.device) -> float:
    """The peak since the process began or since `reset_peak`.

    On a GPU it is what PyTorch gave to tensors, without what it keeps in reserve. Linux's own call for a process
    (`getrusage`) is asked elsewhere only: on Linux it starts with the peak of the process that this one came from.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.exists() and (told := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(told[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def reset_peak(device: torch.device) -> None:
    """Begin the peak anew from what is held now; on a CPU where the operating system is Linux and lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def peak_line(device: torch.device) -> str:
    """The peak beside all memory that there is, which other workers and programs share: "812 of 24033 MiB"."""
    if device.type == "cuda":
        whole, what = torch.cuda.get_device_properties(device).total_memory, "of the GPU"
    else:
        whole, what = psutil.virtual_memory().total, "of the machine"
    return f"{peak_mib(device):.0f} of the {whole / 2**20:.0f} MiB {what}"
