"""Cases that `gpu.py` measures: recipes of the architectures, as JSON, and batches with statistics of photographs.

The presets live in pipelines/, which a GPU machine may lack; `gpu.py --write FILE` notes them down where it is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panoptic.layers.norm import FrozenBatchNorm
from panoptic.segmentation import Categories, Sample, Segmentation, Targets, collate
from panoptic.training.device import Engine
from panoptic.training.optim import Optim
from panoptic.training.plain import from_plain, read_config, to_plain

PHOTOGRAPH = (800, 1088)
"""Height and width of COCO's usual 480 x 640 with a short side of 800, in multiples of 32."""

PRESETS = {
    "panoptic-deeplab-r50-cityscapes": ((1025, 2049), 8, (11, 8)),
    "panoptic-deeplab-r52-coco": ((640, 640), 16, (53, 80)),
    "panoptic-fpn-r50-coco": (PHOTOGRAPH, 16, (53, 80)),
    "panoptic-fcn-r50-coco": (PHOTOGRAPH, 16, (53, 80)),
    "jsis-net-r50-coco": ((400, 400), 5, (53, 80)),
    "detr-r50-coco": (PHOTOGRAPH, 16, (53, 80)),
    "maskformer-r50-coco": (PHOTOGRAPH, 16, (53, 80)),
    "mask2former-r50-coco": ((1024, 1024), 16, (53, 80)),
    "efficientps-b5-cityscapes": ((1024, 2048), 16, (11, 8)),
    "eomt-large-coco": ((640, 640), 16, (53, 80)),
}
"""For each preset: height and width of a training image, images a step (the recipe's, at most 16), and how many stuff
and thing classes there are."""


PRECISIONS: dict[str, tuple[Any, Any]] = {
    "float32": ("float32", "none"),
    "tf32": ("float32", "all"),
    "bfloat16": ("bfloat16", "convolutions"),
    "bfloat16+tf32": ("bfloat16", "all"),
    "float16": ("float16", "convolutions"),
}
"""Of the network, and of what stays in float32: `Engine.precision` and `Engine.tf32`. "bfloat16" is as torch has it."""


@dataclass(frozen=True)
class Case:
    """One architecture as its recipe trains it."""

    name: str
    config: Any
    """Of the model."""
    optim: Optim
    channels_last: bool
    size: tuple[int, int]
    """Height and width of an image."""
    batch: int
    stuff: int
    things: int

    @property
    def categories(self) -> Categories:
        """Stuff, then things."""
        count = self.stuff + self.things
        return Categories.from_coco(
            [{"id": k + 1, "name": f"class {k}", "isthing": int(k >= self.stuff)} for k in range(count)]
        )

    def engine(self, precision: str) -> Engine:
        """How it computes: a key of `PRECISIONS`."""
        kind, tf32 = PRECISIONS[precision]
        return Engine(kind, tf32, self.channels_last)


def from_presets() -> list[Case]:
    """The cases of `PRESETS`; needs pipelines/ and what that imports."""
    from pipelines.presets import PRESETS as RECIPES

    cases = []
    for name, (size, batch, (stuff, things)) in PRESETS.items():
        recipe = RECIPES[name]()
        cases.append(Case(name, recipe.model, recipe.optim, recipe.engine.channels_last, size, batch, stuff, things))
    return cases


def write(cases: list[Case], file: Path) -> None:
    """The cases as JSON."""
    plain = [vars(case) | {"config": to_plain(case.config), "optim": to_plain(case.optim)} for case in cases]
    file.write_text(json.dumps(plain, indent=1))


def read(file: Path) -> list[Case]:
    """The inverse of `write`."""
    cases = []
    for plain in json.loads(file.read_text()):
        config, optim = read_config(plain["config"]), from_plain(Optim, plain["optim"])
        cases.append(Case(**plain | {"config": config, "optim": optim, "size": tuple(plain["size"])}))
    return cases


def batches(case: Case, divisor: int, count: int) -> list[tuple[Tensor, Targets]]:
    """`count` batches on the CPU, different from each other."""
    rng, drawn = np.random.default_rng(0), []
    for k in range(count):
        samples = []
        for b in range(case.batch):
            image = rng.integers(0, 256, (*case.size, 3), np.uint8)
            samples.append(Sample(image, draw(rng, case), f"image {k}.{b}"))
        drawn.append(collate(samples, divisor))
    return drawn


def draw(rng: np.random.Generator, case: Case) -> Segmentation:
    """Bands of two to six stuff classes under four to twenty things, most of them small: about COCO's statistics."""
    height, width = case.size
    bands = int(rng.integers(2, 7))
    labels = rng.choice(case.stuff, min(bands, case.stuff), replace=False).tolist()
    segments = (np.arange(height)[:, None] * len(labels) // height + 1).repeat(width, 1).astype(np.int32)
    for _ in range(int(rng.integers(4, 21))):
        side = np.exp(rng.uniform(np.log(8), np.log(min(height, width) / 2), 2)).astype(int)
        top, left = rng.integers(0, height - side[0] + 1), rng.integers(0, width - side[1] + 1)
        rows, columns = np.mgrid[-1 : 1 : side[0] * 1j, -1 : 1 : side[1] * 1j]
        labels.append(case.stuff + int(rng.integers(case.things)))
        segments[top : top + side[0], left : left + side[1]][rows**2 + columns**2 <= 1] = len(labels)
    segments[: height // 20, : width // 20] = 0
    return Segmentation(segments, np.array(labels, np.int64)).compact()


def calibrate(model: torch.nn.Module, images: Tensor) -> None:
    """Give frozen norms the statistics of a batch, as trained weights have them.

    Without trained weights they are the identity, and the values of a ResNet grow until nothing is finite.
    """

    def take(norm: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(norm, FrozenBatchNorm)
        x = arguments[0].detach().float()
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        norm.running_var.copy_(x.var((0, 2, 3), correction=0))

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm)]
    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    with torch.no_grad():
        model.network(images)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
