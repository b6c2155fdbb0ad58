"""What a training says of its machines: how busy they are, and the summary of its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from panoptic.training.optim import Optim
from panoptic.transforms import Augment
from pipelines.training import machine
from tests.support.small import SMALL_FPN


def test_one_machine_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    alone = machine.usage(cpu, {})
    names = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage")
    assert list(alone) == [f"system/{name}" for name in names]
    assert 0 < alone["system/system_memory_usage_megabytes"] <= psutil.virtual_memory().total / 1e6

    def gather(readings: list, own: tuple) -> None:
        second = {"gpu_1_memory_usage_percentage": 5.0, "step_forward_seconds": 3.0, "step_backward_seconds": 1.0}
        readings[:] = [own, (own[0], second), ("other", {names[0]: 7.0})]

    monkeypatch.setattr(machine, "world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    several = machine.usage(cpu, {"forward_seconds": 2.0, "backward_seconds": 2.0})
    here = machine.socket.gethostname()
    assert several["system/other/cpu_utilization_percentage"] == 7.0
    assert several[f"system/{here}/gpu_1_memory_usage_percentage"] == 5.0
    assert [several[f"system/{here}/step_{name}_seconds"] for name in ("forward", "backward")] == [3.0, 2.0]
    assert len(several) == len(names) + 4


def test_the_summary_of_a_state_counts_what_the_optimiser_keeps(small_categories, caplog) -> None:
    options = {"optim": Optim(optimiser="adamw", ema=0.9), "augment": Augment(crop=(64, 96))}
    model = SMALL_FPN.build(small_categories)
    state: Any = SimpleNamespace(experiment=SimpleNamespace(**options), model=model)
    weights = sum(value.nbytes for value in model.state_dict().values()) / 1e6
    text = machine.describe(state)
    assert "one image of 64x96" in text and f"weights {weights:.0f} + gradients" in text and "average" in text
    state.model = torch.nn.Linear(2, 2)
    assert machine.describe(state) == "" and "no summary of the model" in caplog.text


@pytest.mark.parametrize(
    ("augment", "size"),
    [
        (Augment(crop=(512, 1024)), (512, 1024)),
        (Augment(size=(400, 300)), (400, 300)),
        (Augment(scale="jitter", target=(896, 896)), (896, 896)),
        (Augment(), machine.FALLBACK),
    ],
)
def test_the_image_of_the_summary_has_the_size_that_the_view_fixes(augment: Augment, size: tuple[int, int]) -> None:
    assert machine.image_size(augment) == size
