"""The result of a reader of a data set: light rows, problems, a fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from panoptic.segmentation import Categories

Stamps = dict[str, tuple[int, int]]
"""Size in bytes and time of change of each file of a folder."""


COLUMNS = ("name", "image", "png", "record", "height", "width", "image_id")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one image."""

    name: str
    """File name of the image, or of what stands for it in the annotations."""
    reason: str
    """The fault, in words that name the file, the field and the value."""
    remedy: str = ""
    """The action that mends it; "" where the reason says it already, as in manifests of earlier versions."""


@dataclass(frozen=True)
class Source:
    """The result of a reader: one light row per image that passed the checks, in the order of the annotations."""

    reader: str
    root: str
    split: str
    categories: Categories
    rows: pa.Table
    """Columns: name (file name, unique), image and png (URIs), record (JSON text of the annotation), height,
    width (as the annotations state them), image_id (int64, or string where the dataset's ids are text)."""
    problems: tuple[Problem, ...]
    unannotated: tuple[str, ...]
    """Images that the annotations list without annotating them; they are left out."""
    bytes: int
    """Size of all images and maps."""
    fingerprint: str
    """Changes whenever the annotations, or the size or time of a file, change."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """Number of values that were read although they are not written as the format asks, by kind."""
