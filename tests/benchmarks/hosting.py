"""The host's work of a training step (row host): what a training's loop computes beside the network and its optimiser.

The loop is that of a worker with all that belongs to it: feed, schedule, seeds, verdict, clipping, optimiser and
average of a network of two convolutions, meters, the look for notices and checkpoints, log lines and MLflow's queue. In
place of the network's work stands a pause, which takes no CPU time. What a bare loop over the same network takes
(forward, backward, clipping, optimiser, average) is no work of the loop. Images are decoded in threads of their own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from panoptic.training.optim import build_ema, build_optimiser
from panoptic.transforms import Augment
from pipelines.presets import PRESETS
from pipelines.tracking import tracker
from pipelines.tracking.runs import Run
from pipelines.training import worker
from pipelines.training.state import Job, State
from tests.benchmarks.timing import Row
from tests.support.stored import write_shards
from tests.support.tiny import TinyConfig, tiny_categories

SKIPPED = 10
"""Steps before the clock starts."""

AWAY = "http://127.0.0.1:9"
"""A tracking server that does not answer: what a step gives it lies in a queue, as for one that does."""


def rows(folder: Path, steps: int, pause: float) -> list[Row]:
    """CPU milliseconds of the loop's thread a step, the mean over steps with their log lines, beside a bare loop's.

    Args:
        folder: for the shards and the run.
        steps: timed ones.
        pause: seconds of a step's network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ours, bare = (
        1e3 * seconds(_state(folder / name, SKIPPED + steps, pause))
        for name, seconds in (("loop", loop_seconds), ("bare", bare_seconds))
    )
    step = f"a step of {1e3 * pause:.0f} ms"
    return [
        Row("host", f"CPU of the loop in {step} of a network without work", ours, "ms", "bare loop", bare, bare / ours),
        Row("host", f"what it takes more, share of {step}", (ours - bare) / (10 * pause), "%"),
    ]


def _state(folder: Path, steps: int, pause: float) -> State:
    """A worker whose network takes so long and computes next to nothing."""
    folder.mkdir()
    categories = tiny_categories()
    demo, shards = PRESETS["demo"](), write_shards(folder / "shards", categories, 32)
    options = replace(demo.train, batch=8, steps=steps, validate_every=steps + 1, workers=1, log_every=20)
    optim = replace(demo.optim, clip_norm=1.0, ema=0.99)
    experiment = replace(demo, train=options, optim=optim, augment=Augment(crop=(32, 32)))
    model = TinyConfig().build(categories)
    parameters = list(model.parameters())

    def forward(*_: Any) -> tuple[dict[str, torch.Tensor], None]:
        time.sleep(pause)
        return {"semantic": torch.stack([parameter.sum() for parameter in parameters]).sum()}, None

    model.forward = forward  # type: ignore[method-assign]
    run = Run(AWAY, "0", "0" * 32)
    return State(
        job=Job(experiment, shards, shards, run, str(folder / "run"), gpu=False),
        rank=0,
        world=1,
        device=torch.device("cpu"),
        model=model,
        optimiser=build_optimiser(model, optim),
        ema=build_ema(model, optim.ema),
        accumulation=1,
        tracker=tracker.Tracker(run, folder / "run"),
    )


def loop_seconds(state: State) -> float:
    """Seconds of CPU of the loop's thread from the beginning of one step to that of the next."""
    marks: list[float] = []
    fitting_step: Callable[..., Any] = worker.fitting_step

    def marked(*arguments: Any) -> Any:
        marks.append(time.thread_time())
        return fitting_step(*arguments)

    nothing = {
        "show_beginning": mock.DEFAULT,
        "validate": mock.Mock(return_value=None),
        "Writer": mock.Mock(return_value=mock.Mock(busy=False, saved=0, saved_at=time.monotonic(), waited=0.0)),
    }
    with (
        mock.patch.multiple(worker, **nothing, fitting_step=marked),
        mock.patch.object(worker.machine, "describe", return_value=""),
        mock.patch.object(tracker, "CLOSING", 0.0),
        contextlib.redirect_stdout(None),
    ):
        worker.train(state)
    return (marks[-1] - marks[SKIPPED]) / (len(marks) - 1 - SKIPPED)


def bare_seconds(state: State) -> float:
    """The same of a loop that does what the network cannot do without."""
    options, optim = state.experiment.train, state.experiment.optim
    model, optimiser = state.model, state.optimiser
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(optim.ema), use_buffers=False
    )
    begin = 0.0
    for step in range(options.steps):
        if step == SKIPPED:
            begin = time.thread_time()
        optimiser.zero_grad(set_to_none=True)
        losses, _ = model(None)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimiser.step()
        average.update_parameters(model)
    return (time.thread_time() - begin) / (options.steps - SKIPPED)
