"""A panoptic model of two convolutions, for tests of everything that treats models alike."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from panoptic.models.base import Outputs, PanopticModel, Prediction, Wanted
from panoptic.segmentation import Categories, Frame, Instances, Sample, Segmentation, Targets, collate


@dataclass(frozen=True)
class TinyBackbone:
    """The backbone."""

    width: int = 4
    """Channels."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation."""


@dataclass(frozen=True)
class TinyConfig:
    """The model."""

    backbone: TinyBackbone = field(default_factory=TinyBackbone)
    """The backbone."""
    rates: tuple[int, ...] = (1, 2)
    """Unused."""
    factor: float | None = None
    """Unused."""

    def build(self, categories: Categories) -> Tiny:
        return Tiny(self, categories)


class Tiny(PanopticModel):
    divisor = 4

    def __init__(self, config: TinyConfig, categories: Categories) -> None:
        super().__init__()
        self.categories = categories
        width = config.backbone.width
        norm = nn.BatchNorm2d(width) if config.backbone.norm == "batch" else nn.GroupNorm(1, width)
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm)
        self.head = nn.Conv2d(width, len(categories), 1)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        return {"semantic": self.head(self.backbone(images.float() / 255).relu())}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        semantic = torch.full_like(targets.segments, -1, dtype=torch.int64)
        for b in range(len(semantic)):
            inside = targets.segments[b] > 0
            semantic[b][inside] = targets.labels[b][targets.segments[b][inside].long() - 1]
        # the draw makes the trace depend on the seeding of each micro-batch
        noisy = outputs["semantic"] + 0.1 * torch.rand(outputs["semantic"].shape[1])[:, None, None]
        loss = nn.functional.cross_entropy(noisy, semantic, ignore_index=-1)
        return {"semantic": loss, "size": 1e-3 * outputs["semantic"].square().mean()}

    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        maps = []
        for logits, (height, width) in zip(outputs["semantic"], frame.output_sizes.tolist(), strict=True):
            present, segments = np.unique(logits.argmax(0)[:height, :width].cpu().numpy(), return_inverse=True)
            scores = np.ones(len(present), np.float32)
            maps.append(Segmentation(1 + segments.reshape(height, width).astype(np.int32), present, None, scores))
        empty = Instances([], np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
        return Prediction(
            maps if "maps" in want else None,
            [empty for _ in maps] if "instances" in want else None,
            [found.semantic() for found in maps] if "semantics" in want else None,
        )

    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        return {}


def tiny_categories(count: int = 3) -> Categories:
    return Categories.from_coco([{"id": 10 * i + 1, "name": f"class {i}", "isthing": i % 2} for i in range(count)])


def tiny_batch(index: int, batch: int = 2, classes: int = 3, side: int = 8) -> tuple[Tensor, Targets]:
    """Batch `index` of an endless stream: images whose channels tell the class."""
    rng = np.random.default_rng(index)
    samples = []
    for k in range(batch):
        label = rng.integers(classes, size=2)
        segments = np.ones((side, side), np.int32)
        segments[:, side // 2 :] = 2
        image = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
        image[..., 0] += (60 * label[segments - 1]).astype(np.uint8)
        samples.append(Sample(image, Segmentation(segments, label.astype(np.int64)), f"image-{index}-{k}"))
    return collate(samples, Tiny.divisor)
