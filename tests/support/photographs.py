"""Four photographs of COCO, learnt by heart: the same test of every architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panoptic.metrics.panoptic_quality import QualityCounts, count, quality
from panoptic.png import decode_image, from_coco
from panoptic.segmentation import Categories, Sample, collate
from panoptic.training.device import Engine, prepare
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from panoptic.transforms import Resize, evaluation_view


def photographs(shared: Callable[[str], Path], short: int = 96) -> tuple[list[Sample], Categories]:
    """The photographs with their crowd and their void, evaluated at the size that is learnt."""
    root = shared("data/coco_sample")
    record = json.loads((root / "annotations/panoptic_sample.json").read_text())
    categories = Categories.from_coco(record["categories"])
    files = {image["id"]: image["file_name"] for image in record["images"]}
    samples = []
    for entry in record["annotations"]:
        png = (root / "annotations/panoptic_sample" / entry["file_name"]).read_bytes()
        image = decode_image((root / "images" / files[entry["image_id"]]).read_bytes())
        truth = from_coco(png, entry, categories, entry["file_name"])
        view = evaluation_view(Sample(image, truth, entry["file_name"]), Resize(short=short))
        samples.append(replace(view, original=None, truth=view.truth.compact()))
    return samples, categories


def learn(
    config: Any, samples: Sequence[Sample], categories: Categories, steps: int, optim: Optim, engine: Engine
) -> tuple[list[float], float]:
    """Train from scratch on all of them in every step, with both threads of a small machine if it has no other test.

    Returns:
        the loss of each step, and PQ (0 to 100) on the same photographs at the end.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    try:
        return _learn(config, samples, categories, steps, optim, engine)
    finally:
        torch.set_num_threads(threads)


def _learn(
    config: Any, samples: Sequence[Sample], categories: Categories, steps: int, optim: Optim, engine: Engine
) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = prepare(config.build(categories), "cpu", engine).train()
    optimiser, health, batch, losses = build_optimiser(model, optim), SkipCounter(), collate(samples, model.divisor), []
    for step in range(steps):
        result = train_step(
            model, optimiser, [batch], step=step, total=steps, optim=optim, engine=engine, health=health
        )
        losses.append(float(result.losses["total"]))
    model.eval()
    with torch.no_grad():
        _, maps = model(batch[0], frame=batch[1].frame, segment=True)
    assert maps is not None
    total = QualityCounts.zeros(len(categories))
    for sample, found in zip(samples, maps, strict=True):
        total += count(sample.truth, found, categories)
    return losses, quality(total, categories).all.pq


def of_present_classes(samples: Sequence[Sample], categories: Categories) -> tuple[list[Sample], Categories]:
    """The samples with classes that occur in them alone, which are 31 of COCO's 133 in the photographs.

    The others teach a model of four photographs nothing, and logits of theirs at every pixel take up to half of a step.
    """
    present = np.unique(np.concatenate([sample.truth.labels for sample in samples]))
    fields = (categories.names, categories.is_thing, categories.ids, categories.colours)
    chosen = Categories(*(tuple(values[k] for k in present) for values in fields))
    truths = [replace(sample.truth, labels=np.searchsorted(present, sample.truth.labels)) for sample in samples]
    return [replace(sample, truth=truth) for sample, truth in zip(samples, truths, strict=True)], chosen
