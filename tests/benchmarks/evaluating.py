"""Shares of the time of an evaluation (row evaluate): at least 90 % of it should be the network's.

Timers of one run of `evaluate_batches`, from encoded images to counts. The weights are random, so what they say is
swapped for the truth before post-processing, as an oracle does, but at the resolution of the network and drawn
beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch

from panoptic.backbones import Backbone
from panoptic.evaluation.tally import Batch, Measures, evaluate_batches
from panoptic.models.base import Outputs
from panoptic.models.panoptic_deeplab.model import PanopticDeepLab, PanopticDeepLabConfig
from panoptic.png import decode_image, decode_segments, encode_segments
from panoptic.segmentation import Categories, Sample, Segmentation, Targets, collate
from panoptic.training.device import Engine
from tests.benchmarks import inputs
from tests.benchmarks.timing import Row

IMAGES = 4


def rows(size: tuple[int, int]) -> list[Row]:
    """The share of the network in percent, for PQ and mIoU and for all figures.

    Args:
        size: (H, W).
    """
    rng = np.random.default_rng(3)
    classes = inputs.categories(80, 53)
    truths = [inputs.draw_truth(rng, size, 14, 7, classes) for _ in range(IMAGES)]
    files = [_encoded(rng, truth) for truth in truths]
    torch.manual_seed(0)
    model = _Coarse(PanopticDeepLabConfig(backbone=Backbone("resnet50")), classes).eval()

    def batches() -> Iterator[Batch]:
        for row, ((jpeg, png), drawn) in enumerate(zip(files, truths, strict=True)):
            truth = Segmentation(decode_segments(png), drawn.labels, drawn.crowd)
            sample = Sample(decode_image(jpeg), truth, f"{row}.jpg", original=truth, position=row)
            yield Batch(*collate([sample], model.divisor), [truth], [row])

    names = ("semantic", "centre", "offset")
    found = []
    for work, measures in (
        ("PQ and mIoU", Measures(true=names, losses=False)),
        ("boundary PQ and AP, too", Measures(boundary=True, instances=True, true=names, losses=False)),
    ):
        evaluate_batches(model, batches(), Engine(), measures)
        seconds = evaluate_batches(model, batches(), Engine(), measures).seconds
        share = 100 * seconds["network"] / sum(seconds.values())
        height, width = size
        found.append(Row("evaluate", f"network's share, {work}, ResNet-50, {width}x{height}, 14 things", share, "%"))
    return found


class _Coarse(PanopticDeepLab):
    """Whose truth has the stride of the network's outputs, so that merging upsamples it as it does those."""

    def __init__(self, config: PanopticDeepLabConfig, classes: Categories) -> None:
        super().__init__(config, classes)
        self.drawn: dict[tuple[str, ...], Outputs] = {}

    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        if targets.names not in self.drawn:
            truth, step = super().truth(targets, outputs), self.stride
            self.drawn[targets.names] = {name: x[:, :, ::step, ::step].contiguous() for name, x in truth.items()}
        return self.drawn[targets.names]


def _encoded(rng: np.random.Generator, truth: Segmentation) -> tuple[bytes, bytes]:
    """A photograph of noise with the contours of the truth, as JPEG, and the map as PNG."""
    colours = rng.integers(0, 255, (len(truth.labels) + 1, 3), np.uint8)
    image = cv2.add(colours[truth.segments], rng.integers(0, 40, (*truth.size, 3), np.uint8))
    return cv2.imencode(".jpg", image)[1].tobytes(), encode_segments(truth.segments)
