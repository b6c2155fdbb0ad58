"""Counts how often code asks a device for a value: on a GPU the host then waits for all that it has asked for."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.bincount.default,
}
"""What needs a value, or whose result has a size that depends on values."""

INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What does so where an index is a mask."""


class HostReads(TorchDispatchMode):
    """While it is entered, `places` counts reads by the innermost line within panoptic/, `.cpu()` and `.tolist()` too.

    Args:
        on_cpu: tensors that lie on the CPU in a training on a GPU, too; lists of their values do not count.
    """

    def __init__(self, on_cpu: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._copies = _Copies(self.places, {tensor.data_ptr() for tensor in on_cpu})

    def __enter__(self) -> HostReads:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    @property
    def count(self) -> int:
        """All of them."""
        return sum(self.places.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or (func in INDEXED and self._masked(args[1])):
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _masked(indices: Any) -> bool:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Copies(TorchFunctionMode):
    """Counts copies to the CPU by the call, as on a CPU they are no operation of their own."""

    def __init__(self, places: Counter[str], on_cpu: set[int]) -> None:
        super().__init__()
        self._places, self._on_cpu = places, on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.tolist) and args[0].data_ptr() not in self._on_cpu:
            self._places[place()] += 1
        return func(*args, **(kwargs or {}))


def place() -> str:
    """File, line and function of the innermost frame within panoptic/; "elsewhere" where there is none."""
    for frame in reversed(traceback.extract_stack()):
        if "/panoptic/" in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.rsplit('/panoptic/', 1)[1]}:{frame.lineno} {frame.name}"
    return "elsewhere"
