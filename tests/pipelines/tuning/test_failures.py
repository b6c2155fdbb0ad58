"""Reasons of failures, lack of memory among them, and runs that an interruption left open."""

from __future__ import annotations

import pytest

from pipelines.tracking import runs as tracking
from pipelines.tuning.failures import close_children, describe, out_of_memory, perhaps_out_of_memory
from tests.support.plans import stored_plan, tags_of
from tests.support.worker_failures import DIED, GLOO, MONITOR, GroupError, unhealthy


def test_the_reason_is_what_the_worker_raised():
    inner = GroupError({0: FloatingPointError("step 9: loss not finite")})
    assert describe(inner) == "FloatingPointError: step 9: loss not finite"
    text = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried"
    assert describe(GroupError({1: RuntimeError(text)})) == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert describe(ValueError("data.root: needs data")) == "ValueError: data.root: needs data"
    assert describe(KeyError()) == "KeyError: "


def test_a_killed_worker_is_the_reason_and_not_that_others_missed_it():
    """As Ray 2.60 tells of a worker that SIGKILL ended, and of one that its memory monitor ended."""
    from ray.exceptions import OutOfMemoryError

    killed = GroupError({0: RuntimeError(GLOO), 1: unhealthy(RuntimeError(DIED))})
    assert describe(killed).startswith("a worker's process died: killed, perhaps by the kernel for lack of memory")
    assert perhaps_out_of_memory(killed) and not out_of_memory(killed)
    monitored = GroupError({0: RuntimeError(GLOO), 1: unhealthy(OutOfMemoryError(MONITOR))})
    assert describe(monitored) == f"OutOfMemoryError: {MONITOR.splitlines()[0]}" and out_of_memory(monitored)
    alone = GroupError({0: RuntimeError(GLOO)})
    assert describe(alone) == f"RuntimeError: {GLOO}" and not perhaps_out_of_memory(alone)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (GroupError({0: RuntimeError("torch.OutOfMemoryError: CUDA out of memory")}), True),
        (GroupError({0: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")}), True),
        (GroupError({0: RuntimeError("Task was killed due to the node running low on memory pressure")}), True),
        (MemoryError(), True),
        (GroupError({0: FloatingPointError("not finite")}), False),
        (ValueError("train.batch"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, memory: bool):
    assert out_of_memory(error) == memory


def test_runs_that_an_interruption_left_open_are_closed(tmp_path, mlflow_template):
    plan = stored_plan(tmp_path, mlflow_template)
    options = tracking.Tracking(uri=plan.parent.tracking_uri)
    runs = [tracking.start(options, tmp_path, parent=plan.parent.run_id) for _ in range(2)]
    tracking.finish(runs[1], "FINISHED")
    stranger = tracking.start(options, tmp_path, parent="another")
    close_children(plan.parent)
    assert [tags_of(plan, run.run_id)["status"] for run in (*runs, stranger)] == ["KILLED", "FINISHED", "RUNNING"]
    assert tags_of(plan, runs[0].run_id)["state"] == "interrupted"
