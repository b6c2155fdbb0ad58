"""The graphs of an exported model beside the model itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from panoptic.export.graphs import Network, second_graphs
from panoptic.models.base import PanopticModel
from panoptic.runtime.runner import NETWORK, Runner

SIZES = ((192, 288), (320, 256))
"""Heights and widths that are compared by default; each is rounded up to what the model takes."""


def differences(
    model: PanopticModel, folder: str | os.PathLike[str], sizes: Sequence[tuple[int, int]] = SIZES
) -> dict[str, float]:
    """The largest difference between ONNX Runtime and torch in each graph, as a share of its output's largest value
    (of 1 where that is less).

    Args:
        model: in evaluation mode, on the CPU.
        folder: that `write` wrote as ONNX.
        sizes: of the images, which are noise with a margin of padding.
    """
    runner, found = Runner(folder), {}
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        height, width = (-(-side // model.divisor) * model.divisor for side in (height, width))
        images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)
        valid = torch.tensor([[height - 5, width - 9]])
        with torch.no_grad():
            outputs = Network(model)(images, valid)
            pairs = [(NETWORK, {"images": images, "sizes": valid}, outputs)]
            pairs += [(graph.name, graph.inputs, graph.module(graph.inputs)) for graph in second_graphs(model, outputs)]
        for name, inputs, expected in pairs:
            ours = runner.graph(name, {key: value.numpy() for key, value in inputs.items()})
            worst = max(_difference(value.numpy(), ours[key]) for key, value in expected.items())
            found[name] = max(worst, found.get(name, 0.0))
    return found


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))
