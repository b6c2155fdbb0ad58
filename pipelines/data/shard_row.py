"""A row of a shard, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from panoptic.png import decode_image, decode_segments
from panoptic.segmentation import Sample, Segmentation


def read_row(row: Mapping[str, Any]) -> Sample:
    """Decode one shard row: the image and its truth at the size of the image.

    Raises:
        ValueError: the image or its map cannot be decoded, has another size than its row says, or holds segments that
            the row does not list; the message starts with the name of the image.
    """
    name, size = row["name"], (row["height"], row["width"])
    image = decode_image(row["image"], name, size)
    try:
        segments = decode_segments(row["segments"], size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    labels, crowd = np.array(row["labels"], np.int64), np.array(row["crowd"], bool)
    if image.shape[:2] != size:
        raise ValueError(
            f"{name}: the image is {image.shape[0]}x{image.shape[1]} but its row says {size[0]}x{size[1]} (height x "
            "width); prepare the shards again"
        )
    if len(crowd) != len(labels) or segments.max() > len(labels):
        raise ValueError(
            f"{name}: its row has {len(labels)} labels and {len(crowd)} marks of crowds for {segments.max()} segments; "
            "prepare the shards again"
        )
    return Sample(image, Segmentation(segments, labels, crowd), name)
