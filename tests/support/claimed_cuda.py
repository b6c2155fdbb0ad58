"""Tensors that say they lie on a GPU and hold their values on the CPU: what mixes the two fails as it would there.

`FakeTensorMode` does the same without values, so it ends where a value decides about a shape. Here every operation is
computed, on the CPU, once the devices of its tensors were compared by the rules of CUDA's operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

aten = torch.ops.aten

CUDA = torch.device("cuda", 0)

CPU = torch.device("cpu")

COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
"""What may have tensors of two devices."""

INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices from the CPU for a tensor of a GPU, but not the other way round."""


class ClaimedCuda(Tensor):
    """A tensor whose device is `CUDA`; `inner` is on the CPU and shares its shape and strides."""

    inner: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> ClaimedCuda:
        shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        options = {"dispatch_device": True, "device_for_backend_keys": CUDA}
        claimed: ClaimedCuda = Tensor._make_subclass(cls, shell, values.requires_grad, **options)  # type: ignore[arg-type]
        claimed.inner = values
        return claimed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation on the values, and its results on the device that they would have on a machine with a GPU."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CUDA
        here = _device_of_result(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
            here = torch.device(asked)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        inner_args, inner_kwargs = tree_map_only(ClaimedCuda, lambda x: x.inner, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        if func._schema.is_mutable:
            return _same_objects(func, args, kwargs, result, here)
        return tree_map(lambda x: _claim(x, here), result)

    def tolist(self) -> Any:
        """The values, as PyTorch copies them from a GPU itself."""
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refused, as it is for a tensor of a GPU."""
        raise TypeError("can't convert a CUDA tensor to numpy; copy it to the CPU first")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ClaimedCuda({self.inner})"


class _Factories(TorchDispatchMode):
    """Tensors that are made on the GPU, by the two switches that `FakeTensorMode` makes them without one with."""

    def __enter__(self) -> _Factories:
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        self._before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ClaimedCuda.__torch_dispatch__(func, types, args, kwargs)


def _device_of_result(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The one device of an operation's tensors.

    Raises:
        RuntimeError: there are two.
    """
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    devices = {x.device for x in tensors if x.ndim or x.device == CUDA}
    if func in COPIES:
        return tensors[0].device
    if func in INDEXED:
        devices = {tensors[0].device} if tensors[0].device == CUDA else devices
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors of more than one device, {sorted(map(str, devices))}")
    return devices.pop() if devices else CPU


def _claim(x: Any, device: torch.device) -> Any:
    plain = isinstance(x, Tensor) and not isinstance(x, ClaimedCuda)
    return ClaimedCuda(x) if plain and device.type == "cuda" else x


def _same_objects(func: Any, args: Any, kwargs: Any, result: Any, device: torch.device) -> Any:
    """The results of an operation that writes into its arguments: those arguments, and claims for all others."""
    given: list[Tensor] = []
    tree_map_only(ClaimedCuda, given.append, (args, kwargs))
    outer = {id(x.inner): x for x in given}
    if any(x.shape != x.inner.shape for x in given):
        with no_dispatch():  # the shell as well
            func(*args, **kwargs)
    return tree_map(lambda x: outer[id(x)] if id(x) in outer else _claim(x, device), result)


@contextmanager
def claimed_cuda() -> Iterator[None]:
    """Within it `.to(CUDA)` and `device=CUDA` give `ClaimedCuda` tensors, and autocast for CUDA is to be had."""
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.multiple(
                torch.cuda,
                _lazy_init=lambda: None,
                is_available=lambda: True,
                is_bf16_supported=lambda *_, **__: True,
                current_device=lambda: 0,
            )
        )
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        # kernels that only a GPU has
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Factories())
        yield
