"""A row of a shard, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from panoptic.png import decode_image, decode_segments
from panoptic.segmentation import Sample, Segmentation
from pipelines.data.feature_maps import decode_features, is_features


def read_row(row: Mapping[str, Any]) -> Sample:
    """Decode one shard row: the image and its truth at the size of the image.

    Raises:
        ValueError: the image or its map cannot be decoded, has another size than its row says, or holds segments that
            the row does not list; the message starts with the name of the image.
    """
    name, size = row["name"], (row["height"], row["width"])
    if is_features(row["image"]):
        raise ValueError(f"{name}: its shard holds features of a frozen backbone, no pixels; give the images' shards")
    image = decode_image(row["image"], name, size)
    return Sample(image, _truth(row, image.shape[:2]), name)


def read_features(row: Mapping[str, Any]) -> Sample:
    """Decode one row of a shard of features: its maps and its truth; the image is black.

    Raises:
        ValueError: as `read_row`.
    """
    size = (row["height"], row["width"])
    black = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (*size, 3))
    features = decode_features(row["image"], row["name"])
    return Sample(black, _truth(row, size), row["name"], features=features)


def _truth(row: Mapping[str, Any], shape: tuple[int, ...]) -> Segmentation:
    """The truth of a row whose image has this height and width."""
    name, size = row["name"], (row["height"], row["width"])
    try:
        segments = decode_segments(row["segments"], size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    labels, crowd = np.array(row["labels"], np.int64), np.array(row["crowd"], bool)
    if shape != size:
        raise ValueError(
            f"{name}: the image is {shape[0]}x{shape[1]} but its row says {size[0]}x{size[1]} (height x "
            "width); prepare the shards again"
        )
    if len(crowd) != len(labels) or segments.max() > len(labels):
        raise ValueError(
            f"{name}: its row has {len(labels)} labels and {len(crowd)} marks of crowds for {segments.max()} segments; "
            "prepare the shards again"
        )
    return Segmentation(segments, labels, crowd)
