"""Which devices multiply half-precision numbers, and autocast for those that do."""

from __future__ import annotations

import functools

import torch

from panoptic.layers.config import Precision

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""By what a CPU calls its instructions for products of a type: Intel's and AMD's, then Arm's."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network runs in half precision, or in float32 where the device is slower in that."""
    kind = TYPES[precision]
    enabled = precision != "float32" and multiplies(device.type, kind)
    return torch.autocast(device.type, kind if enabled else None, enabled=enabled)


@functools.cache
def multiplies(device: str, kind: torch.dtype) -> bool:
    """True if a device has instructions for products of half-precision numbers.

    Without them torch converts numbers one by one. A step of the demo's network on 4 images takes 7.8 s of a core in
    bfloat16 and 1.3 s in float32 (AMD EPYC of 2021, AVX2, no AVX-512).

    Args:
        device: "cpu", "cuda".
        kind: bfloat16 or float16.
    """
    if device == "cpu":
        known = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and any(known.get(name) for name in INSTRUCTIONS[kind])
    if device == "cuda" and kind == torch.bfloat16 and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
