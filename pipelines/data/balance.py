"""Class-balanced sampling: images of rare classes come more often (Gupta et al., "LVIS", CVPR 2019, appendix B.2).

A class that a share f of the images has gets the factor max(1, sqrt(t / f)) for a threshold t, and an image the largest
factor of its classes. An epoch reads each image that many times; `sampler.Repeats` makes whole numbers of that.

The classes of each image lie in its row, so that all rows are read once, and their classes are kept beside the shards.

Shapes: R rows, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.cluster import storage
from pipelines.data.manifest import Manifest
from pipelines.data.shard_reader import Rows

CHUNK = 64
"""Rows that are read together."""

READERS = 8
"""Threads that read."""


def repeat_factors(presence: np.ndarray, threshold: float) -> np.ndarray:
    """The number of times that an epoch reads each image, float64 [R], 1 or more; 1 for an image without a class.

    Args:
        presence: bool [R, C], the classes of each image.
        threshold: share of the images below which a class is rare.
    """
    shares = presence.mean(0) if len(presence) else np.ones(presence.shape[1])
    factors = np.sqrt(threshold / np.maximum(shares, 1e-12)).clip(min=1.0)  # a class of no image is no image's largest
    return np.where(presence, factors, 1.0).max(1, initial=1.0)


def class_presence(manifest: Manifest, rows: Sequence[int], cache: storage.Uri) -> np.ndarray:
    """bool [R, C], the classes that have a segment in each of the rows.

    Args:
        manifest: the split.
        rows: of its shards.
        cache: folder in which the classes of all rows are kept.
    """
    file = storage.join(cache, "presence", f"{manifest.hash}.npy")
    if storage.exists(file):
        return np.load(io.BytesIO(storage.read_bytes(file)))[np.asarray(rows)]
    reader = Rows(manifest.shard_set)

    def read(first: int) -> np.ndarray:
        part = reader.rows(range(first, min(first + CHUNK, manifest.rows)))
        found = np.zeros((len(part), len(manifest.categories)), bool)
        for place, row in enumerate(part):
            found[place, row["labels"]] = True
        return found

    with ThreadPoolExecutor(READERS, "classes") as pool:
        presence = np.concatenate(list(pool.map(read, range(0, manifest.rows, CHUNK))))
    buffer = io.BytesIO()
    np.save(buffer, presence)
    storage.write_bytes(file, buffer.getvalue())
    return presence[np.asarray(rows)]
