"""Count of the values that a training step of each architecture asks the device for: a GPU stands still each time."""

from __future__ import annotations

import typing
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic import models
from panoptic.models import (
    DETRConfig,
    EfficientPSConfig,
    EoMTConfig,
    JSISNetConfig,
    Mask2FormerConfig,
    MaskFormerConfig,
    PanopticDeepLabConfig,
    PanopticFCNConfig,
    PanopticFPNConfig,
)
from panoptic.segmentation import Sample, Targets, collate
from panoptic.training.device import Engine
from panoptic.training.optim import Optim, build_ema, build_optimiser
from panoptic.training.step import Meter, SkipCounter, train_step
from tests.support.host_reads import HostReads
from tests.support.small import SMALL

ARCHITECTURES = typing.get_args(models.Architecture) or (models.Architecture,)

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in ARCHITECTURES for name, c in SMALL[kind].items()]

ON_CPU = ("region_masks", "_boxes_of_runs")
"""Functions that ask on a CPU, where that is cheap, and not on a GPU."""

MATCHING = "matcher.py"
"""The one copy of the matching: costs of all decoder layers."""

READS: dict[type, dict[str, int]] = {
    PanopticDeepLabConfig: {},
    MaskFormerConfig: {MATCHING: 1},
    Mask2FormerConfig: {MATCHING: 1},
    EoMTConfig: {MATCHING: 1},
    DETRConfig: {MATCHING: 1},
    # What anchors and regions are drawn from: a permutation is as long as there are positives, and another length would
    # draw other regions. In Mask R-CNN with the level of every region.
    PanopticFPNConfig: {"rcnn/mask_rcnn.py": 1},
    EfficientPSConfig: {"rcnn/mask_rcnn.py": 1},
    JSISNetConfig: {"rcnn/boxes.py": 1},
    PanopticFCNConfig: {"models/panoptic_fcn/targets.py": 1},
}
"""The most reads of a step of each architecture beside its verdict, by the file or folder in panoptic/.

torchvision's suppression, one operation on a CPU, waits for a GPU once for each image, which is not counted here.
"""


def batch(model: Any, categories: Any, draw: Any, count: int) -> tuple[Tensor, Targets]:
    rng = np.random.default_rng(0)
    truths = [draw(rng, 64, 96, categories) for _ in range(count)]
    samples = [Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), truth, "a") for truth in truths]
    return collate(samples, model.divisor)


def reads_of_a_step(config: Any, categories: Any, draw: Any, count: int) -> Counter[str]:
    """Reads of a whole step with clipping and averaging, and of what the meter makes of it, by place."""
    torch.manual_seed(0)
    model = config.build(categories).train()
    images, targets = batch(model, categories, draw, count)
    optim = Optim(optimiser="adamw", lr=1e-4, clip_norm=1.0, clip_value=1.0, ema=0.9)
    optimiser, ema, meter = build_optimiser(model, optim), build_ema(model, optim.ema), Meter()
    options: Any = {"step": 0, "total": 9, "optim": optim, "engine": Engine(), "health": SkipCounter(), "ema": ema}
    with HostReads(on_cpu=(targets.frame.sizes, targets.frame.output_sizes)) as reads:
        meter.add(train_step(model, optimiser, [(images, targets)], **options))
    return Counter({place: n for place, n in reads.places.items() if not place.endswith(ON_CPU)})


@pytest.mark.parametrize("config", CASES)
def test_a_step_reads_no_more_for_more_images_and_no_more_than_stated(
    config, small_categories, random_segmentation
) -> None:
    few, many = (reads_of_a_step(config, small_categories, random_segmentation, count) for count in (2, 5))
    assert not many - few, many - few
    left = Counter(few)
    # the one read of the step itself is its verdict, which on a GPU is read while the next step runs
    for where, most in {"training/step.py": 1, **READS[type(config)]}.items():
        here = {place: n for place, n in few.items() if place.startswith(where)}
        assert sum(here.values()) <= most, here
        left -= Counter(here)
    assert not left, left
