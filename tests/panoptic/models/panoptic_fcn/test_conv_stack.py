"""Coordinate channels, eager and compiled."""

from __future__ import annotations

import torch

from panoptic.models.panoptic_fcn.conv_stack import with_coordinates


def test_coordinates_compile_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(module: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(with_coordinates, backend=count)
    for height, width in ((4, 6), (6, 9), (11, 7), (5, 8)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(compiled(x), with_coordinates(x))
    assert len(graphs) == 2  # of one size, and of any
    torch.testing.assert_close(with_coordinates(torch.zeros(1, 1, 1, 1))[0, 1:, 0, 0], torch.tensor([-1.0, -1.0]))
