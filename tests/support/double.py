"""Networks in float64, whose outputs do not depend on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


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


@contextmanager
def all_in_double() -> Iterator[None]:
    """Whatever torch computes is float64, also where the code names float32: models, targets and merging alike."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widened(TorchFunctionMode):
    """Every call of torch with float64 in place of float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].dtype is torch.bool and args[0].ndim == 0:
            return func(*args, **(kwargs or {}))  # the flag of `optim.left_out`, which torch takes in float32 alone
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.view and torch.float32 in args[1:]:  # of bytes: room for values that are yet to come
            return func(*args, **(kwargs or {})).double()
        args = tuple(_wider(value) for value in args)
        return func(*args, **{key: _wider(value) for key, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
