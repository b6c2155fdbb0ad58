"""Feature maps in the column `image` of a shard's row, in place of a photograph: a mark, then safetensors.

Shapes: C channels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

MARK = b"panoptic features 1\n"
"""The first bytes of feature maps, with which no photograph begins."""

FEATURES = "features"
"""Entry of a manifest's `source` that says what its features follow from; folder of such shards in a cache."""

BACKBONE = "backbone"
"""Entry of the value of `FEATURES`: the digest of the backbone."""

KINDS = (np.dtype(np.float32), np.dtype(np.float16))
"""Kinds of number that maps are stored in."""


def encode_features(features: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of maps [C, h, w], by name."""
    return MARK + save({name: np.ascontiguousarray(array) for name, array in features.items()})


def is_features(data: bytes) -> bool:
    """True for the bytes of maps, False for those of a photograph."""
    return data.startswith(MARK)


def decode_features(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The maps that the bytes hold, read-only.

    Args:
        data: of `encode_features`.
        name: of the image, for the message.

    Raises:
        ValueError: they are no maps, or have another kind of number or of shape.
    """
    try:
        features = load(data[len(MARK) :])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its features cannot be read ({error}); compute them again") from error
    for key, array in features.items():
        if array.ndim != 3 or array.dtype not in KINDS:
            raise ValueError(f"{name}: its feature {key} is {array.dtype} {array.shape}, no map; compute them again")
    return features
