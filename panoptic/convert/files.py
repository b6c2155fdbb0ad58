"""Foreign checkpoint files, read without executing anything in them.

A pickle is a program that may call any function it names. Here it may name only what builds tensors,
NumPy arrays, builtin containers and `argparse.Namespace`; any other name ends the reading.
"""

from __future__ import annotations

import argparse
import builtins
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

TORCH_MAGIC = (b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
"""First bytes of files of `torch.save`: a zip archive, or the legacy format's magic number."""

WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "blobs")
"""Keys under which training scripts keep the weights beside optimiser and schedule."""

PERMITTED = "only tensors, NumPy arrays, builtin containers and argparse.Namespace are read"
"""The end of a refusal."""

BUILTINS = ("bool", "bytes", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")
"""Builtin types that a pickle may name."""


def read_checkpoint(file: BinaryIO, name: str = "checkpoint") -> dict[str, Tensor]:
    """The weights of a `.pth`, `.pth.tar`, `.pkl` or `.safetensors` file, on the CPU, without their optimiser's state.

    Args:
        file: seekable, opened for reading bytes.
        name: of the file, for error messages.

    Raises:
        ValueError: the file is no checkpoint, or names something that may not be built; nothing of it ran.
    """
    start = file.read(32)
    file.seek(0)
    if start[8:9] == b"{":  # the length of a header, then the header in JSON
        try:
            return _weights(safetensors.torch.load(file.read()), name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name}: a safetensors file that is cut short or broken ({error})") from error
    try:
        content = _torch_load(file) if start.startswith(TORCH_MAGIC) else _Unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name}: refused, and nothing in it was executed: {_reason(error)}") from error
    except (RuntimeError, EOFError, UnicodeDecodeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: neither a PyTorch nor a pickle checkpoint, or cut short ({error})") from error
    return _weights(content, name)


class _Forbidden(pickle.UnpicklingError):
    """A pickle names something that may not be built."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _reason(error: pickle.UnpicklingError) -> str:
    """The reason for refusing a pickle, for people.

    torch gives the forbidden name only within its message, which advises to read the file without protection.
    """
    if isinstance(error, _Forbidden):
        return f"it names {error.name}; {PERMITTED}"
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}; {PERMITTED}" if named else str(error).splitlines()[0]


def _weights(content: Any, name: str) -> dict[str, Tensor]:
    """Names and tensors of a loaded file, whatever its wrapper."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{name}: holds no weights; expected a dict of names and arrays, or one under {WRAPPERS}")
    others = sorted(str(key) for key, value in content.items() if not _is_numeric(value))
    if others:
        raise ValueError(f"{name}: these entries are no arrays: {', '.join(others[:20])}; expected names and arrays")
    return {
        str(key): value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for key, value in content.items()
    }


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc")


def _torch_load(file: BinaryIO) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace, *_numpy_globals().values(), *_numpy_dtypes()]):
        return torch.load(file, map_location="cpu", weights_only=True)


class _Unpickler(pickle.Unpickler):
    """Builds tensors, NumPy arrays, builtin containers and `argparse.Namespace`, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in BUILTINS:
            return getattr(builtins, name)
        permitted: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): argparse.Namespace,
            ("_codecs", "encode"): _encode,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _storage,
            **_numpy_globals(),
        }
        if (module, name) in permitted:
            return permitted[module, name]
        raise _Forbidden(f"{module}.{name}")


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """The functions that build a pickled array, under the module's names of before and after NumPy 2."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    permitted: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        permitted[module, "_reconstruct"] = multiarray._reconstruct
        permitted[module, "scalar"] = multiarray.scalar
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        permitted[module, "_frombuffer"] = _frombuffer
    return permitted


def _numpy_dtypes() -> list[type]:
    """The classes of numeric dtypes, which torch asks for by name."""
    codes = "?bhilqBHILQefdFD"
    return sorted({type(np.dtype(code)) for code in codes}, key=lambda kind: kind.__name__)


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """The array that pickle protocol 5 rebuilds from its bytes."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """The bytes that pickle protocol 2 stores as text, in latin-1, the one codec that it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


def _storage(content: bytes) -> Any:
    """The storage of a tensor inside a plain pickle, by torch's safe reader in place of its default."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
