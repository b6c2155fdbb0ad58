"""What a frozen backbone saves: a training step of a whole model with it and without, beside the bare backbone.

The backbone alone cannot save more than its forward and backward pass less a forward pass in evaluation mode, without a
graph: what a step saves is to come near that. Weights are random, since times do not depend on them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panoptic.segmentation import Sample, Targets, collate
from panoptic.training.config import Engine, Optim
from panoptic.training.device import autocast, prepare
from panoptic.training.freezing import training_mode
from panoptic.training.optim import build_ema, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from pipelines.presets import PRESETS
from tests.benchmarks import inputs
from tests.benchmarks.timing import SLOW, Row

PRESET = "panoptic-deeplab-pedestrians-imagenet"
BATCH, SIZE = 4, (192, 320)
"""Images of a step, and their height and width at scale 1."""


def rows(scale: float, repeat: int) -> list[Row]:
    """The rows "frozen": the step of the preset's model, and its backbone alone."""
    experiment = PRESETS[PRESET]()
    classes = inputs.categories(4, 8)
    height, width = (max(64, round(side * scale)) for side in SIZE)
    batch = _batch(classes, (height, width))
    x = torch.rand(BATCH, 3, *batch[0].shape[-2:]).contiguous(memory_format=torch.channels_last)
    config = replace(experiment.model, backbone=replace(experiment.model.backbone, weights="none"))

    def built(freeze: int) -> Any:
        torch.manual_seed(0)
        model = replace(config, backbone=replace(config.backbone, freeze=freeze)).build(classes)
        return prepare(model, "cpu", experiment.engine)

    frozen, learning = built(5), built(0)
    runs: list[Callable[[], object]] = [
        _step(frozen, experiment.optim, experiment.engine, batch),
        _step(learning, experiment.optim, experiment.engine, batch),
        _evaluated(built(0).backbone.eval(), x, experiment.engine),
        _trained(built(0).backbone.train(), x, experiment.engine),
    ]
    step, whole, forward, both = _medians(runs, repeat)
    work = f"{BATCH} images of {width}x{height}, {config.backbone.name}"
    return [
        Row("frozen", f"training step, backbone frozen, {work}", step, "ms", "not frozen", whole, whole / step),
        Row("frozen", "its backbone, evaluated", forward, "ms", "forward and backward", both, both / forward),
    ]


def _batch(classes: Any, size: tuple[int, int]) -> tuple[Tensor, Targets]:
    rng = np.random.default_rng(0)
    truths = [inputs.draw_truth(rng, size, 6, 4, classes) for _ in range(BATCH)]
    samples = [Sample(inputs.draw_image(rng, truth), truth, f"image {k}") for k, truth in enumerate(truths)]
    return collate(samples, 32)


def _step(model: Any, optim: Optim, engine: Engine, batch: tuple[Tensor, Targets]) -> Callable[[], object]:
    training_mode(model)
    optimiser, ema = build_optimiser(model, optim), build_ema(model, optim.ema)
    options: Any = {"optim": optim, "engine": engine, "health": SkipCounter(), "ema": ema}
    return lambda: train_step(model, optimiser, [batch], step=0, total=10_000, **options)


def _evaluated(backbone: Any, x: Tensor, engine: Engine) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad(), autocast(x, engine):
            return backbone(x)

    return run


def _trained(backbone: Any, x: Tensor, engine: Engine) -> Callable[[], object]:
    def run() -> None:
        with autocast(x, engine):
            loss = torch.stack([feature.float().mean() for feature in backbone(x).values()]).sum()
        loss.backward()

    return run


def _medians(runs: list[Callable[[], object]], repeat: int) -> list[float]:
    """CPU milliseconds of each, the median of rounds in which they alternate; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in runs]
    gc.disable()
    try:
        for done in range(repeat + 1):
            if done > 3 and sum(map(sum, seconds)) > SLOW:
                break
            for run, taken in zip(runs, seconds, strict=True):
                begin = time.thread_time()
                run()
                taken.append(time.thread_time() - begin)
            gc.collect()
    finally:
        gc.enable()
    return [1e3 * statistics.median(taken[1:]) for taken in seconds]
