"""Panoptic FCN: what the merge of one image costs beside the network (row fcn).

The merge gets what a trained network would give: kernels that draw some 60 things and a dozen of stuff. The network is
the published ResNet-50 in float32; its time stands where a peer's does, so a ratio of 7 means that the merge takes
14 % of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from panoptic.models.base import Outputs
from panoptic.models.panoptic_fcn.model import LEVELS, PanopticFCN, PanopticFCNConfig
from panoptic.models.panoptic_fcn.targets import kernel_targets
from panoptic.segmentation import Categories, Frame, Sample, Segmentation, Targets, collate
from tests.benchmarks import inputs
from tests.benchmarks.timing import Case

SIZE, THINGS, STUFF = (800, 1216), 68, 12

SURE = 4.0
"""The logit of what is there; what is not has the opposite one."""


def cases(names: Sequence[str], scale: float) -> list[Case]:
    """The case fcn if it is wanted, with sides multiplied by `scale`."""
    return [_merging(scale)] if "fcn" in names else []


@dataclass(frozen=True)
class Drawn:
    """A truth as a trained network would say it."""

    outputs: Outputs
    frame: Frame


def _merging(scale: float) -> Case:
    categories = inputs.categories(80, 53)
    height, width = (max(2, round(side * scale / 32)) * 32 for side in SIZE)
    truth = inputs.draw_truth(np.random.default_rng(5), (height, width), THINGS, STUFF, categories)
    _, targets = collate([Sample(np.zeros((height, width, 3), np.uint8), truth, "drawn")])
    torch.manual_seed(0)
    model = PanopticFCNConfig().build(categories).eval()
    channels = THINGS + len(model.regions)
    config = replace(PanopticFCNConfig(), head_channels=channels, encoder_channels=channels, position_deform=False)
    merging = replace(config, stuff_area=round(config.stuff_area * scale**2)).build(categories).eval()
    for layer in (merging.thing_embed, merging.stuff_embed):
        torch.nn.init.dirac_(layer.weight)  # a kernel draws with what stands in its cell
    drawn = _draw(targets, merging, categories)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    kernels = len(merging.postprocess(drawn.outputs, drawn.frame, ["instances"]).instances[0].labels)

    def ours(_: int) -> Segmentation:
        return merging.postprocess(drawn.outputs, drawn.frame).maps[0]

    def network(_: int) -> Outputs:
        with torch.inference_mode():
            return model.network(images)

    def compare(mine: Segmentation, _: Outputs) -> None:
        if len(mine.labels) < kernels // 2:
            raise ValueError(f"{len(mine.labels)} segments of {kernels} things and {STUFF} of stuff")

    work = f"Panoptic FCN merge, {width}x{height}, {kernels} kernels of things"
    return Case("fcn", work, ours, {"its network": network}, {"its network": compare})


def _draw(targets: Targets, model: PanopticFCN, categories: Categories) -> Drawn:
    """One channel a thing and a region class; a cell holds the kernel of what is there."""
    config, (height, width) = model.config, targets.frame.canvas
    shapes = [(height // 8, width // 8)]
    for _ in LEVELS[1:]:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    told = kernel_targets(
        targets, categories, cells=(height // 4, width // 4), shapes=shapes, scales=config.scales, most=THINGS
    )
    masks = torch.zeros(1, THINGS, height // 4, width // 4)
    masks[:, : told.masks.shape[1]] = told.masks[:, :THINGS]
    outputs = {"encoded": SURE * (2 * torch.cat([masks, told.region_masks], 1) - 1)}
    for name, level in zip(LEVELS, told.levels, strict=True):
        outputs[f"things_{name}"] = _logits(level.things)
        outputs[f"regions_{name}"] = _logits(level.regions)
        areas = level.regions[0].flatten(1)
        kernels = torch.zeros(len(areas) + THINGS, areas.shape[1])
        kernels[THINGS:] = areas
        kernels[:, level.cell] = 0
        kernels[level.thing, level.cell] = 1
        outputs[f"kernels_{name}"] = kernels.view(1, -1, *level.regions.shape[-2:])
    return Drawn(outputs, targets.frame)


def _logits(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(0.01, 0.95))
