"""The merges without torch beside the models' own, over every architecture, on the same outputs of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from panoptic.export.graphs import Network, second_graphs
from panoptic.export.rules import rules
from panoptic.models.base import PanopticModel
from panoptic.models.jsis_net.model import JSISNet
from panoptic.runtime.place import Place, bilinear
from panoptic.runtime.runner import MERGES, ONE_GRAPH
from panoptic.segmentation import Categories, Frame, Segmentation
from tests.support.small import SMALL

CASES = [pytest.param(c, id=f"{kind.__name__}-{name}") for kind in SMALL for name, c in SMALL[kind].items()]

PLACE = Place((128, 192), (115, 180), (97, 131))
"""A padded canvas, and a map of another size."""


def noise(name: str, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blobs of the shape of an output, of both signs: what an untrained network gives is nearly constant."""
    if x.dtype == torch.bool:
        return x
    if name == "boxes":
        return torch.rand(x.shape, generator=generator)
    if x.ndim < 4:
        return 3 * torch.randn(x.shape, generator=generator)
    coarse = torch.randn(*x.shape[:2], 6, 8, generator=generator)
    return 2 * F.interpolate(coarse, size=x.shape[-2:], mode="bicubic") + 0.1 * torch.randn(
        x.shape, generator=generator
    )


def merged(model: PanopticModel, outputs: Mapping[str, torch.Tensor], place: Place) -> Segmentation:
    """The map by the rules of the description, the second graphs run by torch."""
    graphs = {graph.name: graph.module for graph in second_graphs(model, dict(outputs))}

    def graph(name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = graphs[name]({key: torch.from_numpy(value) for key, value in inputs.items()})
        return {key: value.numpy() for key, value in found.items()}

    own = rules(model)
    arrays = {name: value.numpy() for name, value in outputs.items()}
    second = () if own["rule"] in ONE_GRAPH else (graph,)
    return MERGES[own["rule"]](arrays, place, model.categories, own, *second).compact()


@pytest.mark.parametrize("config", CASES)
def test_the_map_is_the_models_own(config: Any, small_categories: Categories) -> None:
    torch.manual_seed(0)
    model = config.build(small_categories).eval()
    if isinstance(model, JSISNet) and model.head is not None:  # else every region is background, and its mask empty
        torch.nn.init.constant_(cast(torch.Tensor, model.head.masks.predictor.bias), 0.3)
        model.head.boxes.classes.bias.data[0] = 3.0
    sizes = torch.tensor([PLACE.size])
    with torch.no_grad():
        shapes = Network(model)(torch.zeros(1, 3, *PLACE.canvas, dtype=torch.uint8), sizes)
    pairs = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        outputs = {name: noise(name, value, generator) for name, value in shapes.items()}
        frame = Frame(PLACE.canvas, sizes, torch.tensor([PLACE.output]))
        maps = model.postprocess(outputs, frame, ("maps",)).maps
        assert maps is not None
        pairs.append((maps[0].compact(), merged(model, outputs, PLACE)))
    for ours, without in pairs:
        assert without.labels.tolist() == ours.labels.tolist()
        assert without.segments.shape == PLACE.output and without.segments.dtype == np.int32
        assert (without.segments == ours.segments).mean() > 0.9995  # rounding decides where two are equal
        if ours.scores is not None:
            assert without.scores is not None
            np.testing.assert_allclose(without.scores, ours.scores, atol=2e-4)
    assert max(len(ours.labels) for ours, _ in pairs) > 1, "a map of one segment shows little"


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(37, 50), (5, 6), (9, 40), (1, 1)])
def test_resizing_is_torchs(size: tuple[int, int], aligned: bool) -> None:
    x = np.random.default_rng(0).normal(size=(3, 9, 11)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x)[None], size, mode="bilinear", align_corners=aligned)[0].numpy()
    np.testing.assert_allclose(bilinear(x, size, aligned), expected, atol=1e-5)
