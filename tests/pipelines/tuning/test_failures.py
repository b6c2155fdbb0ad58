"""Reasons of failures, lack of memory among them, and runs that an interruption left open."""

from __future__ import annotations

import pickle

import pytest
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError
from ray.train.v2.api.exceptions import ControllerError
from torch.distributed import DistBackendError

from pipelines.tracking import runs as tracking
from pipelines.training.failures import OutOfMemory, describe, out_of_memory, perhaps_out_of_memory
from pipelines.tuning.failures import close_children
from tests.support.plans import stored_plan, tags_of
from tests.support.worker_failures import GLOO, KILLED, MONITORED, NODE_LOST, group_error


def test_the_reason_is_what_the_worker_raised():
    inner = group_error({0: FloatingPointError("step 9: loss not finite")})
    assert describe(inner) == "FloatingPointError: step 9: loss not finite"
    assert describe(ValueError("data.root: needs data")) == "ValueError: data.root: needs data"
    assert describe(KeyError()) == "KeyError: "
    remote = RayTaskError("f", "Traceback (most recent call last):\n  File x\nMemoryError: y", MemoryError("y"))
    assert describe(remote) == "MemoryError: y" == describe(remote.as_instanceof_cause())
    text = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried"
    assert describe(RuntimeError(text)) == "torch.OutOfMemoryError: CUDA out of memory. Tried"


def test_a_killed_worker_is_the_reason_and_not_that_others_missed_it():
    killed = group_error({0: GLOO, 1: KILLED})
    assert describe(killed).startswith("a worker's process died: killed, perhaps by the kernel for lack of memory")
    assert perhaps_out_of_memory(killed) and not out_of_memory(killed)
    monitored = group_error({0: GLOO, 1: MONITORED})
    assert describe(monitored).startswith("OutOfMemoryError: 4 worker(s) were killed due to the node running low")
    assert describe(monitored).endswith("23.54GB") and out_of_memory(monitored)
    for other in (group_error({0: GLOO}), group_error({0: GLOO, 1: NODE_LOST})):
        assert not perhaps_out_of_memory(other)
    assert describe(group_error({0: GLOO})) == f"RuntimeError: {GLOO}"


@pytest.mark.parametrize(
    "missed",
    [
        GLOO,
        ConnectionResetError(104, "reset"),
        BrokenPipeError(32, "broken"),
        DistBackendError("remote process exited"),
    ],
)
def test_what_missed_another_worker_is_no_reason(missed: Exception):
    """Whichever rank it has, and whatever the reason's own words are."""
    reason = ValueError("the process group of nccl has a connection closed")
    for failures in ({0: missed, 1: reason}, {0: reason, 1: missed}):
        assert describe(group_error(failures)) == f"ValueError: {reason}"


def test_the_allocation_that_torch_refuses_is_lack_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 46)
    assert type(refused.value) is RuntimeError and out_of_memory(group_error({0: refused.value}))


def of_cuda(message: str, code: int) -> torch.AcceleratorError:
    """An error of the device as PyTorch raises it: with CUDA's code as an attribute."""
    error = torch.AcceleratorError(message)
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (group_error({0: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")}), True),
        (group_error({0: of_cuda("CUDA error: out of memory", 2)}), True),
        (group_error({0: pickle.loads(pickle.dumps(of_cuda("CUDA error", 2)))}), True),
        (group_error({0: of_cuda("CUDA error: an address was out of memory", 700)}), False),
        (group_error({0: RuntimeError("CUDA driver error: out of memory")}), True),
        (RayTaskError("f", "text", MemoryError()), True),
        (ControllerError(OutOfMemory("CUDA out of memory")), True),
        (MemoryError(), True),
        (group_error({0: FloatingPointError("not finite")}), False),
        (ValueError("train.batch: a batch that would run out of memory"), False),
        (WorkerCrashedError(), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, memory: bool):
    assert out_of_memory(error) == memory


def test_a_worker_that_crashed_may_have_run_out_of_memory():
    assert perhaps_out_of_memory(WorkerCrashedError()) and not perhaps_out_of_memory(ValueError("x"))


def test_runs_that_an_interruption_left_open_are_closed(tmp_path, mlflow_template):
    plan = stored_plan(tmp_path, mlflow_template)
    options = tracking.Tracking(uri=plan.parent.tracking_uri)
    runs = [tracking.start(options, tmp_path, parent=plan.parent.run_id) for _ in range(2)]
    tracking.finish(runs[1], "FINISHED")
    stranger = tracking.start(options, tmp_path, parent=tracking.start(options, tmp_path).run_id)
    close_children(plan.parent)
    assert [tags_of(plan, run.run_id)["status"] for run in (*runs, stranger)] == ["KILLED", "FINISHED", "RUNNING"]
    assert tags_of(plan, runs[0].run_id)["state"] == "interrupted"
