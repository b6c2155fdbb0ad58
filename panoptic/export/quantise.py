"""Int8 weights for ONNX files: dynamic quantisation of ONNX Runtime, which needs no photographs.

Weights are stored as 8-bit integers, one scale a channel; activations are quantised as they come.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from panoptic.export.writer import quiet

LAYERS = ("MatMul", "Gemm", "Conv")
"""Operators whose weights are quantised."""


def quantise(file: str | os.PathLike[str], layers: Sequence[str] = LAYERS) -> None:
    """Replace an ONNX file by one with 8-bit weights; its metadata stays.

    Raises:
        ValueError: it cannot be quantised; names the file.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = Path(file)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet(["root"]):
        plain = onnx.load(path)
        # the exporter's shapes of single values keep the tool from inferring its own
        del plain.graph.value_info[:]
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx.save(plain, given)
        try:
            # unsigned: ONNX Runtime has no convolution of signed weights on CPUs
            quantize_dynamic(given, made, op_types_to_quantize=list(layers), weight_type=QuantType.QUInt8)
        except Exception as error:  # the tool documents none
            raise ValueError(f"{path}: ONNX Runtime cannot quantise it: {error}") from error
        result = onnx.load(made)
        del result.metadata_props[:]
        result.metadata_props.extend(plain.metadata_props)
        onnx.save(result, path)
