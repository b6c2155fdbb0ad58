"""Networks in float64, whose outputs do not depend on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def in_double(targets: bool = False) -> Iterator[None]:
    """A model of float64 stays so: what asks for float32, for autocast's sake, gets what it has.

    Where a network amplifies rounding, float32 results differ from one processor to the next, since each adds in
    another order: by 1e-3 where offsets of deformable convolutions are large, by per cents after some training steps.

    Args:
        targets: are float64, too, as everything that is made; else only what gradients flow through.
    """
    single, default = torch.Tensor.float, torch.get_default_dtype()

    def float_of(tensor: torch.Tensor) -> torch.Tensor:
        if targets:
            return tensor if tensor.is_floating_point() else tensor.double()
        return tensor if tensor.dtype == torch.float64 and tensor.requires_grad else single(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", float_of)
        torch.set_default_dtype(torch.float64 if targets else default)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
