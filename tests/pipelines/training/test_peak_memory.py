"""The peak of a process's memory: it stays until it is begun anew, which Linux alone does."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch

from pipelines.training import peak_memory
from pipelines.training.peak_memory import CLEAR, peak_line, peak_mib, reset_peak

CPU = torch.device("cpu")

BLOCK = 256
"""MiB."""

linux = pytest.mark.skipif(not CLEAR.exists(), reason="only Linux begins the peak anew")


@linux
def test_the_peak_stays_until_it_is_reset() -> None:
    reset_peak(CPU)
    before = peak_mib(CPU)
    block = np.ones(BLOCK * 2**17)
    held = peak_mib(CPU)
    del block
    assert held > before + 0.9 * BLOCK and peak_mib(CPU) > held - 5  # Linux counts in batches
    reset_peak(CPU)
    assert peak_mib(CPU) < before + 0.5 * BLOCK
    assert peak_line(CPU).endswith(f" of the {psutil.virtual_memory().total / 2**20:.0f} MiB of the machine")


def test_without_linux_the_peak_of_the_process_is_told_and_stays(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = np.ones(BLOCK * 2**17)
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "none" / "clear_refs")
    told = peak_mib(CPU)
    assert block.nbytes / 2**20 < told < psutil.virtual_memory().total / 2**20
    reset_peak(CPU)
    assert peak_mib(CPU) >= told  # it is not begun anew
