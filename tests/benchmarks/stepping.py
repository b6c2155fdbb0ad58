"""`train_step` beside a bare loop: the same model and batches, network, loss, backward, clipping, optimiser, average.

What is left over is what a step does beside that: schedule, seeds, statistics that can be put back, verdict, meters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.device import Engine
from panoptic.training.optim import Optim, build_ema, build_optimiser
from panoptic.training.step import Meter, SkipCounter, train_step
from tests.benchmarks.timing import Case
from tests.support.small import SMALL_DEEPLAB

BATCH = 4
"""Images of a step."""

OPTIM = Optim(optimiser="adamw", lr=1e-4, schedule="constant", clip_norm=1.0, ema=0.99)


class Ours:
    """The step of a training, and its meter."""

    def __init__(self, categories: Categories, batch: Any) -> None:
        torch.manual_seed(0)
        self.model = SMALL_DEEPLAB.build(categories).train()
        self.optimiser, self.ema = build_optimiser(self.model, OPTIM), build_ema(self.model, OPTIM.ema)
        self.batch, self.done, self.health, self.meter = batch, 0, SkipCounter(), Meter()

    def __call__(self, _: int) -> float:
        options: Any = {"optim": OPTIM, "engine": Engine(), "health": self.health, "ema": self.ema}
        result = train_step(self.model, self.optimiser, [self.batch], step=self.done, total=10_000, **options)
        self.meter.add(result)
        self.done += 1
        return float(result.losses["total"])


class Bare:
    """What nobody can do without."""

    def __init__(self, categories: Categories, batch: Any) -> None:
        torch.manual_seed(0)
        self.model = SMALL_DEEPLAB.build(categories).train()
        self.optimiser = build_optimiser(self.model, OPTIM)
        self.ema = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(OPTIM.ema), use_buffers=False
        )
        self.batch = batch

    def __call__(self, _: int) -> float:
        images, targets = self.batch
        self.optimiser.zero_grad(set_to_none=True)
        losses, _ = self.model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip_norm)
        self.optimiser.step()
        self.ema.update_parameters(self.model)
        return float(loss.detach())


def _same(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise ValueError(f"losses {ours} and {theirs} differ")


def case(scale: float) -> Case:
    """A step of a small Panoptic-DeepLab on squares of 256 pixels times `scale`."""
    categories = Categories.from_coco([{"id": k + 1, "name": f"class {k}", "isthing": k % 2} for k in range(10)])
    rng, side = np.random.default_rng(0), max(64, round(256 * scale))
    samples = []
    for k in range(BATCH):
        segments = (np.arange(side)[:, None] * 4 // side + 1).repeat(side, 1).astype(np.int32)
        truth = Segmentation(segments, rng.choice(10, 4, replace=False).astype(np.int64))
        samples.append(Sample(rng.integers(0, 256, (side, side, 3), np.uint8), truth, f"image {k}"))
    batch = collate(samples, 32)
    work = f"training step, {BATCH} images of {side}x{side}"
    bare = Bare(categories, batch)
    return Case("step", work, Ours(categories, batch), {"bare loop": bare}, {"bare loop": _same})
