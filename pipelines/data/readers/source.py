"""The result of a reader of a data set: light rows, problems, a fingerprint, and the function that decodes a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from panoptic.png import from_ids
from panoptic.segmentation import Categories, Segmentation
from pipelines.data.config import Orientation, Unlisted
from pipelines.data.copies import Copies
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.id_map import read_ids

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


class Truth(NamedTuple):
    """One image's map, and what its reading brought to light."""

    segmentation: Segmentation
    repairs: Mapping[str, int] = MappingProxyType({})
    """Number of values, segments or pixels that needed a repair, by kind, as the manifest adds them up."""
    area_mismatches: int = 0
    """Segments whose stated area their pixels deny."""
    warnings: Mapping[str, int] = MappingProxyType({})
    """Number of images or segments in which something is odd without being wrong, by kind."""
    areas: np.ndarray | None = None
    """int64 [N], the pixels of each segment, where the reading counted them."""


Decode = Callable[[Mapping[str, Any], Callable[[str], bytes], Categories], Truth]
"""From a light row, the function that reads an address, and the categories to the truth of the image. It travels to the
workers, so it is a function of a module, or a `functools.partial` of one. It raises ValueError, naming the file, where
the label files are not what the format asks; sizes that the row states are compared, not used."""

OTHER_BOXES = "segments state a bbox that their pixels deny (the pixels count)"
"""Kind of warning."""

SWAPPED = "width and height swapped in the JSON"
"""Kind of repair, as the manifest adds them up."""


def decode_coco(
    row: Mapping[str, Any],
    read: Callable[[str], bytes],
    categories: Categories,
    *,
    written: Categories | None = None,
    covered: bool = False,
    bgr: bool = False,
    unlisted: Unlisted = "refuse",
) -> Truth:
    """The truth of a row of COCO-panoptic: `png` is its id map, `record` its annotation.

    Args:
        row, read, categories: see `Decode`.
        written: the same classes with the ids that the record uses, where those of `categories` are others.
        covered, bgr, unlisted: see `read_ids`.

    Raises:
        ValueError: the map and the record do not agree.
    """
    options = {"bgr": bgr, "covered": covered, "unlisted": unlisted}
    found = read_ids(read(row["png"]), json.loads(row["record"]), **options)
    truth = from_ids(found.ids, found.record, written or categories, row["name"], of_map=found.regions.runs)
    areas = np.array([found.regions.pixels[info["id"]] for info in found.record["segments_info"]], np.int64)
    warnings = {OTHER_BOXES: found.box_mismatches} if found.box_mismatches else {}
    return Truth(truth, {**found.repairs, **check_size(row, truth)}, found.area_mismatches, warnings, areas)


def check_size(row: Mapping[str, Any], truth: Segmentation) -> dict[str, int]:
    """Compare the size that a record states, if it does, with that of the map; the repairs that reading it needs.

    Raises:
        ValueError: they differ by more than the order of height and width.
    """
    stated = (row["height"], row["width"])
    if None in stated or stated == truth.size:
        return {}
    if stated == truth.size[::-1]:
        return {SWAPPED: 1}
    height, width = truth.size
    raise Fault(
        f"{row['name']}: the map is {height}x{width} but the JSON says {stated[0]}x{stated[1]} (height x width)",
        "correct height and width in images, or export the map in the size of its photograph",
    )


@dataclass(frozen=True)
class Source:
    """The result of a reader: one light row per image that passed the checks, in the order of the annotations."""

    reader: str
    root: str
    split: str
    categories: Categories
    rows: pa.Table
    """Columns: name (file name, unique), image and png (addresses of the photograph and of the label file), record
    (JSON of the annotation, or of what else `decode` takes), height, width (as the annotations state them; null where
    they do not), image_id (int64, or string where the dataset's ids are text)."""
    problems: tuple[Problem, ...]
    unannotated: tuple[str, ...]
    """Images that the annotations list without annotating them; they are left out."""
    bytes: int
    """Size of all images and maps."""
    fingerprint: str
    """Changes whenever the annotations, or the size or time of a file, change."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """Number of values that were read although they are not written as the format asks, by kind."""
    decode: Decode = decode_coco
    """From a row to the truth of its image; the workers call it."""
    orientation: Orientation = "applied"
    """The frame of the maps where sizes do not tell it (see `Orientation`); a column of this name overrules it."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Facts about class maps, joined sets and copies that the manifest keeps beside reader, root and split."""
    copies: Copies | None = None
    """Augmented copies of each image that are written, too; see `join.with_copies`."""
